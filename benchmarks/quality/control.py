"""Controls in the place of LPL's distance: plain distances of latents, which leave gate, scale, reduction and share.

    squared    L_i = mean over channels and locations of (x0_hat_i - x0_i)^2
    channel    the same of both after LPL's norm `channel`: (x - mean) / (std + 1e-6) with the prediction's statistics
               per sample and channel, gradient through them

If `squared` does as well as LPL, then it is LPL's weighting of noise levels that helps; if `channel` does, it is the
norm, and not the decoder's features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl.perceptual.loss import LPLOutput
from lpl.perceptual.sweep import WithGradient


class LatentDistance:
    """A distance of latents, called as a LatentPerceptualLoss is; its one "layer" is the latent.

    Args:
        kind: squared or channel.
    """

    reach = None
    crop = None

    def __init__(self, kind: str = "squared") -> None:
        if kind not in ("squared", "channel"):
            raise ValueError(f"a distance of latents is squared or channel, not {kind!r}")
        self.kind = kind

    def __call__(
        self,
        pred_latents: Tensor,
        target_latents: Tensor,
        mask: Tensor | None = None,
        *,
        depth: int | None = None,
        windows: Tensor | None = None,
    ) -> LPLOutput:
        """Compares two batches of latents.

        Args:
            pred_latents, target_latents: (B, C, h, w), model space; gradients flow into the first alone.
            mask, depth, windows: not taken.

        Raises:
            ValueError: shapes that differ, or one of the options that are not taken.
        """
        if pred_latents.shape != target_latents.shape:
            raise ValueError(f"latents of one shape, not {pred_latents.shape} and {target_latents.shape}")
        if mask is not None or depth is not None or windows is not None:
            raise ValueError("this distance takes no mask, depth or windows")
        with_gradient = torch.is_grad_enabled() and pred_latents.requires_grad
        target = target_latents.detach().float()
        with torch.enable_grad():
            pred = pred_latents.detach().float().requires_grad_(with_gradient)
            difference = pred - target
            if self.kind == "channel":
                difference = difference / (pred.std((2, 3), keepdim=True) + 1e-6)
            per_sample = difference.square().mean((1, 2, 3))
            gradient = torch.autograd.grad(per_sample.sum(), pred)[0] if with_gradient else None
        per_sample = detached = per_sample.detach()
        if gradient is not None:
            per_sample = WithGradient.apply(pred_latents, detached, gradient)
        zero = torch.zeros_like(detached)
        mean, std = target.mean((1, 2, 3)), target.flatten(1).std(1)
        return LPLOutput(
            per_sample, {"latent": detached}, {"latent": zero}, {"latent": mean}, {"latent": std}, gradient
        )
