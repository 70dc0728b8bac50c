"""All that is wrong with a command line is said at once, a line each, and nothing that only follows from the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lpl.base.errors import Faults, UserError, all_faults, require
from lpl.config import TrainConfig
from lpl.config.command_line import parse_options, parse_train
from lpl.config.commands import CompareConfig, PlanConfig, ReportConfig


def faults(command: Any, *argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_options(command, list(argv), "lpl")
    return list(caught.value.args)


def test_unknown_refused_malformed_and_out_of_range_together(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("sede: 3\nlocal_rank: 1\n")
    with pytest.raises(UserError) as caught:
        parse_train(
            [
                *("--lr", "3", "--network_args", "x", "--rank", "abc", "--seed=x", "--resolution", "3", "--snr_gamma"),
                *("5", "--loss_weighting", "p2", "--max_minutes=-1", f"--config={tmp_path / 'a.yaml'}"),
            ]
        )
    told = caught.value.args
    beginnings = (
        "unknown option --lr: here it is --learning_rate", "--network_args is not taken", "--config ", "--config ",
        "--rank: expected a whole number, not 'abc'", "--resolution must lie in 8..4096, not 3",
        "--snr_gamma 5.0 and --loss_weighting p2 are two", "--seed: expected a whole number, not 'x'",
        "--max_minutes must be positive, not -1",
    )  # fmt: skip
    assert len(told) == len(beginnings)
    assert all(any(line.startswith(beginning) for line in told) for beginning in beginnings)


def test_what_follows_from_a_flag_that_was_left_out_is_no_fault() -> None:
    assert len(faults(CompareConfig, "--arms=a", "--validation_samples=x", "--seeds", "0", "0")) == 2
    (told,) = faults(ReportConfig, "--max_megabytes", "a", "run")
    assert told.startswith("--max_megabytes: expected a number, not 'a'")


def test_what_a_malformed_value_should_have_been() -> None:
    assert set(faults(TrainConfig, "--lpl_weight", "heavy", "--seed")) == {
        "--lpl_weight: expected a number or auto, not 'heavy'",
        "--seed: expected a whole number, not nothing",
    }
    assert faults(TrainConfig, "--mixed_precision=fp8") == ["--mixed_precision: expected no, fp16 or bf16, not 'fp8'"]


def test_options_of_a_command_and_of_the_run_together() -> None:
    assert faults(PlanConfig, "--memory=x", "--rank=0") == [
        "--rank must lie in 1..65536, not 0",
        "--memory x: expected a size such as 24GiB, 24GB or 24 (GiB)",
    ]


def test_model_and_data_that_are_missing_are_told_together(run_cli: Any, tmp_path: Path) -> None:
    argv = [
        f"--{name}={tmp_path / name}"
        for name in ("pretrained_model_name_or_path", "train_data_dir", "validation_prompts")
    ]
    code, _, err = run_cli(["train", *argv, "--fused_backward_pass", "--gradient_accumulation_steps=2"])
    lines = err.splitlines()
    assert code == 2
    assert all(line.startswith("error: --") for line in lines)
    assert [line.split()[1] for line in lines] == [
        "--fused_backward_pass",
        "--fused_backward_pass",
        "--pretrained_model_name_or_path",
        "--train_data_dir",
        "--validation_prompts",
    ]


def test_require_gathers_within_and_raises_without() -> None:
    def check() -> None:
        require(False, "one")
        require(True, "none")
        require(False, "two")
        raise UserError("three")

    with pytest.raises(UserError) as caught, all_faults():
        check()
    assert caught.value.args == ("one", "two", "three")
    assert str(caught.value) == "one; two; three"
    with pytest.raises(UserError, match=r"^alone$"):
        require(False, "alone")
    gathered = Faults()
    gathered.raise_any()
    with gathered.one():
        raise UserError("a", "b")
    with pytest.raises(UserError, match=r"^a; b$"):
        gathered.raise_any()
