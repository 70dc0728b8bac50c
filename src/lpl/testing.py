"""Tiny random models for tests: real classes of diffusers and transformers, built from configs, no download."""

from typing import Any

import torch


def randomize(module: torch.nn.Module, seed: int = 0, scale: float = 0.15) -> torch.nn.Module:
    """Adds seeded noise to every parameter, so that no weight is 0 or 1 by construction and no bug hides there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def tiny_vae(seed: int = 0, widths: tuple[int, ...] = (8, 16, 16, 16), **config: Any) -> Any:
    """An AutoencoderKL of a few thousand parameters, randomised, in eval mode and frozen."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    settings = {"latent_channels": 4, "norm_num_groups": 4, "scaling_factor": 0.5, "layers_per_block": 1} | config
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        **settings,
    )
    randomize(vae, seed)
    return vae.eval().requires_grad_(False)
