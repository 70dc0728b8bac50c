"""PyTorch Lightning: the training_step of a latent diffusion model. Lines of LPL end in `# LPL`."""

import lightning
import torch

from lpl import LatentPerceptualLoss, PerceptualObjective  # LPL


class LatentDiffusion(lightning.LightningModule):
    """Trains a UNet of diffusers on batches of latents."""

    def __init__(self, unet, vae, noise_scheduler, learning_rate=1e-4):
        super().__init__()
        self.unet, self.noise_scheduler, self.learning_rate = unet, noise_scheduler, learning_rate
        self.frozen = [vae]  # in a list it is neither saved with the model nor put into training mode
        self.objective = PerceptualObjective(LatentPerceptualLoss(vae), noise_scheduler, "auto")  # LPL

    def on_fit_start(self):
        self.frozen[0].to(self.device)  # LPL

    def training_step(self, latents, batch_idx):
        noise = torch.randn_like(latents)
        count = self.noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(count, (len(latents),), device=latents.device)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        output = self.unet(noisy_latents, timesteps).sample
        loss = torch.nn.functional.mse_loss(output, noise)
        lpl = self.objective(output, noisy_latents, latents, timesteps, diffusion_loss=loss)  # LPL
        self.log("weighted_lpl", lpl.metrics["lpl/weighted_loss"])  # LPL
        return loss + lpl.loss  # LPL

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.objective.end_step(lambda x: self.trainer.strategy.reduce(x, reduce_op="sum"))  # LPL

    def configure_optimizers(self):
        return torch.optim.AdamW(self.unet.parameters(), self.learning_rate)
