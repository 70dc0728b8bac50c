"""The flags that users bring from the diffusers scripts, and the frozen list of all our own options."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lpl.base.errors import UserError
from lpl.config import TrainConfig
from lpl.config.command_line import parse_train

HERE = Path(__file__).parent
FLAGS: list[dict[str, Any]] = json.loads((HERE / "flags.json").read_text())
REFUSED = [flag for flag in FLAGS if "replaced_by" in flag]
ACCEPTED = [flag for flag in FLAGS if "replaced_by" not in flag]
# torchvision's name; Pillow, which resizes here, has no such filter.
REFUSED_CHOICES = {("image_interpolation_mode", "nearest_exact")}


def name_of(flag: dict[str, Any]) -> str:
    return flag["name"]


def message(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_train(list(argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_list_is_whole() -> None:
    assert len(FLAGS) == len({flag["name"] for flag in FLAGS}) == 72
    assert {script: sum(script in flag["in"] for flag in FLAGS) for script in "LTR"} == {"L": 68, "T": 59, "R": 55}
    assert len(REFUSED) == 4


@pytest.mark.parametrize("flag", ACCEPTED, ids=name_of)
def test_flag_is_taken_under_its_name(flag: dict[str, Any]) -> None:
    name = flag["name"]
    if flag["type"] == "flag":
        assert parse_train([f"--{name}"]).flat()[name] is True
        assert parse_train([f"--no_{name}"]).flat()[name] is False
        return
    values = flag.get("choices") or [flag["value"]]
    for value in values:
        if (name, value) in REFUSED_CHOICES:
            continue
        found = parse_train([f"--{name}", str(value)]).flat()[name]
        assert found == value
        assert type(found) is {"float": float, "int": int, "str": str}[flag["type"]]


@pytest.mark.parametrize("flag", REFUSED, ids=name_of)
def test_flag_is_refused_with_what_replaces_it(flag: dict[str, Any]) -> None:
    argv = [f"--{flag['name']}"] + (["0"] if flag["type"] == "int" else [])
    text = message(*argv)
    assert text.startswith(f"--{flag['name']} is not taken: ")
    assert flag["replaced_by"] in text


@pytest.mark.parametrize(("name", "choice"), sorted(REFUSED_CHOICES))
def test_refused_choice_lists_the_choices(name: str, choice: str) -> None:
    text = message(f"--{name}", choice)
    assert f"--{name}" in text
    assert repr(choice) in text
    for other in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"):
        assert other in text


def test_options_and_defaults_are_frozen() -> None:
    """A new option, or another default, is to be seen in review: add it to options.json and to CHANGELOG.md."""
    assert TrainConfig().flat() == json.loads((HERE / "options.json").read_text())


def test_hyphens_do_as_well_as_underscores() -> None:
    assert parse_train(["--max-train-steps", "3", "--no-use-lpl"]).flat() == (
        TrainConfig().flat() | {"max_train_steps": 3, "use_lpl": False}
    )


def test_last_of_repeated_flags_wins() -> None:
    assert parse_train(["--seed", "1", "--seed", "2"]).run.seed == 2


def test_nothing_heavy_is_imported_for_help_or_by_import_lpl() -> None:
    code = (
        "import sys\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'datasets', 'numpy', 'tensorboard'}\n"
        "import lpl\n"
        "assert not heavy & set(sys.modules), 'import lpl'\n"
        "assert 'tyro' not in sys.modules, 'import lpl'\n"
        "sys.argv = ['lpl', '--help']\n"
        "import runpy\n"
        "runpy.run_module('lpl', run_name='__main__')\n"
        "assert not heavy & set(sys.modules), 'lpl --help'\n"
        "from lpl.cli import main\n"
        "try:\n"
        "    main(['train', '--help'])\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "assert not heavy & set(sys.modules), 'lpl train --help'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: lpl" in done.stdout
