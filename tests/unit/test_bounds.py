"""Bounds of options, declared beside the fields: one line, whatever the number or the name."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import pytest

from lpl.base.errors import UserError
from lpl.config import TrainConfig
from lpl.config.checks import MOST, facts_of
from lpl.config.command_line import parse_train
from lpl.config.commands import VerifyConfig


def test_a_resolution_of_a_hundred_million_is_refused_at_once(run_cli: Any) -> None:
    started = time.monotonic()
    code, _, err = run_cli(["train", "--resolution=100000000", "--dry_run"])
    assert (code, err) == (2, "error: --resolution must lie in 8..4096, not 100000000\n")
    assert time.monotonic() - started < 10


def test_every_number_has_a_bound() -> None:
    """Of every option that takes whole numbers, what is far beyond its bound is refused by name."""
    tried = 0
    for group in TrainConfig().groups():
        for declared, facts in zip(fields(group), facts_of(group).values(), strict=True):
            if "int" in str(declared.type):
                tried += 1
                beyond = (facts.most or MOST) + 1
                for value in (beyond, 10**400):
                    with pytest.raises(UserError, match=f"--{declared.name} "):
                        type(group)(**{declared.name: value})
    assert tried > 30


def test_names_that_no_file_can_have() -> None:
    tried = 0
    for group in (*TrainConfig().groups(), VerifyConfig()):
        for name, facts in facts_of(group).items():
            if facts.path:
                tried += 1
                for given in ("n" * 256, "a/" + "ü" * 130, "a/" * 2100):
                    with pytest.raises(UserError, match=f"--{name} .*too many for a file's name"):
                        type(group)(**{name: given})
    assert tried > 12


def test_texts_that_are_none(tmp_path: Any) -> None:
    for written, told in (('"a\\ud800"', "ud800"), ('"a\\0"', "u0000")):
        (tmp_path / "a.yaml").write_text(f"caption_prefix: {written}\n")
        with pytest.raises(UserError, match=told):
            parse_train(["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "too deep"),
        ("a: &x [1]\nb: *x\n", r"line 2: an alias \(\*\): write the value itself"),
        ('seed: "\\UFFFFFFFF"\n', "not YAML"),
    ],
)
def test_yaml_that_is_none_of_a_config(tmp_path: Any, text: str, told: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        parse_train(["--config", str(tmp_path / "a.yaml")])
    with pytest.raises(UserError, match="too many for a file's name"):
        parse_train(["--config", "n" * 256])
