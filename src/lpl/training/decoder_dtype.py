"""`--lpl_dtype auto`: the cheaper precision of LPL's decoder whose gradient is finite and near float32's.

Measured once, before the first step, on the latents z of the run, at estimates z + 0.3 noise. config.yaml has the
choice, so that a continued run computes as it began.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from lpl.base.terminal import percent
from lpl.config import TrainConfig
from lpl.diffusion.draws import draw_normal
from lpl.training.engine import build_loss

logger = logging.getLogger("lpl")

LARGEST_ERROR = 0.1
"""|g - g32| / |g32| of the gradient, up to which another precision is taken; bfloat16's is some hundredths."""
LARGEST_TIME = 0.9
"""Share of float32's time, up to which another precision is taken."""
SAMPLES, ROUNDS = 4, 3
NOISE = 0.3


def with_decoder_dtype(
    config: TrainConfig, family: Any, raw_latents: Callable[[], Tensor], accelerator: Accelerator
) -> TrainConfig:
    """The options with a precision in the place of "auto"; all processes get the same.

    Args:
        raw_latents: gives (N, C, h, w), of which the first are measured; not called without "auto".
    """
    if not config.lpl.use_lpl or config.lpl.lpl_dtype != "auto":
        return config
    chosen: list[str | None] = [None]
    if accelerator.is_main_process:
        latents = family.latent_space.from_raw(raw_latents()[:SAMPLES].to(accelerator.device))
        chosen = [_measured(config, family, latents)]
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    return config.changed(lpl_dtype=chosen[0])


def _measured(config: TrainConfig, family: Any, latents: Tensor) -> str:
    device = latents.device
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        logger.info("--lpl_dtype auto: float32, as this GPU does not compute in bfloat16")
        return "float32"
    noise = draw_normal(latents.shape, config.run.seed, "lpl_dtype").to(latents)
    exact, seconds = _gradient(config.changed(lpl_dtype="float32"), family, latents, noise)
    found, other = _gradient(config.changed(lpl_dtype="bfloat16"), family, latents, noise)
    error = float((found - exact).norm() / exact.norm()) if bool(found.isfinite().all()) else float("inf")
    ratio = other / seconds
    choice = "bfloat16" if error <= LARGEST_ERROR and ratio <= LARGEST_TIME else "float32"
    logger.info(
        "--lpl_dtype auto: %s; in bfloat16 the gradient is %s, the time %.2f of float32's",
        choice, f"within {percent(error)} of float32's" if error < float("inf") else "not finite", ratio,
    )  # fmt: skip
    return choice


def _gradient(config: TrainConfig, family: Any, latents: Tensor, noise: Tensor) -> tuple[Tensor, float]:
    """The gradient of the loss, float32, and the median of its times in seconds."""
    loss_fn, times = build_loss(config, family.vae, family.latent_space), []
    for _ in range(1 + ROUNDS):
        pred = (latents + NOISE * noise).requires_grad_()
        started = time.perf_counter()
        [gradient] = torch.autograd.grad(loss_fn(pred, latents).per_sample.sum(), pred)
        float(gradient.sum())  # waits for the device
        times.append(time.perf_counter() - started)
    return gradient.float(), median(times[1:])
