"""Options that cannot act in a run are named once, before anything loads; those that can are not."""

import logging

import pytest

from lpl.config.command_line import parse_train
from lpl.training.preflight import preflight


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
def test_idle_options_are_named(model, data, tmp_path, caplog, flags, named):
    base = [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={data}", f"--output_dir={tmp_path / 'out'}"]
    with caplog.at_level(logging.WARNING, "lpl"):
        preflight(parse_train(base + flags))
    assert sum(named in record.getMessage() for record in caplog.records) == 1
    assert len(caplog.records) == 1


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
def test_options_that_act_are_not_named(model, data, tmp_path, caplog, flags):
    base = [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={data}", f"--output_dir={tmp_path / 'out'}"]
    with caplog.at_level(logging.WARNING, "lpl"):
        checked = preflight(parse_train(base + flags))
    assert not caplog.records
    assert checked.config.data.resolution == 16
