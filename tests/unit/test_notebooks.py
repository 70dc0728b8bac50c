"""The notebooks of examples/ run from the first cell to the last, and show what is stored in them."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


@pytest.mark.slow  # a minute or more each
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    stored, run = (nbformat.read(file, as_version=4) for _ in range(2))
    nbclient.NotebookClient(run, timeout=1800, resources={"metadata": {"path": tmp_path}}).execute()
    for before, after in zip(stored.cells, run.cells, strict=True):
        kinds = [[output.output_type for output in cell.get("outputs", ())] for cell in (before, after)]
        assert kinds[0] == kinds[1], after.source
