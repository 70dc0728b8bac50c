"""What the VAE alone loses, and whether LPL's walk through its decoder is `vae.decode`.

PSNR = 10 log10(4 / mean((x - y)^2)),    x the crop, y the decoded posterior mean clamped to it, both in [-1, 1]
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpl.analysis.check.images import Encoded
from lpl.data.contact_sheet import CELL, GREY, INK, LETTERS, Cell, compose, fit
from lpl.data.crops import to_float
from lpl.data.lettering import shorten
from lpl.perceptual.decoders import decoder_taps

AMPLIFIED = 4
"""How many times as large differences are shown."""
SHOWN = 4
"""Worst and typical images in the picture, half of each."""


class Reconstructions(NamedTuple):
    """The VAE's own of some pictures."""

    decoded: list[Tensor]
    """(3, H, W), float32, [-1, 1], on the CPU."""
    psnr: list[float]
    """In dB."""

    @property
    def typical(self) -> list[int]:
        """Numbers of the pictures, the nearest to the median PSNR first."""
        order = sorted(range(len(self.psnr)), key=self.psnr.__getitem__)
        middle = (len(order) - 1) // 2
        return sorted(order, key=lambda n: abs(order.index(n) - middle))


@torch.no_grad()
def walk_difference(vae: Any, raw_latents: Tensor) -> float:
    """The largest absolute difference between the walk of LPL's frozen operations to the end and `vae.decode`."""
    walk = decoder_taps(vae)
    segments = walk.segments(lambda function: function)
    x = raw_latents
    for segment, following in pairwise(segments):
        x = following.open(segment.run(x))
    return float((walk.finish(x) - vae.decode(raw_latents).sample).abs().max())


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
    """The worst and the typical pictures: the crop, what the VAE makes of it, and the difference, amplified."""
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
