"""A LoRA on the denoiser, through peft."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig

from lpl.diffusion.draws import keyed_seed


def add_lora(denoiser: Any, rank: int, targets: tuple[str, ...], seed: int) -> None:
    """Freezes the denoiser and adds a trainable float32 adapter of this rank (alpha = rank) to the named layers.

    The adapter starts as the identity (B = 0); A is drawn from the seed, on the CPU, whatever the device.
    """
    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "lora"))
        denoiser.add_adapter(config)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
