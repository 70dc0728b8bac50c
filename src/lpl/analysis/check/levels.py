"""Both losses at every noise level: LPL's distance by layer, and each loss's gradient at the model's output.

Each picture is measured once in each of BINS equal parts of the schedule, whether or not LPL's gate passes there; the
timestep is uniform in the part. With g the gradient of one sample's loss at the model's output, including weights such
as min-SNR, lpl_scale and masks, but not the gate and lpl_weight:

    ratio = sqrt(mean |g_lpl|^2) / sqrt(mean |g_diffusion|^2)
    cosine = mean of <g_lpl, g_diffusion> / (|g_lpl| |g_diffusion|)

The uninformed distance is LPL between a picture and the mean latent of all pictures and places: that of an estimate
that knows nothing of the picture. The denoiser is used as loaded, and gradients stop at its output.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lpl.analysis.check.images import Encoded, same_size
from lpl.base.terminal import progress
from lpl.data.dataset import Batch
from lpl.diffusion.draws import bin_edges, keyed_uniform
from lpl.diffusion.prediction import signal_to_noise
from lpl.perceptual.effect import Gradients, compared
from lpl.perceptual.gate import snr_scale
from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.training.step import StepInputs, TrainingStep


@dataclass
class Levels:
    """Measurements of N pictures in K parts of the schedule, float64, on the CPU; NaN where x0 is undefined."""

    edges: list[int]
    """Part k holds edges[k] <= t < edges[k + 1]."""
    taps: list[str]
    levels: Tensor
    """(N, K), noise levels of the schedule."""
    lpl: Tensor
    """(N, K), L, without scale."""
    uninformed: Tensor
    """(N,), L of the mean latent."""
    distance: Tensor
    """(taps, N, K)."""
    outliers: Tensor
    """(taps, N, K)."""
    lpl_square: Tensor
    """(N, K); see Gradients."""
    diffusion_square: Tensor
    cosine: Tensor
    weights: Tensor
    """(N,), loss weight of each picture."""
    lpl_seconds: list[float] = field(default_factory=list)
    """Time of LPL with its gradient, per sample, for each batch."""


@torch.no_grad()
def estimate(step: TrainingStep, denoiser: nn.Module, batch: Batch, levels: Tensor, device: torch.device) -> StepInputs:
    """Noises a batch as in training, to given noise levels (B,), and runs the model; its output requires gradients."""
    inputs = step.denoise(denoiser, batch, step.draw(batch).noise, levels, device)
    inputs.model_output.requires_grad_()
    return inputs


def gradients_of(model_output: Tensor, lpl_terms: Tensor, diffusion_terms: Tensor) -> Gradients:
    """Compares the gradients of both losses' terms, (B,) each, at the model's output (B, C, h, w), sample by sample."""
    pair = [
        torch.autograd.grad(terms.sum(), model_output, retain_graph=True)[0] for terms in (lpl_terms, diffusion_terms)
    ]
    return compared(*pair)


def mean_latent(step: TrainingStep, encoded: Encoded) -> Tensor:
    """The mean over pictures and places of the posterior means, (1, C, 1, 1), model space."""
    means = torch.cat([mean.mean((2, 3), keepdim=True) for mean in encoded.mean])
    return step.latent_space.from_raw(means.mean(0, keepdim=True))


def measure(step: TrainingStep, denoiser: nn.Module, encoded: Encoded, device: torch.device) -> Levels:
    """Measures every picture at every noise level.

    Args:
        step: the run's, with its objective.
        denoiser: in eval mode, on the device.
        encoded: the pictures.
        device: where the model is.
    """
    assert step.objective is not None
    loss_fn = step.objective.loss_fn.uncropped()  # ignores --lpl_crop and --lpl_random_depth
    edges, n = bin_edges(step.schedule.num_timesteps), len(encoded)
    taps = [tap.name for tap in loss_fn.taps]
    shape = (n, len(edges) - 1)

    def empty(*size: int) -> Tensor:
        return torch.full(size, torch.nan, dtype=torch.float64)

    def levels_of(picture: str) -> Tensor:
        drawn = [keyed_uniform(step.seed, "check_timestep", picture, k) for k in range(shape[1])]
        return step.schedule.at([low + u * (high - low) for u, low, high in zip(drawn, edges, edges[1:], strict=False)])

    found = Levels(
        edges, taps, torch.stack([levels_of(picture.id) for picture in encoded.pictures]), empty(*shape), empty(n),
        empty(len(taps), *shape), empty(len(taps), *shape), empty(*shape), empty(*shape), empty(*shape),
        torch.ones(n, dtype=torch.float64),
    )  # fmt: skip
    work = [(numbers, k) for numbers in same_size(encoded.pictures) for k in range(shape[1])]
    average = mean_latent(step, encoded).to(device)
    for numbers, k in progress(work, desc="measuring", unit="batch"):
        batch = encoded.batch(numbers, k)
        seen = estimate(step, denoiser, batch, found.levels[numbers, k], device)
        if batch.weights is not None:
            found.weights[numbers] = batch.weights.double()
        if k == 0:
            with torch.no_grad():
                blank = loss_fn(average.expand_as(seen.latents), seen.latents, seen.mask)
            found.uninformed[numbers] = blank.per_sample.cpu().double()
        if step.prediction_type == "epsilon" and bool((seen.alpha == 0).any()):
            continue  # pure noise holds nothing about x0
        _measure_batch(found, step, loss_fn, seen, numbers, k)
    return found


def _measure_batch(
    found: Levels,
    step: TrainingStep,
    loss_fn: LatentPerceptualLoss,
    seen: StepInputs,
    numbers: Sequence[int],
    k: int,
) -> None:
    objective, device = step.objective, seen.latents.device
    assert objective is not None
    pred = seen.x0(step.prediction_type)
    wait(device)
    started = time.perf_counter()
    out = loss_fn(pred, seen.latents, seen.mask)
    wait(device)
    found.lpl_seconds.append((time.perf_counter() - started) / len(numbers))
    snr = signal_to_noise(seen.alpha, seen.sigma)
    scale = snr_scale(snr, objective.snr_gamma) if objective.lpl_scale else torch.ones_like(snr)
    diffusion = step.diffusion_per_sample(seen)
    gradients = gradients_of(seen.model_output, scale.to(device) * out.per_sample, diffusion)
    found.lpl[numbers, k] = out.per_sample.detach().cpu().double()
    found.lpl_square[numbers, k], found.diffusion_square[numbers, k], found.cosine[numbers, k] = gradients
    for tap, name in enumerate(found.taps):
        found.distance[tap, numbers, k] = out.per_layer[name].cpu().double()
        found.outliers[tap, numbers, k] = out.outlier_fraction[name].cpu().double()


def wait(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def layer_rows(found: Levels, loss_fn: LatentPerceptualLoss) -> list[dict[str, Any]]:
    """The entry "layers" of check.json."""
    return [
        {
            "tap": tap.name,
            "channels": tap.channels,
            "stride": tap.stride,
            "weight": weight,
            "bins": [
                {
                    "t_low": low,
                    "t_high": high,
                    "distance": _mean(found.distance[i, :, k]),
                    "outlier_fraction": _mean(found.outliers[i, :, k]),
                }
                for k, (low, high) in enumerate(zip(found.edges, found.edges[1:], strict=False))
            ],
        }
        for i, (tap, weight) in enumerate(zip(loss_fn.taps, loss_fn.weights, strict=True))
    ]


def gradient_rows(found: Levels) -> list[dict[str, Any]]:
    """The entry "gradients" of check.json."""
    rows = []
    for k, (low, high) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
        cosine = found.cosine[:, k]
        cosine = cosine[cosine.isfinite()]
        lpl, diffusion = _mean(found.lpl_square[:, k]), _mean(found.diffusion_square[:, k])
        several = len(cosine) > 1
        rows.append(
            {
                "t_low": low,
                "t_high": high,
                "ratio": (lpl / diffusion) ** 0.5 if diffusion else float("nan"),
                "cosine": _mean(cosine),
                "cosine_error": float(cosine.std()) / len(cosine) ** 0.5 if several else float("nan"),
                "lpl": _mean(found.lpl[:, k]),
                "num": len(cosine),
            }
        )
    return rows


def _mean(values: Tensor) -> float:
    """The mean over values that are no NaN; NaN if there are none."""
    return float(values.nanmean())
