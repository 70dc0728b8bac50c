"""What tests of sources share: opening one, reading it through, and the one line of its fault."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.sources import Sample, Source, open_source


def source_of(**options: Any) -> Source:
    """With paths as options of the data."""
    texts = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return open_source(DataConfig(**texts), None)


def samples_of(source: Source) -> list[Sample]:
    return [sample for piece in source.pieces for sample in piece.samples()]


def fault_of(**options: Any) -> str:
    """The one line that opening or reading a source fails with."""
    with pytest.raises(UserError) as caught:
        samples_of(source_of(**options))
    text = str(caught.value)
    assert "\n" not in text
    return text


def png(value: int) -> bytes:
    """A red square of so many levels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()
