"""The Latent Perceptual Loss: the distance of two latents as the VAE's decoder sees them.

    L_i = 1/N sum_l w_l d_l(phi_l(pred_i), phi_l(target_i)),    w_l = 2^-log2(resolution_l / resolution_mid)

phi_l: feature maps after the decoder's middle block and up blocks. Source: Berrada et al., "Boosting Latent Diffusion
with Perceptual Objectives", ICLR 2025 (arXiv 2411.04873), section 3.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp import autocast, is_autocast_available
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from lpl.diffusion.latent_space import LatentSpace
from lpl.perceptual.decoders import decoder_taps
from lpl.perceptual.forward_gradient import WithGradient
from lpl.perceptual.normalization import NORM_TYPES, normalize
from lpl.perceptual.outliers import MAX_STRIDE, inlier_mask

logger = logging.getLogger(__name__)


class LPLOutput(NamedTuple):
    """What the loss returns; every dict maps a tap's name to (B,), detached float32."""

    per_sample: Tensor
    """(B,), float32, differentiable (once) in pred_latents only."""
    per_layer: dict[str, Tensor]
    """Distances d_l, without the layer weight."""
    outlier_fraction: dict[str, Tensor]
    """Share of the target's values that were masked; 0 where a layer has no mask."""
    feature_mean: dict[str, Tensor]
    feature_std: dict[str, Tensor]
    """Mean and standard deviation of the target's features."""
    gradient: Tensor | None
    """dL_i/dpred_latents, (B, C, h, w), detached; None without gradients."""


