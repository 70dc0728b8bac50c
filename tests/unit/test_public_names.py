"""docs/api.md is what the public names say; every public name is documented, importable and lazily so."""

import subprocess
import sys
from pathlib import Path

import pytest

import lpl

ROOT = Path(__file__).parents[2]
NAMES = [name for name in lpl.__all__ if not name.startswith("__")]


def test_the_page_has_every_public_name_as_it_is(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from api_page import PAGE, page

    text = PAGE.read_text(encoding="utf-8")
    assert [line.removeprefix("## ") for line in text.split("\n") if line.startswith("## ")] == NAMES
    assert text == page(), "run: make api"


@pytest.mark.parametrize("name", NAMES)
def test_public_names_say_what_they_are(name):
    assert getattr(lpl, name).__doc__.strip()
    assert set(lpl._PUBLIC) == set(NAMES)
    assert dir(lpl) == sorted(lpl.__all__)


def test_types_are_shipped():
    assert (Path(lpl.__file__).parent / "py.typed").is_file()


def test_the_import_alone_loads_no_torch():
    code = "import sys, lpl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
