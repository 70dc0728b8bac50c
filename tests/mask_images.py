"""What the tests of masks share."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image


def blobs(seed: int, width: int, height: int) -> Image.Image:
    """Black and white, smooth enough to survive resizing, unlike its mirror image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).point(lambda v: 255 * (v > 127))


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def messages(caplog: pytest.LogCaptureFixture) -> str:
    text = "\n".join(record.getMessage() for record in caplog.records)
    caplog.clear()
    return text
