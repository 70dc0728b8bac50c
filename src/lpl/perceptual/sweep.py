"""Two latents through the decoder, the distances at its taps, and the gradient: by hand, without autograd.

The target goes through first and leaves a boundary per tap (see segment.py) and a few statistics. The prediction
follows and keeps what its backward pass needs. From the last tap back, each step makes the target's map again from its
boundary, strip by strip, adds the tap's gradient, and runs backward to the tap before. So no two taps' maps of both
branches exist at a time, and each distance is computed once, together with its gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lpl.perceptual.distance import FeatureDistance, TargetStatistics, batch_scale
from lpl.perceptual.segment import Segment


class Comparison(NamedTuple):
    """What a sweep finds."""

    distances: list[Tensor]
    """Per tap, (B,)."""
    statistics: list[TargetStatistics]
    gradient: Tensor | None
    """Of sum over taps of weight * distance with respect to the prediction, (B, C, h, w); None where not asked for."""


def see_target(
    segments: Sequence[Segment], distances: Sequence[FeatureDistance], target: Tensor, insides: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[TargetStatistics]]:
    """The boundaries and statistics of the target's taps.

    Args:
        segments: one more than there are taps; the last one's head makes the last tap's map.
        distances: one per tap.
        target: raw latents (B, C, h, w) in the decoder's precision.
        insides: per tap the caller's mask, (B, 1, H, W), or None.
    """
    boundaries: list[Tensor | None] = []
    statistics = []
    y = target
    for segment, following, distance, inside in zip(segments, segments[1:], distances, insides, strict=False):
        boundary = segment.run(y)
        y = following.open(boundary)
        boundaries.append(boundary)
        statistics.append(distance.statistics(y, inside))
    return boundaries, statistics


def compare(
    segments: Sequence[Segment],
    distances: Sequence[FeatureDistance],
    pred: Tensor,
    target: Tensor,
    insides: Sequence[Tensor | None],
    scales: Sequence[Tensor] | None,
    weights: Sequence[float] | None,
    checkpointing: bool,
) -> Comparison:
    """Compares prediction and target at every tap.

    Args:
        segments, distances, target, insides: as in see_target.
        pred: raw latents like target.
        scales: for norm `batch`, per tap the scale over the whole batch; None: these samples are the batch.
        weights: of the taps' distances in the gradient; None: no gradient.
        checkpointing: keep boundaries and recompute: a segment at a time, the last one (the largest, and the first to
            run backward) an operation at a time.
    """
    count = len(distances)
    boundaries, statistics = see_target(segments, distances, target, insides)
    if scales is None and distances[0].norm_type == "batch":
        scales = [batch_scale([s]) for s in statistics]
    found: list[Tensor] = [torch.empty(0)] * count

    def measure(i: int, x: Tensor, grad: Tensor | None) -> None:
        boundary, boundaries[i] = boundaries[i], None
        assert boundary is not None
        found[i] = distances[i](
            x,
            segments[i + 1].head.rows(boundary),
            statistics[i],
            insides[i],
            None if scales is None else scales[i],
            0.0 if weights is None else weights[i],
            grad,
        )

    x = pred
    if weights is None:
        for i in range(count):
            x = segments[i + 1].open(segments[i].run(x))
            measure(i, x, None)
        return Comparison(found, statistics, None)

    ways = ["segment" if checkpointing else "none"] * count
    if checkpointing:
        ways[-1] = "operation"
    kept = []
    for segment, way in zip(segments, ways, strict=False):
        x, saved = segment.run_and_keep(x, way)
        kept.append(saved)
    maps = [segments[count].open(x)]
    del x
    grads = [torch.zeros_like(maps[0])]
    for i in reversed(range(count)):
        measure(i, maps.pop(), grads[0])
        grads = [segments[i + 1].head.backward([], grads.pop())]
        earlier, grad = segments[i].backward(kept.pop(), grads, ways[i])
        maps, grads = [earlier], [grad]
        del earlier, grad
    return Comparison(found, statistics, grads[0])
