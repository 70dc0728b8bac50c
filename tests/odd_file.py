"""One odd image file and what to make of it, and the arithmetic of what is to be seen."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

BACKGROUND = (10, 200, 60)
"""What the pixels expected here lie on."""


@dataclass(frozen=True)
class Odd:
    """An image file and what to make of it: its pixels (H, W, 3), or a pattern of the reason why there are none."""

    name: str
    data: bytes
    pixels: np.ndarray | None = None
    tolerance: float = 0.5
    word: str | None = None


def noise(seed: int, *shape: int, top: int = 255) -> np.ndarray:
    """Random whole numbers from 0 to `top`."""
    return np.random.default_rng(seed).integers(0, top + 1, shape)


def saved(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """Written by Pillow: for the plain cases of a format, RGB or grey."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8))).save(buffer, kind, **options)
    return buffer.getvalue()


def grey(levels: np.ndarray) -> np.ndarray:
    """(H, W) to (H, W, 3)."""
    return np.repeat(np.asarray(levels, float)[..., None], 3, -1)


def over(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colour (H, W, 3) with opacity 0..1 (H, W) on the background."""
    return color * alpha[..., None] + np.array(BACKGROUND) * (1 - alpha[..., None])


def from_inks(cmyk: np.ndarray) -> np.ndarray:
    """Plain CMYK, 0..255 of ink."""
    return (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255


def quarters() -> np.ndarray:
    """Red, green, blue and white quarters, 32 x 16: survives any codec."""
    image = np.zeros((16, 32, 3), np.uint8)
    image[:8, :16], image[:8, 16:], image[8:, :16], image[8:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), image[8:]
    image[8:, 16:] = 255
    return image
