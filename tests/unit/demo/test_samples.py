"""The sheet of samples before and after: its note says where each picture is."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lpl.demo.run import ENLARGED, GAP, SEED, _cells
from lpl.training.validation_images import image_grid


def test_cells_are_where_the_pictures_are() -> None:
    pictures = [Image.fromarray(np.full((6, 8, 3), 20 * i + 5, dtype=np.uint8)) for i in range(9)]
    grid = image_grid(pictures, 3, GAP)
    grid = grid.resize((grid.width * ENLARGED, grid.height * ENLARGED), Image.Resampling.NEAREST)
    cells = _cells(["a", "b", "c"], 8, 6)
    assert [(c.kind, c.prompt, c.seed) for c in cells[:4]] == [
        ("real", "a", SEED), ("real", "b", SEED + 1), ("real", "c", SEED + 2), ("before", "a", SEED),
    ]  # fmt: skip
    assert [c.kind for c in cells[::3]] == ["real", "before", "after"]
    for i, cell in enumerate(cells):
        part = grid.crop(cell.box)
        assert part.size == (8 * ENLARGED, 6 * ENLARGED)
        assert np.unique(np.asarray(part)).tolist() == [20 * i + 5]
