"""What an objective returns for a micro-batch, with its metrics."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lpl.perceptual.auto_weight import zero_gradient
from lpl.perceptual.loss import LPLOutput


class PerceptualTerm(NamedTuple):
    """LPL of one micro-batch."""

    loss: Tensor
    """Scalar, weighted: add it to the diffusion loss. An exact 0 without graph where no sample passed the gate."""
    metrics: dict[str, Tensor | float]
    """Scalars on the device, detached: reading one synchronises, keeping it does not. See read()."""
    num_samples: int
    """Samples that went through the decoder."""

    def read(self) -> dict[str, float]:
        """The metrics as numbers, for where they are logged. Synchronises.

        Raises:
            RuntimeError: LPL's gradient is exactly 0 for every gated sample whose weight, mask and value are not 0: it
                trains nothing.
        """
        numbers = {name: float(value) for name, value in self.metrics.items()}
        if fault := zero_gradient(numbers):
            raise RuntimeError(fault)
        return numbers


def describe(out: LPLOutput, snr: Tensor) -> dict[str, Tensor | float]:
    """Metrics of the samples that went through the decoder, under the diffusers project's names; snr: (B,)."""
    metrics: dict[str, Tensor | float] = {
        "lpl/loss": out.per_sample.detach().mean(),
        "lpl/snr_mean": snr.mean(),
        "lpl/snr_min": snr.min(),
        "lpl/snr_max": snr.max(),
    }
    for i, tap in enumerate(out.per_layer):
        prefix = f"lpl/features/layer_{i}"
        metrics[f"{prefix}/distance"] = out.per_layer[tap].mean()
        metrics[f"{prefix}/outlier_ratio"] = out.outlier_fraction[tap].mean()
        metrics[f"{prefix}/mean"] = out.feature_mean[tap].mean()
        metrics[f"{prefix}/std"] = out.feature_std[tap].mean()
    return metrics


def gradient_share(lpl_square: float, diffusion_square: float) -> float:
    """r_lpl / (r_lpl + r_diffusion) from mean squared gradients; 0 where both are 0."""
    lpl, diffusion = lpl_square**0.5, diffusion_square**0.5
    return lpl / (lpl + diffusion) if lpl > 0 else 0.0
