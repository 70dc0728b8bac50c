"""The sweep through the decoder: forward from tap to tap, then backward with the gradients of the taps' distances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lpl.perceptual.convolution import Head, Operation, rows_of
from lpl.perceptual.distance import FeatureDistance, TargetStatistics, batch_scale
from lpl.perceptual.feature_maps import State, map_of, mask_at, with_map, zeros_like


class WithGradient(torch.autograd.Function):
    """values (B,) with dvalues_i/dx_i = gradient_i for x and gradient (B, C, h, w): one opaque operation for autograd.

    Only the gradient is kept for the backward pass. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output.view(-1, *[1] * (gradient.dim() - 1)) * gradient, None, None


class Segment:
    """From one tap to the next: the upsampling that makes the earlier tap's map, then operations up to the next one.

    A tap's map may be the output of an upsampling, four times the size of its input. What is passed from segment to
    segment (a "boundary") is that input: it is kept, and the map is computed again where it is needed. A state
    (feature_maps.py) is a map, or a map and what a stage carries along.

    Args:
        head: from the boundary to the tap's state.
        operations: from that state to the next boundary.
    """

    def __init__(self, head: Head, operations: Sequence[Operation]) -> None:
        self.head, self.operations = head, operations

    def open(self, boundary: State) -> State:
        """The earlier tap's state."""
        return self.head.forward(boundary, keep=False)[0]

    def run(self, x: State) -> State:
        """The next boundary, from the earlier tap's state; keeps nothing."""
        for operation in self.operations:
            x, _ = operation.forward(x, keep=False)
        return x

    def run_and_keep(self, boundary: State, checkpoint: str) -> tuple[State, list[Any]]:
        """The next boundary, and what `backward` needs.

        Args:
            checkpoint: "none" keeps what the operations need; "segment" keeps only the boundary and runs forward again
                in backward; "operation" keeps the input of every operation and runs one at a time again.
        """
        if checkpoint == "segment":
            return self.run(self.open(boundary)), [boundary]
        x = self.open(boundary)
        saved: list[Any] = [x] if checkpoint == "none" else []
        for operation in self.operations:
            if checkpoint == "operation":
                saved.append(x if saved else boundary)
                x, _ = operation.forward(x, keep=False)
            else:
                x, kept = operation.forward(x, keep=True)
                saved.append(kept)
        return x, saved

    def backward(self, saved: list[Any], grads: list[State], checkpoint: str) -> tuple[State, State]:
        """The state of the earlier tap, and the gradient with respect to it.

        Args:
            saved: from run_and_keep; emptied.
            grads: the gradient with respect to the next boundary, the only item of a list that is emptied, to free it
                early.
            checkpoint: as in run_and_keep.
        """
        grad, remaining = grads.pop(), self.operations
        if checkpoint == "operation":
            for operation in reversed(self.operations[1:]):
                kept = operation.forward(saved.pop(), keep=True)[1]
                grad = operation.backward(kept, grad)
            remaining = self.operations[:1]
        if checkpoint == "none":
            x = saved[0]
        else:
            x = self.open(saved.pop())
            saved, y = [x], x
            for operation in remaining:
                y, kept = operation.forward(y, keep=True)
                saved.append(kept)
            del y
        for operation in reversed(remaining):
            grad = operation.backward(saved.pop(), grad)
        saved.clear()
        return x, grad


class Crop(Operation):
    """A window of each sample's map.

    Args:
        side: height and width of the window in cells; a map that is smaller in one direction is kept whole there.
        windows: (B, 2) in [0, 1): place of each sample's window, from top left to bottom right, uniform over cells.
        size: height and width of the maps.
    """

    def __init__(self, side: int, windows: Tensor, size: Sequence[int]) -> None:
        self.size = size
        self.shape = [min(side, length) for length in size]
        self.corners = [
            [int(u * (length - part + 1)) for u, length, part in zip(pair, size, self.shape, strict=True)]
            for pair in windows.tolist()
        ]

    def cut(self, x: Tensor) -> Tensor:
        """The windows of x, (B, C, height, width of the window)."""
        height, width = self.shape
        parts = [x[i : i + 1, :, top : top + height, left : left + width] for i, (top, left) in enumerate(self.corners)]
        return torch.cat(parts)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        return self.cut(x), []

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        out = grad.new_zeros((*grad.shape[:2], *self.size))
        height, width = self.shape
        for i, (top, left) in enumerate(self.corners):
            out[i, :, top : top + height, left : left + width] = grad[i]
        return out


class Comparison(NamedTuple):
    """The result of a sweep."""

    distances: list[Tensor]
    """Per tap, (B,), or with frames (B * T,)."""
    statistics: list[TargetStatistics]
    gradient: Tensor | None
    """Gradient of sum over taps of weight * distance with respect to the prediction, (B, C, h, w), if asked for."""


