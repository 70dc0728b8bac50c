"""Progress bars for what may take long: nothing shows before two seconds, nothing stays."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from lpl.base.terminal import one_line

QUIET = 2.0
"""Seconds before a bar shows."""


def progress(
    items: Iterable[Any] | None = None, *, desc: str, unit: str = "it", total: int | None = None, show: bool = True
) -> Any:
    """A tqdm bar over items, or of so many in all, on stderr."""
    return tqdm(
        items, desc=one_line(desc), unit=unit, total=total, delay=QUIET, leave=False, disable=not show, file=sys.stderr
    )
