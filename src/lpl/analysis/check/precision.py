"""Each component in each precision: replayed calls and the advice that follows; and what the VAE loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lpl.analysis.check.images import Encoded
from lpl.data.contact_sheet import CELL, GREY, INK, LETTERS, Cell, compose, fit
from lpl.data.crops import to_float
from lpl.data.sheets import shorten
from lpl.perceptual.precision import FLOAT16_MAX
from lpl.perceptual.precision import compare as compare
from lpl.perceptual.precision import walk_difference as walk_difference

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""Arguments of calls of a module."""


@contextmanager
def recording(modules: Iterable[nn.Module], calls: dict[int, Calls], most: int) -> Iterator[None]:
    """Keeps the arguments of each module's first calls, by the module's number."""

    def keep(number: int, _module: nn.Module, args: Any, kwargs: Any) -> None:
        own = calls.setdefault(number, [])
        if len(own) < most:
            own.append((args, kwargs))

    with ExitStack() as stack:
        for number, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(partial(keep, number), with_kwargs=True).remove)
        yield


def replay(calls: Calls) -> Callable[[nn.Module, torch.dtype], list[Tensor]]:
    """Runs recorded calls again, in any precision; only the first tensor that a call returns counts."""
    calls = list(calls)  # a copy: running them may be recorded, too

    def cast(value: Any, dtype: torch.dtype) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def run(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        return [
            module(*(cast(value, dtype) for value in args), **{key: cast(v, dtype) for key, v in kwargs.items()})[0]
            for args, kwargs in calls
        ]

    return run


def warnings_of(components: dict[str, dict[str, Any]], mixed_precision: str, lpl_dtype: str) -> list[str]:
    """One line for each precision that is not finite: what to use, or not to use, because of it."""
    lines = []
    for component, by_dtype in components.items():
        for dtype, found in by_dtype.items():
            if found["finite"] is False:
                where = f" (first in {found['first_nonfinite']})" if found.get("first_nonfinite") else ""
                advice = _advice(component, dtype, by_dtype, mixed_precision, lpl_dtype)
                lines.append(f"{component} is not finite in {dtype}{where}: {advice}")
    for component, by_dtype in components.items():
        largest, half = by_dtype["float32"]["max_abs"], by_dtype["float16"]
        if half["finite"] is None and largest is not None and largest > FLOAT16_MAX:
            lines.append(
                f"{component} has activations of {largest:.3g}, above float16's {FLOAT16_MAX:.0f}: it will not be "
                "finite in float16 where there is one"
            )
    return lines


def _advice(component: str, dtype: str, by_dtype: dict[str, Any], mixed_precision: str, lpl_dtype: str) -> str:
    if dtype == "float32":
        kind = "vae_" * component.startswith("vae")
        return f"its weights are damaged, take others with --pretrained_{kind}model_name_or_path"
    better = "bfloat16" if by_dtype["bfloat16"]["finite"] and dtype != "bfloat16" else "float32"
    if component == "denoiser":
        short = {"bfloat16": "bf16", "float32": "no"}[better]
        now = ", which this run asks for" if mixed_precision == {"float16": "fp16", "bfloat16": "bf16"}[dtype] else ""
        return f"train with --mixed_precision {short}, not {dtype}{now}"
    if component == "vae_decoder":
        now = ", which this run asks for" if lpl_dtype == dtype else ""
        return f"keep --lpl_dtype {better}, not {dtype}{now}; programs that draw images must not run it in {dtype}"
    return f"lpl train runs it in float32; programs that draw images must not run it in {dtype}"


AMPLIFIED = 4
"""Factor by which differences are amplified in the picture."""
SHOWN = 4
"""Worst and typical images in the picture, half of each."""


class Reconstructions(NamedTuple):
    """The VAE's reconstructions of some pictures."""

    decoded: list[Tensor]
    """(3, H, W), float32, [-1, 1], on the CPU."""
    psnr: list[float]
    """In dB."""

    @property
    def typical(self) -> list[int]:
        """Numbers of the pictures, the one nearest to the median PSNR first."""
        order = sorted(range(len(self.psnr)), key=self.psnr.__getitem__)
        middle = (len(order) - 1) // 2
        return sorted(order, key=lambda n: abs(order.index(n) - middle))


@torch.no_grad()
def reconstruct(vae: Any, encoded: Encoded, device: torch.device) -> Reconstructions:
    """Decodes every picture's posterior mean."""
    decoded, psnr = [], []
    for picture, mean in zip(encoded.pictures, encoded.mean, strict=True):
        image = vae.decode(mean.to(device)).sample[0].clamp(-1, 1).cpu()
        decoded.append(image)
        square = float((image.double() - to_float(picture.pixels)).square().mean())
        psnr.append(10 * math.log10(4 / square) if square > 0 else math.inf)
    return Reconstructions(decoded, psnr)


def draw_losses(encoded: Encoded, found: Reconstructions) -> Image.Image:
    """The worst and the typical pictures: the crop, its reconstruction, and the amplified difference."""
    worst = sorted(range(len(encoded)), key=found.psnr.__getitem__)[: SHOWN // 2]
    typical = [n for n in found.typical if n not in worst][: SHOWN // 2]
    cells = []
    for kind, numbers in (("worst", worst), ("typical", typical)):
        for number in numbers:
            picture = encoded.pictures[number]
            original, decoded = to_float(picture.pixels), found.decoded[number]
            name = shorten(picture.id, CELL, LETTERS)
            cells += [
                Cell(fit(to_image(original)), [(f"{kind}: original", INK), (name, GREY)]),
                Cell(fit(to_image(decoded)), [(f"through the VAE: {found.psnr[number]:.1f} dB", INK)]),
                Cell(fit(to_image(AMPLIFIED * (decoded - original))), [(f"difference, {AMPLIFIED} times", INK)]),
            ]
    about = (
        f"{len(encoded)} crops encoded and decoded, nothing else: PSNR {np.mean(found.psnr):.1f} dB on average, "
        f"{min(found.psnr):.1f} dB at worst. No training of the denoiser can win this back. Grey is no difference."
    )
    return compose("What the VAE loses", about, cells, columns=6 if len(encoded) > 1 else 3)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], or beyond, as an image."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())
