"""What to add to diffusers' train_dreambooth_sd3.py and train_dreambooth_lora_sd3.py: the lines that end in `# LPL`.

All else is the script's own loop, under its names and cut to what matters here.
"""

import copy

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from lpl import LatentPerceptualLoss, PerceptualObjective  # LPL


def train(transformer, vae, noise_scheduler, batches, args, weight_dtype=torch.float32):
    """Trains on batches of (latents, prompt_embeds, pooled_prompt_embeds); returns the objective."""
    noise_scheduler_copy = copy.deepcopy(noise_scheduler)
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=args.learning_rate)

    def draw_u(count):
        return compute_density_for_timestep_sampling(
            args.weighting_scheme, count, args.logit_mean, args.logit_std, args.mode_scale
        )

    objective = PerceptualObjective(  # LPL: once, after the VAE is loaded; it stays on the device
        LatentPerceptualLoss(vae), noise_scheduler_copy, "auto",  # LPL
        prediction_type="sample" if args.precondition_outputs else "flow",  # LPL
        p_gate=lambda count: noise_scheduler_copy.sigmas[(1000 * draw_u(count)).long()],  # LPL
    )  # fmt: skip
    for model_input, prompt_embeds, pooled_prompt_embeds in batches:
        model_input = model_input.float()  # LPL: in the place of .to(dtype=weight_dtype)
        noise = torch.randn_like(model_input)
        indices = (draw_u(len(model_input)) * noise_scheduler_copy.config.num_train_timesteps).long()
        timesteps = noise_scheduler_copy.timesteps[indices].to(model_input.device)
        sigmas = noise_scheduler_copy.sigmas[indices].to(model_input.device).view(-1, 1, 1, 1)
        noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
        model_pred = transformer(
            hidden_states=noisy_model_input.to(weight_dtype),  # LPL
            timestep=timesteps,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0]
        if args.precondition_outputs:
            model_pred = model_pred * (-sigmas) + noisy_model_input
        weighting = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas)
        target = model_input if args.precondition_outputs else noise - model_input
        loss = (weighting.float() * (model_pred.float() - target.float()) ** 2).mean()
        lpl = objective(model_pred, noisy_model_input, model_input, sigmas=sigmas, diffusion_loss=loss)  # LPL
        (loss + lpl.loss).backward()  # LPL: accelerator.backward(loss + lpl.loss)
        optimizer.step()
        optimizer.zero_grad()
        objective.end_step()  # LPL: where accelerator.sync_gradients
    return objective
