"""FLOPs of a full-size SDXL training step, with and without LPL, counted on the meta device.

python benchmarks/step_flops.py [pixels]
"""

import sys

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from lpl import LatentPerceptualLoss

UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
}
P_GATE = 0.2


def main(pixels: int) -> None:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE).eval().requires_grad_(False)
        latents = torch.empty(1, 4, pixels // 8, pixels // 8)
        inputs = (latents, torch.zeros(1, dtype=torch.long), torch.empty(1, 77, 2048))
        conditions = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with FlopCounterMode(display=False) as step:
            unet(*inputs, added_cond_kwargs=conditions).sample.sum().backward()
        with FlopCounterMode(display=False) as loss:
            pred = torch.empty_like(latents).requires_grad_()
            LatentPerceptualLoss(vae, checkpointing=checkpointing)(pred, latents).per_sample.sum().backward()
        unet_tflop, lpl_tflop = step.get_total_flops() / 1e12, loss.get_total_flops() / 1e12
        print(
            f"{pixels} px, checkpointing {checkpointing}: UNet {unet_tflop:.1f} TFLOP, LPL {lpl_tflop:.1f} per gated "
            f"sample, {P_GATE * lpl_tflop:.1f} on average at a gate probability of {P_GATE}: "
            f"a step costs {1 + P_GATE * lpl_tflop / unet_tflop:.2f} times one without LPL"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1024)
