"""The definition of the loss, written plainly: the fast path is tested and measured against it.

    L_i = 1/N sum_l w_l sum(m_l d_l) / sum(m_l),    d_l = |n(phi_l(pred_i)) - n(phi_l(target_i))|^2

phi_l: feature maps after the middle block and the up blocks of the VAE's decoder, m_l: the mask of what counts in them,
n: their normalisation, w_l = 2^-log2(resolution_l / resolution_mid). Source: Berrada et al., "Boosting Latent
Diffusion with Perceptual Objectives", ICLR 2025 (arXiv 2411.04873), section 3; differs from it where distance.py does.
Two full passes through the decoder with plain autograd, every feature map kept, exact order statistics.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, max_pool2d, max_pool3d
from torch.utils.checkpoint import checkpoint

from lpl.diffusion.latent_space import LatentSpace


def decoder_features(vae: Any, latents: Tensor, num_blocks: int, checkpointing: bool) -> list[Tensor]:
    """Outputs of the middle block and of the first num_blocks up blocks, (B, C, H, W), for latents of model space."""
    x = LatentSpace.from_config(vae.config).to_raw(latents)
    x = vae.decoder.conv_in(x if vae.post_quant_conv is None else vae.post_quant_conv(x))
    features = []
    for block in [vae.decoder.mid_block, *vae.decoder.up_blocks[:num_blocks]]:
        x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        features.append(x)
    return features


def inlier_mask(y: Tensor, stride: float) -> Tensor:
    """1 where the target's feature is no outlier, (B, C, *space); stride: pixels of the image per cell of y."""
    values = y.flatten(2)
    ranks = (max(1, int(share * values.shape[-1])) for share in (0.02, 0.98))
    shape = (*y.shape[:2], *[1] * (y.dim() - 2))
    low, high = (values.kthvalue(rank, dim=-1).values.view(shape) for rank in ranks)
    margin = 2 * values.std(-1).view(shape)
    mask = ((y > low - margin) & (y < high + margin)).to(y.dtype)
    close, open_ = math.ceil(3 / stride), math.ceil(5 / stride)
    close, open_ = (1 if close == 2 else close), (3 if open_ == 2 else open_)
    pool = {3: max_pool1d, 4: max_pool2d, 5: max_pool3d}[y.dim()]
    mask = pool(mask, close, 1, (close - 1) // 2)
    return -pool(-mask, open_, 1, (open_ - 1) // 2)


def normalise(x: Tensor, y: Tensor, norm_type: str) -> tuple[Tensor, Tensor]:
    """Features of the prediction, x, and of the target, y, both (B, C, *space)."""
    space = tuple(range(2, x.dim()))
    if norm_type == "default":  # each by its own length
        return x / (x.norm(dim=1, keepdim=True) + 1e-10), y / (y.norm(dim=1, keepdim=True) + 1e-10)
    if norm_type == "shared":
        length = y.norm(dim=1, keepdim=True) + 1e-6
        return x / length, y / length
    if norm_type == "own":
        own = [(f - f.mean(space, keepdim=True)) / (f.std(space, keepdim=True) + 1e-6) for f in (x, y)]
        return own[0], own[1]
    by, dims = {"channel": (x, space), "channel_detached": (x.detach(), space), "batch": (y, (0, *space))}[norm_type]
    mean, std = by.mean(dims, keepdim=True), by.std(dims, keepdim=True) + 1e-6
    return (x - mean) / std, (y - mean) / std


def lpl_of_features(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], strides: Sequence[float], norm_type: str, loss_type: str,
    pow_law: bool, remove_outliers: bool, insides: Sequence[Tensor] | None,
) -> Tensor:  # fmt: skip
    """L per sample, (B,), of feature maps (B, C, *space); insides: per map the caller's mask, part of m_l."""
    total = torch.zeros(len(predictions[0]), dtype=predictions[0].dtype, device=predictions[0].device)
    for i, (x, y, stride) in enumerate(zip(predictions, targets, strides, strict=True)):
        mask = torch.ones_like(y)
        if remove_outliers and stride <= 2:
            mask = inlier_mask(y, stride)
            y = y * mask
            x = x * mask if norm_type == "own" else x
        x, y = normalise(x, y, norm_type)
        distance = (x - y).square() if loss_type == "mse" else (x - y).abs()
        mask = mask if insides is None else mask * insides[i]
        counted = mask.flatten(2).sum(2)
        layer = torch.where(counted > 0, (distance * mask).flatten(2).sum(2) / counted.clamp_min(1e-30), 0).mean(1)
        total = total + layer * (stride / strides[0] if pow_law else 1.0)
    return total / len(predictions)


def textbook_lpl(
    vae: Any, pred_latents: Tensor, target_latents: Tensor, num_blocks: int = 4, norm_type: str = "own",
    loss_type: str = "mse", pow_law: bool = True, remove_outliers: bool = True, checkpointing: bool = False,
    inside: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """L per sample, (B,), differentiable in pred_latents; inside: the caller's mask, (B, 1, h, w), part of m_l."""
    with torch.no_grad():
        targets = decoder_features(vae, target_latents, num_blocks, False)
    predictions = decoder_features(vae, pred_latents, num_blocks, checkpointing)
    output_width = target_latents.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)
    cells = [y.shape[-1] // target_latents.shape[-1] for y in targets]  # each latent covers a square of cells
    insides = None if inside is None else [inside.repeat_interleave(n, 2).repeat_interleave(n, 3) for n in cells]
    strides = [output_width / y.shape[-1] for y in targets]
    return lpl_of_features(predictions, targets, strides, norm_type, loss_type, pow_law, remove_outliers, insides)
