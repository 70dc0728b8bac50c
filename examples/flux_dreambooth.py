"""What to add to diffusers' train_dreambooth_flux.py and train_dreambooth_lora_flux.py: the lines that end in `# LPL`.

All else is the script's own loop, under its names and cut to what matters here. The transformer sees packed latents,
(B, h w / 4, 4 C). The script unpacks what it predicts; a loop that does not hands `unpack=` to the objective.
"""

import copy

import torch
from diffusers import FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from lpl import LatentPerceptualLoss, PerceptualObjective  # LPL


def train(transformer, vae, noise_scheduler, batches, args, weight_dtype=torch.float32):
    """Trains on batches of (latents, prompt_embeds, pooled_prompt_embeds); returns the objective."""
    noise_scheduler_copy = copy.deepcopy(noise_scheduler)
    vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=args.learning_rate)

    def draw_u(count):
        return compute_density_for_timestep_sampling(
            args.weighting_scheme, count, args.logit_mean, args.logit_std, args.mode_scale
        )

    objective = PerceptualObjective(  # LPL: once, after the VAE is loaded; it stays on the device
        LatentPerceptualLoss(vae), noise_scheduler_copy, "auto", prediction_type="flow",  # LPL
        p_gate=lambda count: noise_scheduler_copy.sigmas[(1000 * draw_u(count)).long()],  # LPL
    )  # fmt: skip
    for model_input, prompt_embeds, pooled_prompt_embeds in batches:
        size, channels, height, width = model_input.shape
        model_input = model_input.float()  # LPL: in the place of .to(dtype=weight_dtype)
        noise = torch.randn_like(model_input)
        indices = (draw_u(size) * noise_scheduler_copy.config.num_train_timesteps).long()
        timesteps = noise_scheduler_copy.timesteps[indices].to(model_input.device)
        sigmas = noise_scheduler_copy.sigmas[indices].to(model_input.device).view(-1, 1, 1, 1)
        noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
        packed = FluxPipeline._pack_latents(noisy_model_input.to(weight_dtype), size, channels, height, width)  # LPL
        model_pred = transformer(
            hidden_states=packed,
            timestep=timesteps / 1000,
            guidance=None,
            pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(size, height // 2, width // 2, "cpu", weight_dtype),
            return_dict=False,
        )[0]
        pixels = {"height": height * vae_scale_factor, "width": width * vae_scale_factor}
        model_pred = FluxPipeline._unpack_latents(model_pred, **pixels, vae_scale_factor=vae_scale_factor)
        weighting = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas)
        loss = (weighting.float() * (model_pred.float() - (noise - model_input).float()) ** 2).mean()
        lpl = objective(model_pred, noisy_model_input, model_input, sigmas=sigmas, diffusion_loss=loss)  # LPL
        (loss + lpl.loss).backward()  # LPL: accelerator.backward(loss + lpl.loss)
        optimizer.step()
        optimizer.zero_grad()
        objective.end_step()  # LPL: where accelerator.sync_gradients
    return objective
