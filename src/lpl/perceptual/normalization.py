"""How features are made comparable before their distance is taken."""

import torch
from torch import Tensor

NORM_TYPES = ("default", "shared", "batch", "channel", "channel_detached")


def normalize(x: Tensor, y: Tensor, norm_type: str) -> tuple[Tensor, Tensor]:
    """Features of the prediction x and the target y, normalised.

        default            each by its own length over channels at each location, + 1e-10
        shared             both by the target's length over channels, + 1e-6
        batch              both standardised per channel with the target's statistics over batch and space
        channel            both standardised per sample and channel with the prediction's, gradient through them
        channel_detached   the same, detached

    Standard deviations divide by n - 1 and get + 1e-6. Where a length or deviation is 0 its gradient is 0.

    Differs from the paper: it standardises per channel with the prediction's statistics (`channel`); whether the
    gradient passes through them is not settled by its text, so both are options. `default` and `batch` are the
    diffusers project's, `batch` here doing what it is meant to.

    Args:
        x: (B, C, H, W), float32 or float64.
        y: (B, C, H, W), same dtype, without gradient.
        norm_type: one of NORM_TYPES.

    Raises:
        ValueError: an unknown norm, or too few values for a standard deviation.
    """
    if norm_type == "default":
        return x / (_length(x) + 1e-10), y / (_length(y) + 1e-10)
    if norm_type == "shared":
        length = _length(y) + 1e-6
        return x / length, y / length
    dims: tuple[int, ...]
    if norm_type == "batch":
        statistics, dims = y, (0, 2, 3)
    elif norm_type in ("channel", "channel_detached"):
        statistics, dims = (x if norm_type == "channel" else x.detach()), (2, 3)
    else:
        raise ValueError(f"unknown norm {norm_type!r}; known: {', '.join(NORM_TYPES)}")
    if statistics.numel() // statistics.shape[1] // (1 if 0 in dims else statistics.shape[0]) < 2:
        raise ValueError(f"norm {norm_type!r} needs at least 2 values per channel; the features are {tuple(x.shape)}")
    std, mean = torch.std_mean(statistics, dims, keepdim=True)
    return (x - mean) / (std + 1e-6), (y - mean) / (std + 1e-6)


def _length(x: Tensor) -> Tensor:
    """Euclidean length over channels, (B, 1, H, W); torch gives it the gradient 0 at 0."""
    return torch.linalg.vector_norm(x, dim=1, keepdim=True)