class LatentPerceptualLoss:
    """LPL per sample.

    It owns no weights: the VAE stays the caller's to place and to save. The decoder's parameters are frozen
    (requires_grad False) here. The decoder runs outside autocast in `dtype`; distances are float32. The gradient is
    computed in the forward pass and only it is kept, so no feature map outlives the call.

    Args:
        vae: a diffusers VAE in eval mode, of a class that decoders.DECODERS names.
        num_blocks: up blocks compared after the middle block; the decoder is not run past the last one.
        norm_type: see normalization.normalize.
        loss_type: mse or l1, on normalised features.
        pow_law: weigh layers by w_l above; off: 1.
        remove_outliers: mask the target's outliers, see outliers.inlier_mask.
        checkpointing: keep only each stage's input and recompute the rest for the gradient.
        dtype: precision of the decoder; where the VAE's weights have another, a private copy is made.
        latent_space: how model space maps to raw latents; None: what vae.config states.

    Raises:
        ValueError: an unknown option value, or a VAE that cannot be walked.
    """

    def __init__(
        self,
        vae: Any,
        num_blocks: int = 4,
        norm_type: str = "shared",
        loss_type: str = "mse",
        pow_law: bool = True,
        remove_outliers: bool = True,
        checkpointing: bool = False,
        dtype: torch.dtype = torch.float32,
        latent_space: LatentSpace | None = None,
    ) -> None:
        if norm_type not in NORM_TYPES:
            raise ValueError(f"norm_type {norm_type!r} is none of {', '.join(NORM_TYPES)}")
        if loss_type not in ("mse", "l1"):
            raise ValueError(f"loss_type {loss_type!r} is neither mse nor l1")
        if num_blocks < 0:
            raise ValueError(f"num_blocks must be 0 or more, not {num_blocks}")
        decoder = decoder_taps(vae)
        if num_blocks > decoder.num_up_blocks:
            logger.warning(
                "num_blocks %d: this decoder has %d up blocks, all tapped", num_blocks, decoder.num_up_blocks
            )
        for module in decoder.modules():
            module.requires_grad_(False)
        self.copied = any(p.dtype != dtype for m in decoder.modules() for p in m.parameters())
        self.decoder = decoder.copy_to(dtype) if self.copied else decoder
        self.latent_space = latent_space or LatentSpace.from_config(vae.config)
        self.taps = decoder.taps[: num_blocks + 1]
        self.weights = [tap.stride / self.taps[0].stride if pow_law else 1.0 for tap in self.taps]
        self.norm_type, self.loss_type, self.remove_outliers = norm_type, loss_type, remove_outliers
        self.checkpointing, self.dtype = checkpointing, dtype
        self.arithmetic = torch.promote_types(dtype, torch.float32)

    def __call__(self, pred_latents: Tensor, target_latents: Tensor, mask: Tensor | None = None) -> LPLOutput:
        """Compares two batches of latents.

        Args:
            pred_latents: (B, C, h, w), model space, any float dtype.
            target_latents: (B, C, h, w), model space; no gradient flows into it.
            mask: (B, 1, h, w) in [0, 1]; only where it is above 0 do features count. None: everywhere.

        Raises:
            ValueError: shapes that do not fit each other or the VAE, or a decoder in training mode or changed dtype.
        """
        self._check(pred_latents, target_latents)
        target_latents = target_latents.detach()
        with _without_autocast(pred_latents.device.type):
            if not (torch.is_grad_enabled() and pred_latents.requires_grad):
                return self._compare(pred_latents, target_latents, mask)
            pred = pred_latents.detach().to(self.arithmetic).requires_grad_()
            out = self._compare(pred, target_latents, mask)
            # float16 features have gradients below its smallest number: scale them by a power of two, exactly undone.
            scale = 2.0**16 if self.dtype == torch.float16 else 1.0
            (gradient,) = torch.autograd.grad(out.per_sample.sum() * scale, pred)
            per_sample = WithGradient.apply(pred_latents, out.per_sample.detach(), gradient / scale)
            return out._replace(per_sample=per_sample, gradient=gradient / scale)

    def _compare(self, pred_latents: Tensor, target_latents: Tensor, mask: Tensor | None) -> LPLOutput:
        per_layer, outliers, means, stds = {}, {}, {}, {}
        total = torch.zeros(len(pred_latents), device=pred_latents.device, dtype=self.arithmetic)
        x, y = (self.decoder.begin(self._raw(z)) for z in (pred_latents, target_latents))
        for stage, (tap, weight) in enumerate(zip(self.taps, self.weights, strict=True)):
            with torch.no_grad():
                y = self.decoder.run(stage, y)
            x = self._run(stage, x)
            target = y.to(self.arithmetic)
            inliers = inlier_mask(target, tap.stride) if self.remove_outliers and tap.stride <= MAX_STRIDE else None
            distance = self._distance(x.to(self.arithmetic), target, inliers, mask)
            total = total + weight * distance
            per_layer[tap.name] = distance.detach()
            outliers[tap.name] = torch.zeros_like(distance) if inliers is None else 1 - inliers.mean((1, 2, 3))
            stds[tap.name], means[tap.name] = torch.std_mean(target, (1, 2, 3))
        return LPLOutput(total / len(self.taps), per_layer, outliers, means, stds, None)

    def _raw(self, latents: Tensor) -> Tensor:
        return self.latent_space.to_raw(latents.to(self.arithmetic)).to(self.dtype)

    def _run(self, stage: int, x: Tensor) -> Tensor:
        if self.checkpointing and x.requires_grad:
            return checkpoint(self.decoder.run, stage, x, use_reentrant=False)
        return self.decoder.run(stage, x)

    def _distance(self, x: Tensor, y: Tensor, inliers: Tensor | None, mask: Tensor | None) -> Tensor:
        """d_l, (B,): per channel the mean over the values that count, then the mean over channels."""
        x, y = normalize(x, y if inliers is None else y * inliers, self.norm_type)
        distance = (x - y).square() if self.loss_type == "mse" else (x - y).abs()
        count = inliers
        if mask is not None:
            inside = interpolate(mask.to(y.dtype), y.shape[-2:], mode="nearest").expand_as(y)
            count = inside if inliers is None else inside * inliers
        if count is None:
            return distance.mean((1, 2, 3))
        total = count.sum((2, 3))
        return ((distance * count).sum((2, 3)) / torch.where(total > 0, total, 1)).mean(1)

    def _check(self, pred: Tensor, target: Tensor) -> None:
        if pred.shape != target.shape or pred.dim() != 4:
            raise ValueError(f"latents must be two (B, C, h, w) of one shape, not {pred.shape} and {target.shape}")
        if pred.shape[1] != self.decoder.latent_channels:
            raise ValueError(f"latents have {pred.shape[1]} channels, the VAE's have {self.decoder.latent_channels}")
        for module in self.decoder.modules():
            if module.training:
                raise ValueError("the VAE went to training mode: call vae.eval()")
            weight = next(module.parameters())
            if self.copied and weight.device != pred.device:
                module.to(pred.device)
            if weight.dtype != self.dtype:
                raise ValueError(f"the VAE was cast to {weight.dtype} after the loss was built for {self.dtype}")


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Also around the backward pass: autocast would cast what the attention's products call there."""
    return autocast(device_type, enabled=False) if is_autocast_available(device_type) else nullcontext()
