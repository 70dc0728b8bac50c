"""What is declared beside the options: the lists that are derived from it, the page, and what other trainers say."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from lpl.base.errors import UserError
from lpl.config import DataConfig, TrainConfig, declared, idle_options
from lpl.config.checks import MOST, facts_of
from lpl.config.command_line import parse_options, parse_train
from lpl.config.commands import (
    CheckConfig,
    CompareConfig,
    DataReportConfig,
    DemoConfig,
    PlanConfig,
    PruneConfig,
    ReportConfig,
    VerifyConfig,
)  # fmt: skip
from lpl.config.files import REFUSED
from lpl.config.model_commands import EvalConfig

ROOT = Path(__file__).parents[2]
COMMANDS: Any = (
    TrainConfig, PlanConfig, DataReportConfig, CheckConfig, CompareConfig, DemoConfig, PruneConfig, ReportConfig,
    EvalConfig,
)  # fmt: skip
SETTINGS = {field.name for field in fields(DataConfig)}
UNSEEN = {
    "crop_variants", "random_flip", "caption_choice", "caption_variants", "proportion_empty_prompts", "repeats",
    "reg_data_dir", "prior_loss_weight", "max_bad_fraction", "latent_cache_dir", "rehash", "dataloader_num_workers",
}  # fmt: skip
HELD_OUT = (SETTINGS - UNSEEN) | {"rescale_betas_zero_snr"}
DERIVED = {
    "free": {
        "lpl_checkpointing", "lpl_chunk", "lpl_channels_last", "lpl_compile",
        "cache_dir", "latent_cache_dir", "rehash", "max_bad_fraction",
        "dataloader_num_workers", "output_dir",
        "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "dry_run", "validation_prompt",
        "num_validation_images", "validation_epochs", "validation_steps", "report_to", "logging_dir", "log_every",
        "push_to_hub", "hub_model_id", "hub_token", "ema_device", "save_steps", "compile_denoiser",
        "max_minutes", "on_nonfinite", "max_skips", "allow_changes", "validation_data_dir", "validation_prompts",
        "metadata_author", "metadata_description", "metadata_license", "metadata_tags", "metadata_title",
        "metadata_trigger_phrase", "offload_text_encoders", "offload_blocks",
    },
    "divides": {"train_batch_size", "gradient_accumulation_steps"},
    "may_be_empty": {"validation_prompt", "caption_prefix", "optimizer_args"},
    "draws": SETTINGS | {
        "noise_offset", "pyramid_noise_iterations", "pyramid_noise_discount", "timestep_bias_strategy",
        "timestep_bias_multiplier", "timestep_bias_portion", "timestep_bias_begin", "timestep_bias_end",
        "timestep_distribution", "logit_mean", "logit_std", "mode_scale", "timestep_shift", "timestep_sampling",
        "train_batch_size", "gradient_accumulation_steps",
    },
    "arms": {
        "seed", "output_dir", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision",
        "variant", "single_file_config", "dry_run", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
        "hub_token", "lora_weights", "merge_lora_weights",
    },
    "period": {"checkpointing_steps", "save_steps", "log_every"},
    "path": {
        "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "cache_dir", "single_file_config",
        "train_data_dir", "dataset_name", "reg_data_dir", "latent_cache_dir", "validation_data_dir", "mask_dir",
        "output_dir", "resume_from_checkpoint", "logging_dir", "validation_prompts", "lora_weights",
    },
}  # fmt: skip
DEFINES = {
    "diffusion_loss": HELD_OUT | {"prediction_type"},
    "lpl": HELD_OUT | {
        "lpl_num_blocks", "lpl_norm_type", "lpl_loss_type", "lpl_pow_law", "lpl_remove_outliers", "lpl_dtype",
        "lpl_t_threshold", "lpl_snr_threshold", "lpl_sigma_threshold",
    },
    "samples": {"resolution"},
}  # fmt: skip


@pytest.mark.parametrize("fact", DERIVED)
def test_derived_lists(fact: str) -> None:
    assert {name for name, facts in declared().items() if getattr(facts, fact)} == DERIVED[fact]


@pytest.mark.parametrize("kind", DEFINES)
def test_what_defines_a_figure(kind: str) -> None:
    assert {name for name, facts in declared().items() if kind in facts.defines} == DEFINES[kind]


def test_not_recorded() -> None:
    hidden = {name for name, facts in declared().items() if not facts.recorded}
    assert hidden == {"hub_token", "dry_run", "resume_from_checkpoint"}


def test_what_is_needed_are_options() -> None:
    """No option needs one that is not there, or a value that another never takes."""
    for name, facts in declared().items():
        if facts.needs is not None and facts.needs.words.startswith("--") and "," not in facts.needs.words:
            for part in facts.needs.words.split(" and "):
                needed, _, values = part.removeprefix("--").partition(" ")
                assert needed in declared(), name
                for value in values.split(" or ") if values else []:
                    assert "--" in value or parse_train([f"--{needed}={value}"]).flat()[needed] == value, name
    words = {name: facts.needs.words for name, facts in declared().items() if facts.needs}
    assert words["mask_dir"] == "--masked_loss files and --train_data_dir"
    assert words["timestep_bias_portion"] == "--timestep_bias_strategy earlier or later"


@pytest.mark.parametrize(
    ("argv", "idle"),
    [
        (["--lora_alpha=4"], "lora_alpha"),
        (["--lora_alpha=4", "--rank=4"], None),
        (["--timestep_bias_portion=0.5", "--timestep_bias_strategy=range"], "timestep_bias_portion"),
        (["--timestep_bias_portion=0.5", "--timestep_bias_strategy=later"], None),
        (["--mask_dir=m", "--masked_loss=files"], "mask_dir"),
        (["--mask_dir=m", "--masked_loss=files", "--train_data_dir=d"], None),
        (["--adam_beta1=0.8", "--optimizer=adafactor"], "adam_beta1"),
        (["--timestep_sampling=stratified"], "timestep_sampling"),
        (["--timestep_sampling=stratified", "--train_batch_size=2"], None),
        (["--lr_warmup_steps=0"], None),
        (["--validation_steps=5"], "validation_steps"),
        (["--validation_steps=5", "--validation_samples=2"], None),
        (["--pyramid_noise_discount=0.5"], "pyramid_noise_discount"),
        (["--single_file_config=f", "--pretrained_model_name_or_path=m"], "single_file_config"),
        (["--single_file_config=f", "--pretrained_model_name_or_path=m.safetensors"], None),
    ],
)
def test_idle_options(argv: list[str], idle: str | None) -> None:
    assert [name for name, _ in idle_options(parse_train(argv))] == ([] if idle is None else [idle])


def test_bounds_are_checked_on_both_sides() -> None:
    """Of every option with bounds: what lies beyond is refused by name, with its value."""
    tried = 0
    options = [(command, name, facts) for command in COMMANDS for name, facts in declared(command).items()]
    for command, name, facts in options:
        if command is not TrainConfig and name in declared():
            continue
        default = facts.default[0] if isinstance(facts.default, tuple) else facts.default
        whole = isinstance(default, int) or (default is None and facts.least is not None)
        beyond = {
            facts.least and facts.least - 1 if facts.least is not None else None,
            None if facts.most is None else facts.most * 2 + 1,
            facts.above,
            facts.below,
        }
        beyond |= {-1} if facts.least == 0 else set()
        for value in beyond - {None, 0 if facts.above is None else None}:
            given = f"{int(value)}" if whole and float(value).is_integer() else f"{value}"
            with pytest.raises(UserError, match=rf"^--{name} must .*not {given.split('.')[0]}"):
                parse_options(command, [*["run"] * (command is ReportConfig), f"--{name}={given}"], "lpl")
            tried += 1
    assert tried > 75


@pytest.mark.parametrize(
    ("flag", "here"),
    [
        ("network_dim", "rank"),
        ("min_snr_gamma", "snr_gamma"),
        ("lr", "learning_rate"),
        ("flip_aug", "random_flip"),
        ("lora_rank", "rank"),
        ("validation_step_interval", "validation_steps"),
        ("flow_schedule_shift", "timestep_shift"),
        ("save_every_n_epochs", "save_steps"),
    ],
)
def test_names_of_other_trainers(flag: str, here: str) -> None:
    with pytest.raises(UserError, match=rf"^unknown option --{flag}: here it is --{here}$"):
        parse_train([f"--{flag}=1"])


def test_names_elsewhere_are_nobodys_here_and_unique() -> None:
    told = [name for facts in declared().values() for name in facts.elsewhere]
    assert len(told) == len(set(told))
    assert not set(told) & set(declared())


def test_flags_that_the_page_of_other_trainers_names_are_answered() -> None:
    """Of kohya's scripts and of SimpleTuner; OneTrainer has a file instead."""
    page = (ROOT / "docs" / "coming_from_other_trainers.md").read_text()
    kohya, simple_tuner = (part for part in page.split("\n## ") if part.startswith(("kohya", "SimpleTuner")))
    known = {*declared(), *REFUSED, *(name for facts in declared().values() for name in facts.elsewhere)}
    for part, least in ((kohya, 60), (simple_tuner, 30)):
        rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
        named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
        assert len(named) > least
        assert named <= known


