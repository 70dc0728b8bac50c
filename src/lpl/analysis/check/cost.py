"""What a step of the run takes: memory and FLOPs counted as in `lpl plan`, time measured where it fits."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from lpl.analysis.alternatives import fits
from lpl.analysis.check.images import Encoded, same_size
from lpl.analysis.check.levels import wait
from lpl.analysis.needs import Needs, estimate
from lpl.base.errors import UserError
from lpl.config import TrainConfig
from lpl.families import blueprint
from lpl.training.engine import add_lora
from lpl.training.rehearsal import Device, Rehearsal
from lpl.training.step import TrainingStep

REPEATS = 2
FLOAT32_SHARE = 0.75
"""Share of a GPU's memory for float32 weights: with more, too little is left for activations and LPL."""


def count(config: TrainConfig, configs: dict[str, Any], device: torch.device) -> Needs:
    """Counts what the run needs on one device of this kind, from the configs of the model's components."""
    kind: Device = "cpu" if device.type == "cpu" else "cuda"
    return estimate(config, Rehearsal(blueprint(configs, config.model), kind))


def step_row(needs: Needs, config: TrainConfig, seconds: float | None, lpl_seconds: float) -> dict[str, Any]:
    """The entry "step" of check.json, for an optimizer step of one process.

    seconds: a micro-batch's forward and backward pass without LPL (None: not measured); lpl_seconds: LPL for one
    sample.
    """
    run = config.run
    samples = config.samples_per_step(1)
    decoded = needs.mean_lpl_flops / needs.lpl_flops if needs.lpl_flops else 0.0
    plain = None if seconds is None else seconds * run.gradient_accumulation_steps
    with_lpl = None if plain is None else plain + samples * decoded * lpl_seconds
    return {
        "peak_bytes": needs.peak,
        "phase": needs.phase,
        "flops": round(samples * (needs.step_flops + needs.mean_lpl_flops)),
        "seconds": with_lpl,
        "seconds_without_lpl": plain,
        "samples": samples,
        "lpl_seconds_per_sample": lpl_seconds,
        "lpl_samples": samples * decoded,
    }


def gpu_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None: the device is no GPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def no_float32(denoiser: torch.nn.Module, device: torch.device, config: TrainConfig) -> str | None:
    """Why a denoiser is not measured in float32 (its weights are codes, or do not fit a GPU); None: it is.

    Raises:
        UserError: they do not fit, and the run's precision is float32.
    """
    quantized = config.model.quantize_base
    if quantized is not None and config.run.mixed_precision != "no":
        return f"--quantize_base {quantized} is measured in the run's precision alone"
    memory, size = gpu_memory(device), 4 * sum(parameter.numel() for parameter in denoiser.parameters())
    if memory is None or size <= FLOAT32_SHARE * memory:
        return None
    why = f"in float32 its weights take {size / 2**30:.3g} of this GPU's {memory / 2**30:.3g} GiB"
    if config.run.mixed_precision == "no":
        raise UserError(f"--mixed_precision no: the denoiser does not fit: {why}; use bf16")
    return why


def measure_step(
    config: TrainConfig, step: TrainingStep, denoiser: Any, encoded: Encoded, device: torch.device, needs: Needs
) -> tuple[float | None, str | None]:
    """Seconds of a micro-batch's forward and backward pass without LPL, or why they were not measured.

    The denoiser is left prepared for training, so this must be the last measurement.
    """
    memory = gpu_memory(device)
    if memory is not None and not fits(needs.peak, memory):
        return None, f"time of a step: it needs {needs.peak / 2**30:.1f} GiB, this GPU has {memory / 2**30:.1f}"
    if config.model.rank is not None:
        if step.autocast is not None and config.model.quantize_base is None:  # codes were made in it already
            torch.nn.Module.to(denoiser, step.autocast)
        add_lora(denoiser, config.model, step.family.lora_targets, config.run.seed)
    else:
        denoiser.requires_grad_(True)
        torch.nn.Module.to(denoiser, getattr(torch, config.optim.weights_dtype))
    if config.run.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train().to(device)
    for parameter in denoiser.parameters():  # kept gradients would take memory that the run may not have
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    group = same_size(encoded.pictures)[0]
    size = config.run.train_batch_size
    batch = encoded.batch([group[i % len(group)] for i in range(size)], 0)
    times = []
    for _ in range(1 + REPEATS):
        wait(device)
        started = time.perf_counter()
        step(denoiser, batch, device, use_lpl=False, step=0).loss.backward()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]), None


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
