"""What to add to LatentDiffusion of CompVis's ldm (latent-diffusion, stable-diffusion): the lines that end in `# LPL`.

All else is ldm/models/diffusion/ddpm.py's own code, under its names and cut to what matters here; its base there is a
LightningModule. ldm's AutoencoderKL shares its name with diffusers' and nothing else: its decoder is handed over in
stages.
"""

import torch

from lpl import LatentPerceptualLoss, LatentSpace, PerceptualObjective  # LPL


def in_turn(modules):  # LPL
    return lambda h: [h := m(h, None) if hasattr(m, "conv1") else m(h) for m in modules][-1]  # LPL


class LatentDiffusion(torch.nn.Module):
    parameterization, num_timesteps, scale_factor = "eps", 1000, 0.18215
    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor

    def __init__(self, unet, first_stage_model):
        super().__init__()
        self.model, self.first_stage_model = unet, first_stage_model.eval().requires_grad_(False)
        alphas_cumprod = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, self.num_timesteps) ** 2).cumprod(0)
        self.register_buffer("sqrt_alphas_cumprod", alphas_cumprod.sqrt())
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod).sqrt())

    def on_train_start(self):
        model, kind = self.first_stage_model, {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
        first, mid, up = [model.post_quant_conv, model.decoder.conv_in], model.decoder.mid, model.decoder.up
        stages = [in_turn([*first, mid.block_1, mid.attn_1, mid.block_2])]  # LPL
        stages += [in_turn([*up[n].block, *([up[n].upsample] if n else [])]) for n in reversed(range(len(up)))]  # LPL
        strides = [2 ** max(n, 0) for n in range(len(up) - 1, -2, -1)]  # LPL
        space = LatentSpace.scaled(float(self.scale_factor))  # LPL
        loss_fn = LatentPerceptualLoss(stages=stages, strides=strides, latent_space=space)  # LPL
        self.objective = PerceptualObjective(  # LPL
            loss_fn,
            lpl_weight="auto",
            prediction_type=kind[self.parameterization],
            alpha_sigma=lambda t: (self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]),
            p_gate=lambda n: torch.randint(self.num_timesteps, (n,)).to(self.sqrt_alphas_cumprod.device),
        )

    def p_losses(self, x_start, cond, t):
        noise = torch.randn_like(x_start)
        alpha, sigma = self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]
        alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        x_noisy = alpha * x_start + sigma * noise
        model_output = self.model(x_noisy, t, cond)
        target = {"eps": noise, "x0": x_start, "v": alpha * noise - sigma * x_start}[self.parameterization]
        loss = (model_output - target).square().mean()
        if self.training:  # in validation there is no gradient to measure
            loss = loss + self.objective(model_output, x_noisy, x_start, t, diffusion_loss=loss).loss  # LPL
        return loss

    def training_step(self, batch, _):
        z, cond = batch
        return self.p_losses(z, cond, torch.randint(self.num_timesteps, (len(z),), device=z.device))

    def on_train_batch_end(self, *_):
        self.objective.end_step()  # LPL: of several processes hand over their sum
