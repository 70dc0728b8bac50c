"""Options counted in steps that a run never reaches are named, by default or given, one line each."""

import logging

import pytest

from lpl.config.command_line import parse_train
from lpl.training.checks import warn_of_steps
from lpl.training.preflight import preflight

EMA = ["--use_ema"]
PROMPT = ["--validation_prompt=x"]


def told(caplog: pytest.LogCaptureFixture, flags: list[str], steps: int) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lpl"):
        warn_of_steps(parse_train(flags), steps)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("flags", "acts_from", "named"),
    [
        (["--lr_scheduler=cosine"], 501, "--lr_warmup_steps 500 (the default): the run of 500 steps never leaves"),
        (["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=9"], 10, "--lr_warmup_steps 9: the run of 9 steps"),
        (["--optimizer=schedulefree_adamw", "--lr_warmup_steps=9"], 10, "--lr_warmup_steps 9: the run of 9 steps"),
        (
            ["--lr_scheduler=piecewise_constant", "--lr_step_rules=1:10,0.1:20,0.01"],
            21,
            "ends before what follows step 20",
        ),
        (["--lpl_start=9"], 10, "--lpl_start 9 is not reached in the run of 9 steps: LPL never acts"),
        (["--lpl_start=4", "--lpl_warmup_steps=5"], 10, "--lpl_warmup_steps 5: LPL's weight rises to step 9"),
        ([*EMA, "--ema_update_every=9"], 9, "--ema_update_every 9 is not reached in the run of 8 steps"),
        ([*EMA, "--ema_update_after_step=9"], 11, "--ema_update_after_step 9: the run of 10 steps has 10 updates"),
        ([*EMA, "--ema_update_after_step=9", "--ema_update_every=2"], 22, "the run of 21 steps has 10 updates"),
        ([*PROMPT, "--validation_steps=9"], 9, "--validation_steps 9 is not reached in the run of 8 steps"),
        (["--checkpointing_steps=9"], 9, "--checkpointing_steps 9 is not reached"),
        (["--save_steps=9"], 9, "--save_steps 9 is not reached"),
        (["--log_every=9"], 9, "--log_every 9 is not reached"),
    ],
)
def test_what_is_never_reached_is_named(
    caplog: pytest.LogCaptureFixture, flags: list[str], acts_from: int, named: str
) -> None:
    (line,) = told(caplog, flags, acts_from - 1)
    assert named in line
    assert "give" in line or "start earlier" in line
    assert told(caplog, flags, acts_from) == []


@pytest.mark.parametrize("flags", [[], EMA, PROMPT, ["--no_use_lpl", "--lpl_start=9"], ["--validation_steps=9"]])
def test_a_short_run_with_the_defaults_says_nothing(caplog: pytest.LogCaptureFixture, flags: list[str]) -> None:
    assert told(caplog, flags, 3) == []


@pytest.mark.parametrize("length", ["--max_train_steps=6", "--num_train_epochs=1"])
def test_the_checks_know_the_length(model, data, tmp_path, caplog, length: str) -> None:
    base = [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={data}", f"--output_dir={tmp_path / 'out'}"]
    with caplog.at_level(logging.WARNING, "lpl"):
        preflight(parse_train([*base, length, "--lr_scheduler=linear", "--dry_run"]))
    (record,) = caplog.records
    assert "the run of 6 steps never leaves the warm-up, and the learning rate reaches 1%" in record.getMessage()


def test_a_schedule_of_constants_has_no_warm_up(model, data, tmp_path, caplog) -> None:
    flags = ["--lr_scheduler=piecewise_constant", "--lr_step_rules=1:10,0.1", "--lr_warmup_steps=5"]
    base = [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={data}", f"--output_dir={tmp_path / 'out'}"]
    with caplog.at_level(logging.WARNING, "lpl"):
        preflight(parse_train(base + flags))
    assert "--lr_warmup_steps has no effect without a schedule with warm-up" in caplog.text
