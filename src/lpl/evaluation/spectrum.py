"""The radially averaged power spectrum of images, and how far one set's is from another's."""

from __future__ import annotations

import torch
from torch import Tensor

BANDS = {"low": (0.0, 0.125), "middle": (0.125, 0.25), "high": (0.25, 0.5)}
"""Cycles per pixel, lower end excluded: from the largest shapes to the finest grain, the last two an octave each."""

FLOOR = 1e-9
"""Power below this counts as this; the rounding of 8-bit images has 1.3e-6."""

LUMA = (0.299, 0.587, 0.114)


def frequencies(size: int) -> Tensor:
    """Centres of the rings, (size // 2,), cycles per pixel: 1 / size up to 1/2."""
    return torch.arange(1, size // 2 + 1, dtype=torch.float64) / size


def power_spectrum(images: Tensor) -> Tensor:
    """Power of the luma at each frequency, averaged over the ring of whole waves per image nearest to it.

    P(f) = mean over |k| ~ f of |FFT(w (x - mean x))(k)|^2 / sum w^2, w a Hann window: without it the image's opposite
    edges, which do not match, would fill all frequencies. White noise of variance v has P = v at every frequency.

    Args:
        images: (B, 3, H, H), uint8 0..255 or floats of that range, square.

    Returns:
        (B, H // 2), float64, for values in [0, 1].
    """
    size = images.shape[-1]
    luma = torch.tensor(LUMA, dtype=torch.float64, device=images.device)
    values = (images.to(torch.float64) / 255 * luma[:, None, None]).sum(1)
    values = values - values.mean((1, 2), keepdim=True)
    window = torch.hann_window(size, periodic=True, dtype=torch.float64, device=images.device)
    window = window[:, None] * window
    power = torch.fft.fft2(values * window).abs().square() / window.square().sum()
    ring = _rings(size).to(images.device)
    rings = size // 2
    inside = (ring >= 1) & (ring <= rings)
    total = torch.zeros(len(images), rings + 1, dtype=torch.float64, device=images.device)
    total.index_add_(1, ring[inside], power.flatten(1)[:, inside])
    return total[:, 1:] / torch.bincount(ring[inside], minlength=rings + 1)[1:]


def _rings(size: int) -> Tensor:
    waves = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    return torch.sqrt(waves[:, None].square() + waves.square()).round().long().flatten()


def log_error(power: Tensor, reference: Tensor, band: str) -> Tensor:
    """Mean over a band's frequencies of |ln P - ln P_reference|; 0.1 is 10 % of power.

    Args:
        power: (..., F), mean over the images.
        reference: (F,), the same of the reference.
        band: a key of BANDS.

    Returns:
        (...,), 0 or more; NaN where images are too small to have a frequency in the band.
    """
    low, high = BANDS[band]
    # F rings: frequency n / size with size = 2 F or 2 F + 1; the difference does not move a ring to another band.
    at = torch.arange(1, len(reference) + 1, dtype=torch.float64) / (2 * len(reference))
    inside = (at > low) & (at <= high)
    error = (power[..., inside].clamp(min=FLOOR).log() - reference[inside].clamp(min=FLOOR).log()).abs()
    return error.mean(-1)
