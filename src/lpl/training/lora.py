"""A LoRA or DoRA on the denoiser, through peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig

from lpl.config import ModelConfig
from lpl.diffusion.draws import keyed_seed


def add_lora(denoiser: Any, options: ModelConfig, targets: Mapping[str, tuple[str, ...]], seed: int) -> None:
    """Freezes the denoiser and adds a trainable float32 adapter to the layers of --lora_targets.

    LoRA (Hu et al., 2021, eq. 3): W + (alpha / rank) B A, with B = 0 at the start, so that nothing changes, and A
    normal with standard deviation 1 / rank (peft's "gaussian"; the paper says only: normal). A is drawn from the seed,
    on the CPU, whatever the device. With --use_dora (Liu et al., 2024, eq. 5): m V / |V|, V = W + (alpha / rank) B A,
    |V| being the norm of each output's weights, without gradient; m is trained too and starts as |W|.

    Args:
        denoiser: a diffusers model.
        options: rank, lora_alpha (None: the rank), lora_dropout (of the adapter's input), lora_targets and use_dora.
        targets: names of layers by --lora_targets, matched at the end of a module's name.
        seed: of the run.
    """
    assert options.rank is not None
    denoiser.requires_grad_(False)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.lora_dropout,
        use_dora=options.use_dora,
        init_lora_weights="gaussian",
        target_modules=list(targets[options.lora_targets]),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "lora"))
        denoiser.add_adapter(config)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