Way = Sequence[Segment] | Callable[[Tensor], Sequence[State]]
"""Through the decoder: its segments, one more than there are taps (the last one's head makes the last tap's map), or a
function from raw latents to the maps of all taps, for autograd."""


class Target(NamedTuple):
    """The target's part of a comparison, per tap."""

    boundaries: list[State | None]
    """What the map is computed from again; for a function, the map."""
    statistics: list[TargetStatistics]
    insides: list[Tensor | None]
    """The caller's mask at the map's size."""


def see_target(
    way: Way,
    distances: Sequence[FeatureDistance],
    target: Tensor,
    masks: Sequence[Tensor | None],
    frames: bool = False,
) -> Target:
    """Sends the target through the decoder.

    Args:
        way: through the decoder.
        distances: one per tap.
        target: raw latents (B, C, h, w) in the decoder's precision.
        masks: per tap the caller's mask, (B, 1, h, w), or None.
        frames: maps (B, C, T, H, W) are compared frame by frame.
    """
    seen = Target([], [], [])

    def note(boundary: State, y: State, tap: int) -> None:
        features, mask = map_of(y, frames), masks[tap]
        seen.boundaries.append(boundary)
        seen.insides.append(None if mask is None else mask_at(mask, features, frames))
        seen.statistics.append(distances[tap].statistics(features, seen.insides[-1]))

    if callable(way):
        for tap, features in enumerate(way(target)):
            note(features, features, tap)
        return seen
    y: State = target
    for tap in range(len(distances)):
        boundary = way[tap].run(y)
        y = way[tap + 1].open(boundary)
        note(boundary, y, tap)
    return seen


def compare(
    way: Way,
    distances: Sequence[FeatureDistance],
    pred: Tensor,
    target: Tensor,
    masks: Sequence[Tensor | None],
    scales: Sequence[Tensor] | None,
    weights: Sequence[float] | None,
    checkpointing: bool,
    frames: bool = False,
) -> Comparison:
    """Compares prediction and target at every tap.

    Args:
        way, distances, target, masks, frames: as in see_target.
        pred: raw latents like target.
        scales: for norm `batch`, per tap the scale over the whole batch; None: these samples are the batch.
        weights: of the taps' distances in the gradient; None: no gradient.
        checkpointing: keep boundaries and recompute: a segment at a time, the last one (the largest, and the first to
            run backward) an operation at a time.
    """
    count = len(distances)
    boundaries, statistics, insides = see_target(way, distances, target, masks, frames)
    if scales is None and distances[0].norm_type == "batch":
        scales = [batch_scale([s]) for s in statistics]
    found: list[Tensor] = [torch.empty(0)] * count

    def measure(i: int, x: State, grad: Tensor | None) -> None:
        boundary, boundaries[i] = boundaries[i], None
        assert boundary is not None
        features = map_of(x, frames)
        if callable(way) or not isinstance(boundary, Tensor) or (frames and boundary.dim() == 5):
            rows = rows_of(map_of(boundary, frames))
        else:
            rows = way[i + 1].head.rows(boundary)
        found[i] = distances[i](
            features,
            rows,
            statistics[i],
            insides[i],
            None if scales is None else scales[i],
            0.0 if weights is None else weights[i] / (len(features) // len(pred)),
            grad,
        )

    if callable(way):
        with torch.set_grad_enabled(weights is not None):
            leaf = pred.detach().requires_grad_(weights is not None)
            maps = [map_of(x, frames) for x in way(leaf)]
        if weights is None:
            for i, features in enumerate(maps):
                measure(i, features, None)
            return Comparison(found, statistics, None)
        slopes = [torch.zeros_like(features) for features in maps]
        for i, features in enumerate(maps):
            measure(i, features.detach(), slopes[i])
        return Comparison(found, statistics, torch.autograd.grad(maps, leaf, slopes)[0])

    x: State = pred
    if weights is None:
        for i in range(count):
            x = way[i + 1].open(way[i].run(x))
            measure(i, x, None)
        return Comparison(found, statistics, None)

    checkpoints = ["segment" if checkpointing else "none"] * count
    if checkpointing:
        checkpoints[-1] = "operation"
    kept = []
    for segment, checkpoint in zip(way, checkpoints, strict=False):
        x, saved = segment.run_and_keep(x, checkpoint)
        kept.append(saved)
    states = [way[count].open(x)]
    del x
    grads = [zeros_like(states[0])]
    for i in reversed(range(count)):
        grad = map_of(grads[0], frames)
        measure(i, states.pop(), grad)
        grads[0] = with_map(grads[0], grad)
        del grad
        grads = [way[i + 1].head.backward([], grads.pop())]
        earlier, before = way[i].backward(kept.pop(), grads, checkpoints[i])
        states, grads = [earlier], [before]
        del earlier, before
    return Comparison(found, statistics, map_of(grads[0]))
