"""How many bad files stop a run, and that the advice works."""

import re
from pathlib import Path

import pytest

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.bad_files import Bad, BadFiles


def judged(limit: float, bad: int, total: int, path: Path) -> str | None:
    files = BadFiles(limit, path)
    files.begin("--x", total)
    try:
        for number in range(total):
            files.count(str(number), f"{number}.png", "broken" if number < bad else None)
        files.settle("--x", [Bad(str(number), f"{number}.png", "broken") for number in range(bad)], total)
    except UserError as error:
        return str(error)
    return None


def test_a_few_stop_no_run_unless_none_may_be(tmp_path: Path) -> None:
    default = DataConfig().max_bad_fraction
    for total in (4, 20, 299):
        assert judged(default, 3, total, tmp_path / "bad") is None
        assert judged(0, 1, total, tmp_path / "bad") is not None
    assert judged(default, 4, 20, tmp_path / "bad") is not None
    assert judged(default, 4, 400, tmp_path / "bad") is None
    assert judged(0, 0, 0, tmp_path / "bad") is None


@pytest.mark.parametrize(("bad", "total"), [(29, 100), (4, 23), (5, 7), (7, 9), (11, 1000), (4, 399), (199, 200)])
def test_the_advice_works(tmp_path: Path, bad: int, total: int) -> None:
    told = judged(0.01, bad, total, tmp_path / "bad")
    assert told is not None
    assert f"{bad} of {total} images cannot be used" in told
    advised = re.search(r"--max_bad_fraction ([\d.]+)$", told)
    assert advised is not None
    assert judged(float(advised[1]), bad, total, tmp_path / "bad") is None
    assert float(advised[1]) < bad / total * 1.1 + 0.01


def test_where_none_is_sound_nothing_is_allowed(tmp_path: Path) -> None:
    told = judged(0.01, 5, 5, tmp_path / "bad")
    assert told is not None
    assert told.endswith("lists them: repair them")


def test_a_large_source_stops_early(tmp_path: Path) -> None:
    """When it is known that too many are bad, though not how many there will be."""
    files = BadFiles(0.01, tmp_path / "bad")
    files.begin("--x", 100_000)
    for number in range(2000):
        files.count(str(number), "x", None if number % 2 else "broken")
    with pytest.raises(UserError, match=r"1001 of the first 2001 .*the others are alike.*--max_bad_fraction 0\.51$"):
        files.count("2000", "x", "broken")
