"""A module in each precision: is it finite, how large, how far from float32; and LPL's walk against vae.decode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lpl.base.errors import on_one_line
from lpl.perceptual.decoders import decoder_taps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT16_MAX = torch.finfo(torch.float16).max


@contextmanager
def watching(module: nn.Module, found: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Notes the largest absolute value of every output of a module's parts, by the part's name."""

    def look(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            found.append((name, output.detach().abs().amax().float()))

    with ExitStack() as stack:
        for name, part in module.named_modules():
            stack.callback(part.register_forward_hook(partial(look, name)).remove)
        yield


@torch.no_grad()
def compare(
    module: nn.Module,
    run: Callable[[nn.Module, torch.dtype], list[Tensor]],
    cast: bool = True,
    only: tuple[torch.dtype, str] | None = None,
) -> dict[str, Any]:
    """A module in every precision.

    Args:
        module: in eval mode; left as it is.
        run: runs the module in a precision; returns its outputs.
        cast: whether run gets a copy with weights in that precision.
        only: the one precision that it can be run in, and why; if that is not float32, no error is known.
    """
    found: dict[str, Any] = {}
    reference: list[Tensor] | None = None
    for name, dtype in DTYPES.items():
        if only is not None and dtype != only[0]:
            found[name] = _entry(None, None, None, note=only[1])
            continue
        own = nn.Module.to(copy.deepcopy(module), dtype) if cast and dtype != torch.float32 else module
        largest: list[tuple[str, Tensor]] = []
        try:
            with watching(own, largest):
                outputs = [output.float().cpu() for output in run(own, dtype)]
        except RuntimeError as fault:
            if dtype == torch.float32 or "not implemented" not in str(fault):
                raise
            found[name] = _entry(None, None, None, note=f"not on this device: {on_one_line(fault, 100)}")
            continue
        values = torch.stack([value for _, value in largest]).cpu() if largest else torch.zeros(1)
        first = next((part for (part, _), value in zip(largest, values, strict=False) if not value.isfinite()), None)
        finite = first is None and all(bool(output.isfinite().all()) for output in outputs)
        if dtype == torch.float32:
            reference = outputs
        error = None if reference is None else _distance(outputs, reference)
        found[name] = _entry(finite, float(values.max()), error, first_nonfinite=first)
    return found


def _entry(finite: bool | None, max_abs: float | None, error: float | None, **more: str | None) -> dict[str, Any]:
    entry = {"finite": finite, "max_abs": max_abs, "relative_error": error}
    return entry | {key: value for key, value in more.items() if value is not None}


def _distance(outputs: list[Tensor], reference: list[Tensor]) -> float:
    wide = torch.float32 if reference[0].device.type == "mps" else torch.float64  # MPS has no float64
    square = sum(float((y.to(wide) - y32.to(wide)).square().sum()) for y, y32 in zip(outputs, reference, strict=True))
    of = sum(float(y32.to(wide).square().sum()) for y32 in reference)
    return math.sqrt(square / of) if of > 0 else math.sqrt(square)


@torch.no_grad()
def walk_difference(vae: Any, raw_latents: Tensor) -> float:
    """The largest absolute difference between the walk of LPL's frozen operations to the end and `vae.decode`."""
    walk = decoder_taps(vae)
    if walk.frames and raw_latents.dim() == 5:
        segments = walk.plain_segments()
    else:
        segments = walk.segments(lambda function: function)
    x: Any = raw_latents
    for segment, following in pairwise(segments):
        x = following.open(segment.run(x))
    whole = raw_latents.unsqueeze(2) if walk.frames and raw_latents.dim() == 4 else raw_latents
    return float((walk.finish(x) - vae.decode(whole).sample).abs().max())
