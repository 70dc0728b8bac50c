"""What a step of the run takes: memory and arithmetic counted as `lpl plan` does, time measured where it fits."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from lpl.analysis.alternatives import fits
from lpl.analysis.check.images import Encoded, same_size
from lpl.analysis.needs import Needs, estimate
from lpl.analysis.rehearsal import Device, Rehearsal
from lpl.config import TrainConfig
from lpl.families import blueprint
from lpl.training.lora import add_lora
from lpl.training.step import TrainingStep

REPEATS = 2


def count(config: TrainConfig, configs: dict[str, Any], device: torch.device) -> Needs:
    """Counts what the run needs on one device of this kind.

    Args:
        config: with resolution and precision.
        configs: of the model's components.
        device: its type is what counts.
    """
    kind: Device = "cpu" if device.type == "cpu" else "cuda"
    return estimate(config, Rehearsal(blueprint(configs, config.model), kind))


def step_row(needs: Needs, config: TrainConfig, seconds: float | None, lpl_seconds: float) -> dict[str, Any]:
    """What check.json has under "step": of an optimizer step of one process.

    Args:
        needs: from count.
        config: the options.
        seconds: of a micro-batch forward and backward without LPL; None: not measured.
        lpl_seconds: of LPL, for a sample.
    """
    run = config.run
    samples = run.train_batch_size * run.gradient_accumulation_steps
    plain = None if seconds is None else seconds * run.gradient_accumulation_steps
    with_lpl = None if plain is None else plain + samples * needs.decoded * lpl_seconds
    return {
        "peak_bytes": needs.peak,
        "phase": needs.phase,
        "flops": round(samples * (needs.step_flops + needs.decoded * needs.lpl_flops)),
        "seconds": with_lpl,
        "seconds_without_lpl": plain,
        "samples": samples,
        "lpl_seconds_per_sample": lpl_seconds,
        "lpl_samples": samples * needs.decoded,
    }


def measure_step(
    config: TrainConfig, step: TrainingStep, denoiser: Any, encoded: Encoded, device: torch.device, needs: Needs
) -> tuple[float | None, str | None]:
    """Seconds of a micro-batch's forward and backward pass without LPL, or why they were not measured.

    The denoiser is left prepared for training: nothing else may follow.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if not fits(needs.peak, memory):
            return None, f"time of a step: it needs {needs.peak / 2**30:.1f} GiB, this GPU has {memory / 2**30:.1f}"
    if config.model.rank is not None:
        if step.autocast is not None:
            denoiser.to(dtype=step.autocast)
        add_lora(denoiser, config.model, step.family.lora_targets, config.run.seed)
    else:
        denoiser.requires_grad_(True)
    if config.run.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train().to(device)
    group = same_size(encoded.pictures)[0]
    size = config.run.train_batch_size
    batch = encoded.batch([group[i % len(group)] for i in range(size)], 0)
    times = []
    for _ in range(1 + REPEATS):
        _wait(device)
        started = time.perf_counter()
        step(denoiser, batch, device, use_lpl=False, step=0).loss.backward()
        for parameter in denoiser.parameters():
            parameter.grad = None
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]), None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