def test_flags_without_a_counterpart() -> None:
    with pytest.raises(UserError, match=r"^--cache_latents is not taken: latents and text embeddings are always"):
        parse_train(["--cache_latents"])


def test_the_page_is_what_is_declared() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from options_page import PAGE, page
    finally:
        sys.path.pop(0)
    assert PAGE.read_text(encoding="utf-8") == page(), "run: make options"


def test_a_resolution_of_a_hundred_million_is_refused_at_once(run_cli: Any) -> None:
    started = time.monotonic()
    code, _, err = run_cli(["train", "--resolution=100000000", "--dry_run"])
    assert (code, err) == (2, "error: --resolution must lie in 8..4096, not 100000000\n")
    assert time.monotonic() - started < 10


def test_every_number_has_a_bound() -> None:
    """Of every option that takes whole numbers, what is far beyond its bound is refused by name."""
    tried = 0
    for group in TrainConfig().groups():
        for field, facts in zip(fields(group), facts_of(type(group)).values(), strict=True):
            if "int" in str(field.type):
                tried += 1
                beyond = (facts.most or MOST) + 1
                for value in (beyond, 10**400):
                    with pytest.raises(UserError, match=f"--{field.name} "):
                        type(group)(**{field.name: value})
    assert tried > 30


def test_names_that_no_file_can_have() -> None:
    tried = 0
    for group in (*TrainConfig().groups(), VerifyConfig()):
        for name, facts in facts_of(type(group)).items():
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


def test_the_page_of_other_trainers_names_options_that_are_there() -> None:
    """And where the command line answers one of their names, the page says the same."""
    page = (ROOT / "docs" / "coming_from_other_trainers.md").read_text(encoding="utf-8")
    answered = {name: own for own, facts in declared().items() for name in facts.elsewhere}
    rows = re.findall(r"^\|([^|]*`[^|]*)\|([^|]*)\|[^|]*\|$", page, re.M)
    assert len(rows) > 80
    for there, here in rows:
        names, options = (re.findall(r"`(\w+)`", cell) for cell in (there, here))
        assert set(options) <= set(declared()), here
        assert {answered[name] for name in names if name in answered} <= set(options), there
