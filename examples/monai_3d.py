"""A MONAI loop for latent diffusion in 3-D: the lines that end in `# LPL` are what is new.

Latents are encoded in the loop, as LatentDiffusionInferer does inside, since LPL needs them and the noisy ones.
"""

import torch

from lpl import HookTaps, LatentPerceptualLoss, LatentSpace, PerceptualObjective  # LPL


def build_objective(autoencoder, scheduler, names, latents, scale_factor):
    """LPL on the modules of these names, such as "decoder.blocks.2" (print(autoencoder.decoder) shows them)."""
    raw = latents[:1] / scale_factor
    taps = HookTaps(autoencoder, names, autoencoder.decode_stage_2_outputs, example=raw)  # LPL
    loss_fn = LatentPerceptualLoss(taps, latent_space=LatentSpace.scaled(scale_factor))  # LPL
    return PerceptualObjective(  # LPL
        loss_fn,
        lpl_weight="auto",
        prediction_type=str(scheduler.prediction_type),  # "epsilon", "sample" or "v_prediction"
        alpha_sigma=lambda t: (scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()),
        p_gate=lambda n: torch.randint(scheduler.num_train_timesteps, (n,)),
    )


def train(unet, autoencoder, scheduler, images, names, learning_rate=1e-4):
    """Trains on batches of images (B, 1, D, H, W); returns the objective."""
    autoencoder.eval().requires_grad_(False)
    optimizer, objective = torch.optim.Adam(unet.parameters(), learning_rate), None
    scale_factor = float(1 / autoencoder.encode_stage_2_inputs(images[0]).std())
    for batch in images:
        latents = autoencoder.encode_stage_2_inputs(batch) * scale_factor
        noise, timesteps = torch.randn_like(latents), torch.randint(scheduler.num_train_timesteps, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps)
        loss = (prediction - noise).square().mean()
        objective = objective or build_objective(autoencoder, scheduler, names, latents, scale_factor)  # LPL
        lpl = objective(prediction, noisy, latents, timesteps, diffusion_loss=loss)  # LPL
        (loss + lpl.loss).backward()  # LPL
        optimizer.step()
        optimizer.zero_grad()
        objective.end_step()  # LPL
    return objective
