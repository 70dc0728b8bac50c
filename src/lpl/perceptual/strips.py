"""Feature maps are processed in strips of rows: temporaries stay small and in cache.

A strip's arithmetic is float32 for half-precision maps. Functions take maps (B, C, H, W); all but `window` also take
maps with another number of axes of space, the first of which is called rows.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STRIP_BYTES = {"cpu": 2**23}
"""Bytes of a strip: small enough to stay in cache."""
STRIP_BYTES_ELSEWHERE = 2**24
"""The same on other devices: enough to keep them busy, little compared with a map of a 1024-pixel image."""


def space(x: Tensor) -> tuple[int, ...]:
    """The axes of space."""
    return tuple(range(2, x.dim()))


def cells(x: Tensor) -> int:
    """Values of a channel, H * W."""
    return math.prod(x.shape[2:])


def strip_bytes(x: Tensor) -> int:
    """Bytes of a strip on x's device."""
    return STRIP_BYTES.get(x.device.type, STRIP_BYTES_ELSEWHERE)


def spans(x: Tensor, channels: int | None = None) -> list[tuple[int, int]]:
    """The strips (first row, row after the last) of a map; channels: the widest of its temporaries, if not x itself.

    All but the last have an even number of rows.
    """
    batch, own, height, *width = x.shape
    rows = max(2, strip_bytes(x) // (x.element_size() * batch * max(own, channels or 0) * math.prod(width)) // 2 * 2)
    return [(first, min(first + rows, height)) for first in range(0, height, rows)]


Make = Callable[[int, int, Tensor | None], Tensor]
"""Makes rows first to last of a map, in the given tensor or in a new one."""


def assemble(strips: list[tuple[int, int]], shape: tuple[int, ...], like: Tensor, make: Make) -> Tensor:
    """The map (B, C, H, W) put together from strips, with the precision and layout of `like`."""
    if len(strips) == 1:
        return make(0, shape[2], None)
    out = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout(like))
    for first, last in strips:
        place = out[:, :, first:last]
        part = make(first, last, place)
        if part is not place:
            place.copy_(part)
    return out


def layout(x: Tensor) -> torch.memory_format:
    """channels_last or contiguous, whichever x has."""
    if x.dim() != 4:
        return torch.contiguous_format
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def window(x: Tensor, first: int, last: int, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Rows first to last of change(x), with zeros where they lie outside the map."""
    top, bottom = max(0, -first), max(0, last - x.shape[2])
    inside = x[:, :, first + top : last - bottom]
    if change is not None:
        inside = change(inside)
    return torch.nn.functional.pad(inside, (0, 0, top, bottom)) if top or bottom else inside


def arithmetic(x: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 map."""
    return torch.promote_types(x.dtype, torch.float32)


def channel_moments(x: Tensor, rows: Callable[[int, int], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations from it, per sample and channel over space: two of (B, C, 1, 1).

    Args:
        x: the map; only its shape matters where rows are given.
        rows: gives rows first to last of the map to use instead of x, in its arithmetic precision.
    """
    dtype = arithmetic(x)
    take = rows or (lambda first, last: x[:, :, first:last].to(dtype))
    sizes, means, squares = [], [], []
    for first, last in spans(x):
        part = take(first, last)
        sizes.append((last - first) / x.shape[2])
        means.append(part.mean(space(part), keepdim=True))
        squares.append((part - means[-1]).square_().sum(space(part), keepdim=True))
    if len(sizes) == 1:
        return means[0], squares[0]
    # Strips are combined through their own means, so that nothing cancels.
    share = torch.tensor(sizes, dtype=dtype).to(x.device, non_blocking=True).view(-1, *[1] * x.dim())
    each = torch.stack(means)
    mean = (share * each).sum(0)
    between = (share * (each - mean).square()).sum(0) * cells(x)
    return mean, torch.stack(squares).sum(0) + between


GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1 as one number: its highest byte has byte i as bit i."""


class Bits(NamedTuple):
    """A mask in an eighth of its bytes."""

    packed: Tensor
    """uint8, eight values each, in the order of the mask's memory."""
    shape: torch.Size
    layout: torch.memory_format

    @classmethod
    def of(cls, mask: Tensor) -> "Bits":
        """Of a mask (bool) with axes of samples, channels and space."""
        kept = layout(mask)
        flat = (mask.movedim(1, -1) if kept == torch.channels_last else mask).reshape(-1)
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8))
        return cls((flat.view(torch.int64) * GATHER).view(torch.uint8)[7::8].clone(), mask.shape, kept)

    def mask(self) -> Tensor:
        """The mask, as it was."""
        device = self.packed.device
        numbers, powers = torch.arange(256, device=device), 2 ** torch.arange(8, device=device)
        table = (numbers[:, None].div(powers, rounding_mode="floor") % 2).bool().view(torch.int64)
        flat = table.flatten().index_select(0, self.packed.int()).view(torch.bool)[: self.shape.numel()]
        if self.layout != torch.channels_last:
            return flat.view(self.shape)
        batch, channels, *sides = self.shape
        return flat.view(batch, *sides, channels).movedim(-1, 1)
