"""Runs the notebooks of examples/ and stores what they show: `python tools/notebooks.py [NAME ...]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
LONGEST_CELL_S = 3600


def run(file: Path, folder: Path) -> Any:
    """The notebook with its outputs, run in a folder; without libraries' stderr, times and Python's version.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbclient
    import nbformat

    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(notebook, timeout=LONGEST_CELL_S, resources={"metadata": {"path": folder}}).execute()
    notebook.metadata.language_info.pop("version")
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined([output for output in cell.outputs if output.get("name") != "stderr"])
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # pictures are there as PNG, too
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs, with consecutive printed lines joined."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


if __name__ == "__main__":
    import nbformat

    for path in sorted(EXAMPLES.glob("*.ipynb")):
        if path.stem in sys.argv[1:] or len(sys.argv) == 1:
            with tempfile.TemporaryDirectory() as scratch:
                nbformat.write(run(path, Path(scratch)), path)
            print(path)
