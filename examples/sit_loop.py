"""A plain DiT or SiT loop: x_t = (1 - t) * noise + t * data and v = data - noise, so that t = 1 is data.

Lines of LPL end in `# LPL`. Before a long run look at `check_loop`: whether LPL acts, and how strongly.
"""

import torch

from lpl import LatentPerceptualLoss, PerceptualObjective, check  # LPL


def predict(model, latents, labels):
    """The arguments of the objective for a batch of latents (B, C, h, w), with the diffusion loss."""
    noise, t = torch.randn_like(latents), torch.rand(len(latents), device=latents.device)
    x_t = (1 - t.view(-1, 1, 1, 1)) * noise + t.view(-1, 1, 1, 1) * latents
    v = model(x_t, timestep=(999 * t).long(), class_labels=labels).sample
    loss = (v - (latents - noise)).square().mean()
    return {"model_output": v, "noisy_latents": x_t, "latents": latents, "sigmas": 1 - t, "diffusion_loss": loss}


def build_objective(vae):
    return PerceptualObjective(LatentPerceptualLoss(vae), lpl_weight="auto", prediction_type="flow_to_data")  # LPL


def check_loop(model, vae, batches):
    """Prints what LPL does in this loop; batches of (latents, labels)."""
    objective = build_objective(vae)
    print(check(objective.loss_fn, objective, (predict(model, *batch) for batch in batches), vae=vae))


def train(model, vae, batches, learning_rate=1e-4):
    """Trains on batches of (latents, labels); returns the objective."""
    objective = build_objective(vae)  # LPL
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for latents, labels in batches:
        call = predict(model, latents, labels)
        lpl = objective(**call)  # LPL
        (call["diffusion_loss"] + lpl.loss).backward()  # LPL
        optimizer.step()
        optimizer.zero_grad()
        objective.end_step()  # LPL
    return objective
