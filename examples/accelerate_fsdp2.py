"""accelerate, in one process or many, under DDP or FSDP2. Lines of LPL end in `# LPL`.

    accelerate launch --use_fsdp --fsdp_version 2 ... your_script.py

The decoder is not prepared: every process holds it whole.
"""

import torch

from lpl import LatentPerceptualLoss, PerceptualObjective  # LPL


def train(accelerator, unet, vae, noise_scheduler, batches, learning_rate=1e-4):
    """Trains on batches of latents, each process on its own; returns the objective."""
    objective = PerceptualObjective(LatentPerceptualLoss(vae.to(accelerator.device)), noise_scheduler, "auto")  # LPL
    optimizer = torch.optim.AdamW(unet.parameters(), learning_rate)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    for latents in batches:
        with accelerator.accumulate(unet):
            noise = torch.randn_like(latents)
            count = noise_scheduler.config.num_train_timesteps
            timesteps = torch.randint(count, (len(latents),), device=latents.device)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            output = unet(noisy_latents, timesteps).sample
            output = output.view_as(output)  # LPL: one that FSDP has no hooks on, as it is differentiated on its own
            loss = torch.nn.functional.mse_loss(output, noise)
            lpl = objective(output, noisy_latents, latents, timesteps, diffusion_loss=loss)  # LPL
            accelerator.backward(loss + lpl.loss)  # LPL
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            objective.end_step(lambda x: accelerator.reduce(x, "sum"))  # LPL
    return objective
