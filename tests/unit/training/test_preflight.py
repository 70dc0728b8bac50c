"""Options that cannot act in a run, or that it never reaches, are named once, before anything loads; others are not."""

import logging

import pytest

from lpl.config.command_line import parse_train
from lpl.training.checks import warn_of_steps
from lpl.training.preflight import preflight

EMA = ["--use_ema"]
PROMPT = ["--validation_prompt=x"]


@pytest.fixture
def checks(model, data, tmp_path, caplog):
    """Checks a run of these flags; returns what was found, and what was said."""

    def check(flags):
        base = [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={data}", f"--output_dir={tmp_path}/out"]
        with caplog.at_level(logging.WARNING, "lpl"):
            checked = preflight(parse_train(base + flags))
        return checked, [record.getMessage() for record in caplog.records]

    return check


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--ema_decay=0.5"], "--ema_decay has no effect without --use_ema"),
        (["--lr_warmup_steps=10"], "--lr_warmup_steps has no effect without a schedule with warm-up"),
        (["--ema_warmup"], "--ema_warmup has no effect without --use_ema"),
        (["--use_ema", "--ema_power=0.75"], "--ema_power has no effect without --ema_warmup"),
        (
            ["--optimizer=adafactor", "--adam_beta1=0.8"],
            "--adam_beta1 has no effect without --optimizer",
        ),
        (
            ["--optimizer=torch.optim.SGD", "--adam_weight_decay=0.1"],
            "--adam_weight_decay has no effect without an --opt",
        ),
        (
            ["--num_validation_images=2"],
            "--num_validation_images has no effect without --validation_prompt or --validation_prompts",
        ),
        (["--timestep_bias_portion=0.5"], "--timestep_bias_portion has no effect"),
        (["--unmasked_weight=0.1"], "--unmasked_weight has no effect without --masked_loss"),
        (["--mask_dir=x"], "--mask_dir has no effect without --masked_loss files and --train_data_dir"),
        (["--masked_loss=alpha", "--mask_dir=x"], "--mask_dir has no effect without --masked_loss files"),
        (["--masked_loss=alpha", "--mask_column=x"], "--mask_column has no effect without --masked_loss files"),
        (["--max_skips=3"], "--max_skips has no effect without --on_nonfinite skip"),
        (["--hub_model_id=a/b"], "--hub_model_id has no effect without --push_to_hub"),
        (["--no_use_lpl", "--lpl_num_blocks=2"], "without LPL these have no effect: --lpl_num_blocks"),
    ],
)
def test_idle_options_are_named(checks, flags, named):
    _, (line,) = checks(flags)
    assert named in line


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--optimizer=schedulefree_adamw", "--lr_warmup_steps=5"],
        ["--use_ema", "--ema_warmup", "--ema_power=0.75"],
        ["--use_ema", "--ema_decay=0.5"],
        ["--lr_warmup_steps=0"],
        ["--masked_loss=alpha", "--unmasked_weight=0.1"],
        ["--lr_scheduler=cosine", "--lr_warmup_steps=10"],
    ],
)
def test_options_that_act_are_not_named(checks, flags):
    checked, said = checks(flags)
    assert not said
    assert checked.config.data.resolution == 16


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
def test_the_checks_know_the_length(checks, length: str) -> None:
    _, (line,) = checks([length, "--lr_scheduler=linear", "--dry_run"])
    assert "the run of 6 steps never leaves the warm-up, and the learning rate reaches 1%" in line


def test_a_schedule_of_constants_has_no_warm_up(checks) -> None:
    _, said = checks(["--lr_scheduler=piecewise_constant", "--lr_step_rules=1:10,0.1", "--lr_warmup_steps=5"])
    assert any("--lr_warmup_steps has no effect without a schedule with warm-up" in line for line in said)
