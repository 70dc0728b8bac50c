"""Files of the catalogue that are not what was written."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lpl.base.errors import DamagedCacheError
from lpl.data.catalogue import Catalogue, Row

ROWS = [
    Row(f"{i}.png", ["a fox", "snow"], "", f"n{i}", "s", b"d" * 32, 20, 20, None if i % 7 else "bad") for i in range(40)
]


def test_damage_is_named_and_does_not_end_the_process(tmp_path: Path) -> None:
    """Of 500 files with up to four bytes changed each is refused."""
    source: Any = SimpleNamespace(identity="folder x text")
    piece: Any = SimpleNamespace(key="0", stamp="s")
    catalogue = Catalogue(tmp_path, source)
    catalogue.write(piece, ROWS)
    file = catalogue.path(piece)
    content, whole = file.read_bytes(), catalogue.find(piece)
    assert whole is not None
    assert whole.column("id").to_pylist() == [row.id for row in ROWS]
    for number in range(500):
        rng, changed = random.Random(number), bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] ^= rng.randint(1, 255)
        file.write_bytes(changed)
        with pytest.raises(DamagedCacheError, match=rf"{file.name} is damaged"):
            catalogue.find(piece)
