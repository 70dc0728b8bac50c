"""Options as YAML: what is written is read back, and faults are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpl.base.errors import UserError
from lpl.config import LoggingConfig, LPLConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lpl.config.command_line import parse_train
from lpl.config.environment import environment
from lpl.config.files import RECORD, as_flags, differences, nearest, read_options, write_config
from lpl.config.loss import GATES
from lpl.config.run_folder import CONFIG_FILE


def round_trip(config: TrainConfig, folder: Path) -> TrainConfig:
    write_config(config, folder)
    return parse_train(["--config", str(folder / CONFIG_FILE)])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--lpl_weight", "0.25", "--no_lpl_scale", "--lpl_sigma_threshold", "3", "--learning_rate", "1e-05"],
        ["--mixed_precision", "no", "--lpl_checkpointing", "true", "--rank", "4", "--snr_gamma", "5"],
        ["--validation_prompt=-1", "--seed", "7", "--adam_epsilon", "1e-08"],
        ["--validation_prompt", "true: a 'quoted' # prompt, \"twice\"; 1e3 ünïcode", "--max_train_steps", "3"],
        ["--train_data_dir", "/tmp/with space/and=sign", "--report_to", "none"],
        ["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:10,0.1:20,0.01"],
    ],
)
def test_config_yaml_reads_back_as_it_was(tmp_path: Path, argv: list[str]) -> None:
    """Its gate is stated, also where it is the default."""
    config = parse_train(argv)
    assert round_trip(config, tmp_path) == replace(config, lpl=replace(config.lpl, lpl_sigma_threshold=3.0))


def test_config_yaml_has_the_environment_and_no_token(tmp_path: Path) -> None:
    config = TrainConfig(
        logging=LoggingConfig(hub_token="hf_secret"), run=RunConfig(dry_run=True, resume_from_checkpoint="latest")
    )
    write_config(config, tmp_path, 2)
    text = (tmp_path / CONFIG_FILE).read_text()
    written = yaml.safe_load(text)
    assert written.pop(RECORD) == environment() | {"processes": 2}
    assert written.keys() == config.flat().keys() - {"hub_token", "dry_run", "resume_from_checkpoint"}
    assert "hf_secret" not in text
    assert [p.name for p in tmp_path.iterdir()] == [CONFIG_FILE]


def test_booleans_and_nothing_become_flags() -> None:
    options = {"use_lpl": "False", "random_flip": "true", "rank": "null", "snr_gamma": "", "seed": "-3"}
    assert as_flags(options) == ["--no_use_lpl", "--random_flip", "--rank=None", "--snr_gamma=None", "--seed=-3"]


def test_file_may_be_empty_or_commented(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("# nothing yet\n")
    assert read_options(str(file)) == {}
    file.write_text("# mine\nlpl_weight: 2  # half\n")
    assert read_options(str(file)) == {"lpl_weight": "2"}


def test_an_option_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lpl_weight: 2\nseed: 1\nlpl_weight: 3\n")
    with pytest.raises(UserError, match=r"c\.yaml: line 3: lpl_weight is given twice"):
        read_options(str(file))


def test_differences_name_what_changes_the_trajectory(tmp_path: Path) -> None:
    config = TrainConfig(model=ModelConfig("m"), optim=OptimConfig(learning_rate=1e-5))
    write_config(config, tmp_path)
    assert differences(config, tmp_path) == []
    free = replace(config, logging=LoggingConfig(log_every=3, hub_token="x"), run=RunConfig(output_dir="elsewhere"))
    assert differences(free, tmp_path) == []
    changed = replace(config, model=ModelConfig("n"), run=RunConfig(seed=2))
    assert differences(changed, tmp_path) == ["--pretrained_model_name_or_path m -> n", "--seed 0 -> 2"]


def test_differences_count_the_samples_of_a_step(tmp_path: Path) -> None:
    def divided(batch: int, accumulation: int) -> TrainConfig:
        return TrainConfig(run=RunConfig(train_batch_size=batch, gradient_accumulation_steps=accumulation))

    write_config(divided(2, 1), tmp_path, 4)
    assert differences(divided(1, 4), tmp_path, 2) == differences(divided(8, 1), tmp_path) == []
    assert differences(divided(2, 1), tmp_path, 2) == ["samples a step 8 -> 4"]


FORMER = {"lpl_weight": "auto", "lpl_target_share": 0.2, "lpl_norm_type": "shared"} | dict.fromkeys(GATES)
"""Of LPL, what a run without flags wrote while these were the defaults; no gate meant t < 200."""


def former(folder: Path, **others: Any) -> Path:
    """A run's folder of then."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(FORMER | others | {RECORD: {}}))
    return folder


