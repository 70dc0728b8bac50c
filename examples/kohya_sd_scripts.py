"""What to add to train_network.py of kohya's sd-scripts (SD 1.5, SD 2, SDXL): the lines that end in `# LPL`.

sdxl_train_network.py runs that file's trainer, too. All else is the script's own, under its names and cut to what
matters here. The script pins older versions of diffusers and transformers than this package asks for, with which LPL
works too: pip install --no-deps.
"""

import torch

from lpl import LatentPerceptualLoss, LatentSpace, PerceptualObjective  # LPL


class NetworkTrainer:
    vae_scale_factor = 0.18215  # sdxl_train_network.py: 0.13025

    def get_noise_pred_and_target(self, args, noise_scheduler, latents, unet, text_encoder_conds):
        latents = latents.float()  # LPL: those of a half-precision VAE are not
        noise = torch.randn_like(latents)
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(latents),))
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        noise_pred = unet(noisy_latents.requires_grad_(), timesteps, text_encoder_conds).sample
        target = noise_scheduler.get_velocity(latents, noise, timesteps) if args.v_parameterization else noise
        self.lpl_call = (noise_pred, noisy_latents, latents, timesteps)  # LPL
        return noise_pred, target, timesteps, None

    def process_batch(self, batch, unet, noise_scheduler, args):
        found = self.get_noise_pred_and_target(args, noise_scheduler, batch["latents"], unet, batch["conds"])
        noise_pred, target, _, _ = found
        loss = (noise_pred.float() - target.float()).square().mean((1, 2, 3)) * batch["loss_weights"]
        loss = loss.mean()
        if loss.requires_grad:  # LPL: not in validation
            loss = loss + self.objective(*self.lpl_call, None, batch["loss_weights"], diffusion_loss=loss).loss  # LPL
        return loss

    def train(self, args, accelerator, unet, vae, noise_scheduler, batches):
        optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], args.learning_rate)
        # What the VAE and the noise schedule state of scale and prediction is not what the script does.
        vae.to(accelerator.device).eval()  # LPL: after noise_scheduler is made
        loss_fn = LatentPerceptualLoss(vae, latent_space=LatentSpace.scaled(self.vae_scale_factor))  # LPL
        kind = "v_prediction" if args.v_parameterization else "epsilon"  # LPL
        self.objective = PerceptualObjective(loss_fn, noise_scheduler, "auto", prediction_type=kind)  # LPL
        for batch in batches:
            accelerator.backward(self.process_batch(batch, unet, noise_scheduler, args))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.objective.end_step(lambda x: accelerator.reduce(x, "sum"))  # LPL: where accelerator.sync_gradients
