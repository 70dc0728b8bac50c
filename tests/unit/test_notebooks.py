"""The notebooks of examples/ run from the first cell to the last, and show what is stored in them."""

from pathlib import Path

import pytest
from notebooks import EXAMPLES, run

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the extra `docs` is not installed")
    stored, made = nbformat.read(file, as_version=4), run(file, tmp_path)
    for before, after in zip(stored.cells, made.cells, strict=True):
        kinds = [[output.output_type for output in cell.get("outputs", ())] for cell in (before, after)]
        assert kinds[0] == kinds[1], after.source
