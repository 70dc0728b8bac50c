"""Heat maps: what LPL compares at each layer, where it finds differences, and what it masks as outliers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpl.analysis.check.precision import to_image
from lpl.data.contact_sheet import GREY, INK, Cell, compose, fit
from lpl.perceptual.distance import FeatureDistance, batch_scale
from lpl.perceptual.feature_maps import map_of
from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.perceptual.strips import arithmetic, channel_moments, spans

ANCHORS = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
    (110, 206, 88), (181, 222, 43), (253, 231, 37),
)  # fmt: skip
"""Dark to bright, perceptually uniform, also for red-green colour blindness: ten colours of matplotlib's viridis."""


class LayerMaps(NamedTuple):
    """The maps of one picture at one tap; (H, W), float32, on the CPU."""

    tap: str
    stride: float
    target: Tensor
    """Length over channels of the target's features; `prediction` likewise."""
    prediction: Tensor
    distance: Tensor
    """What each location adds to the tap's distance."""
    outliers: Tensor
    """Share of the channels in which the target is masked as an outlier."""


@torch.no_grad()
def layer_maps(loss_fn: LatentPerceptualLoss, pred: Tensor, target: Tensor) -> list[LayerMaps]:
    """Walks one prediction and its target (1, C, h, w), model space, through the decoder.

    A map of distances sums up to the loss's distance of the pair at that tap, without a mask.
    """
    space, wide, dtype = loss_fn.latent_space, loss_fn.arithmetic, loss_fn.dtype
    x, y = (space.to_raw(latents.to(wide)).to(dtype) for latents in (pred, target))
    segments, found = loss_fn.segments, list[LayerMaps]()
    for segment, following, tap, rule in zip(segments, segments[1:], loss_fn.taps, loss_fn.distances, strict=False):
        x, y = (map_of(following.open(segment.run(latents))) for latents in (x, y))
        outliers, distance = _compare(rule, x, y)
        lengths = (torch.linalg.vector_norm(features, dim=1, dtype=wide)[0] for features in (y, x))
        target_map, pred_map, distance, outliers = (m.float().cpu() for m in (*lengths, distance, outliers))
        found.append(LayerMaps(tap.name, tap.stride, target_map, pred_map, distance, outliers))
    return found


def _compare(rule: FeatureDistance, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Share of masked channels, and distance, at each location (H, W)."""
    statistics = rule.statistics(y, None)
    strips, every = spans(y), torch.ones_like(y, dtype=torch.bool)
    masks = [every[:, :, first:last] if (mask := statistics.mask(first)) is None else mask for first, last in strips]
    inliers = torch.cat(masks, 2)
    scale = None
    if rule.norm_type == "batch":
        scale = batch_scale([statistics])
    elif rule.norm_type == "own":
        x, y = (_standardised(features, inliers) for features in (x, y))
        scale = torch.ones(1, x.shape[1], 1, 1).to(x)
    elif rule.norm_type.startswith("channel"):
        scale = 1 / (_deviation(channel_moments(x)[1], x) + 1e-6)
    share = torch.where(statistics.counted > 0, 1 / statistics.counted, 0) / x.shape[1]
    rows = []
    for first, last in spans(x):
        part = slice(first, last)
        mask = inliers[:, :, part].to(share)
        # Each location is a separate sample, since the rule sums over space.
        values = [
            v[0].flatten(1).T[..., None, None]  # (1, C, H, W) to (H * W, C, 1, 1)
            for v in (x[:, :, part].to(share), y[:, :, part].to(share) * mask, share * mask)
        ]
        error, _ = rule.error(*values, scale, rule.norm_type, rule.loss_type, False)
        rows.append(error.sum((1, 2, 3)).view(last - first, -1))
    return 1 - inliers[0].to(share).mean(0), torch.cat(rows)


def _standardised(features: Tensor, inliers: Tensor) -> Tensor:
    """A map without its masked values, by its own mean and deviation of each channel."""
    masked = features.to(arithmetic(features)) * inliers
    mean, squares = channel_moments(masked)
    return (masked - mean) / (_deviation(squares, masked) + 1e-6)


def _deviation(squares: Tensor, features: Tensor) -> Tensor:
    return (squares / (features.shape[2] * features.shape[3] - 1)).sqrt()


def draw_maps(maps: LayerMaps, timestep: int, name: str) -> Image.Image:
    """One layer's maps side by side; target and prediction share a scale."""
    top = float(torch.quantile(_few(maps.target), 0.99)) or 1.0
    most = float(torch.quantile(_few(maps.distance), 0.99)) or 1.0
    masked, densest = float(maps.outliers.mean()), float(maps.outliers.max())
    outliers = f"{masked:.2%} of the values" + (f"; bright: {densest:.0%} of channels" if masked else "")
    cells = [
        Cell(fit(heat(maps.target, top)), [("target", INK), ("length of the features", GREY)]),
        Cell(fit(heat(maps.prediction, top)), [("prediction", INK), (f"the same scale, 0 to {top:.3g}", GREY)]),
        Cell(fit(heat(maps.distance, most)), [("distance", INK), (f"{float(maps.distance.sum()):.3g} in all", GREY)]),
        Cell(fit(heat(maps.outliers, densest or 1.0)), [("masked as outliers", INK), (outliers, GREY)]),
    ]
    size = tuple(maps.target.shape)
    about = f"{name} at t = {timestep}; {size[0]} x {size[1]} cells, one for {maps.stride} x {maps.stride} pixels."
    return compose(f"LPL at {maps.tap}", about, cells)


def draw_estimates(images: list[tuple[str, Tensor]], name: str) -> Image.Image:
    """Decoded images, (3, H, W) in [-1, 1], with their labels."""
    cells = [Cell(fit(to_image(pixels)), [(label, INK)]) for label, pixels in images]
    about = (
        f"{name}: what the model's output at each timestep t implies for the clean image, decoded; LPL compares these."
    )
    return compose("Estimates of the clean image", about, cells)


def heat(values: Tensor, top: float) -> Image.Image:
    """Draws (H, W), 0 to top, from dark to bright."""
    scaled = (values / top).nan_to_num(0).clamp(0, 1).numpy() * (len(ANCHORS) - 1)
    colors = np.array(ANCHORS, dtype=np.float64)
    channels = [np.interp(scaled, range(len(ANCHORS)), colors[:, i]) for i in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def _few(values: Tensor) -> Tensor:
    """As many of the values as torch.quantile can take."""
    flat = values.flatten().nan_to_num(0)
    return flat[:: max(1, len(flat) // 2**20)]