def test_a_run_of_former_defaults_does_not_go_on_with_other_ones(tmp_path: Path) -> None:
    """The same command, of a run by auto, by number and without LPL, whose options of LPL did nothing."""
    auto, fixed, plain = (
        former(tmp_path / name, **more)
        for name, more in (("auto", {}), ("fixed", {"lpl_weight": 2.0}), ("plain", {"use_lpl": False}))
    )
    gate, norm = (
        ["--lpl_t_threshold 200 -> None", "--lpl_sigma_threshold None -> 3.0"],
        "--lpl_norm_type shared -> own",
    )
    assert differences(parse_train([]), auto) == ["--lpl_target_share 0.2 -> 0.5", *gate, norm]
    assert differences(parse_train(["--lpl_weight", "2"]), fixed) == [*gate, norm]
    assert differences(parse_train(["--no_use_lpl"]), plain) == []
    stated = ["--lpl_t_threshold=200", "--lpl_norm_type=shared"]
    assert differences(parse_train([*stated, "--lpl_target_share=0.2"]), auto) == []
    assert differences(parse_train([*stated, "--lpl_weight=2"]), fixed) == []
    assert differences(parse_train(stated), plain)[0] == "--use_lpl False -> True"


def test_a_config_yaml_of_former_defaults_repeats_that_run(tmp_path: Path) -> None:
    def parsed(name: str, *flags: str, **more: Any) -> LPLConfig:
        return parse_train(["--config", str(former(tmp_path / name, **more) / CONFIG_FILE), *flags]).lpl

    shared = LPLConfig(lpl_norm_type="shared", lpl_t_threshold=200)
    assert parsed("auto") == replace(shared, lpl_target_share=0.2)
    assert parsed("fixed", lpl_weight=2.0) == replace(shared, lpl_weight=2.0)
    assert parsed("plain", use_lpl=False) == LPLConfig(use_lpl=False)
    assert parsed("snr", lpl_snr_threshold=1.0, lpl_target_share=0.5) == LPLConfig(
        lpl_norm_type="shared", lpl_snr_threshold=1.0
    )
    # Flags win, also where what they replace has another name.
    assert parsed("gate", "--lpl_sigma_threshold", "6") == LPLConfig(
        lpl_norm_type="shared", lpl_sigma_threshold=6.0, lpl_target_share=0.2
    )
    assert parsed("none", "--lpl_sigma_threshold=None") == parsed("auto")
    assert parsed("weight", "--lpl-weight=3") == replace(shared, lpl_weight=3.0)


def test_what_the_config_of_an_older_version_lacks_was_at_its_default(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(f"lpl_sigma_threshold: 3.0\nseed: 0\nsome_former_option: 3\n{RECORD}: {{}}\n")
    assert differences(TrainConfig(), tmp_path) == []
    assert differences(TrainConfig(optim=OptimConfig(decay_all=True)), tmp_path) == ["--decay_all False -> True"]


def test_nearest_suggests_only_what_is_near() -> None:
    known = ["lpl_weight", "lpl_start"]
    assert nearest("lpl_wieght", known) == "; did you mean lpl_weight?"
    assert nearest("zzz", known) == ""


def test_environment_names_versions() -> None:
    import torch

    found: dict[str, Any] = environment()
    assert found["torch"] == torch.__version__
    assert {"python", "diffusers", "accelerate", "git"} <= found.keys()


def test_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match="--config nothing: neither a file nor a preset"):
        read_options("nothing")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig"])
def test_a_config_in_another_encoding_is_read_or_refused(tmp_path: Path, encoding: str) -> None:
    file, text = tmp_path / "x.yaml", "output_dir: café\r\nseed: 3\r\n"
    file.write_bytes(text.encode(encoding))
    assert read_options(str(file)) == {"output_dir": "café", "seed": "3"}
    file.write_bytes(text.encode("cp1252"))
    with pytest.raises(UserError, match=r"^--config .*x\.yaml, line 1: not UTF-8 text \(byte 15 .*save it as UTF-8$"):
        read_options(str(file))
