"""Files of the catalogue that are not what was written."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from lpl.data.catalogue import SCHEMA, Row, Samples, _read, table_of
from lpl.errors import UserError

ROWS = [
    Row(f"{i}.png", ["a fox", "snow"], "", f"n{i}", "s", b"d" * 32, 20, 20, None if i % 7 else "bad") for i in range(40)
]


def write(file: Path, table: pa.Table) -> bytes:
    with pa.ipc.new_file(file, SCHEMA) as out:
        out.write_table(table)
    return file.read_bytes()


def test_damage_is_named_and_does_not_end_the_process(tmp_path: Path) -> None:
    """Of 500 files with up to four bytes changed each is refused, or every row of it can be read."""
    file, refused = tmp_path / "a.arrow", 0
    content = write(file, table_of(ROWS))
    assert len(Samples([_read(file, SCHEMA)], [1.0], [""])) == 34
    for number in range(500):
        rng, changed = random.Random(number), bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        file.write_bytes(changed)
        try:
            samples = Samples([_read(file, SCHEMA)], [1.0], [""])
        except UserError:
            refused += 1
        else:
            assert all(samples[place].captions is not None for place in range(len(samples)))
            assert len(samples.digest()) == 32
    assert refused > 100


def test_a_row_without_what_every_row_has(tmp_path: Path) -> None:
    table = table_of(ROWS)
    write(tmp_path / "a.arrow", table.set_column(6, SCHEMA.field("width"), pa.nulls(len(ROWS), pa.int32())))
    with pytest.raises(UserError, match=r"a\.arrow is damaged \(width is missing\)"):
        _read(tmp_path / "a.arrow", SCHEMA)
