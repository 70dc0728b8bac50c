"""Exports of the demo: whole or not at all, and over nothing but an earlier export."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lpl.base.locks import alone_in
from lpl.base.output_folder import OutputFolder

STAGED = ".lpl-export"


@contextmanager
def replacing(folder: str | Path, flag: str) -> Iterator[Path]:
    """Gives a folder to write into, whose content then takes the place of the export before it.

    Raises:
        UserError: something else has one of the names, and is left as it is.
    """
    with alone_in(Path(folder), flag):
        staged = Path(folder) / STAGED
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            yield staged
            OutputFolder(folder, "lpl demo", flag=flag).put({path.name: path for path in sorted(staged.iterdir())})
        finally:
            shutil.rmtree(staged, ignore_errors=True)
