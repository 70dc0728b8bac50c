"""The file of the arms: what it may say, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lpl.base.errors import UserError
from lpl.comparison.arms import Arm, read_arms
from lpl.config.command_line import parse_compare, parse_train
from lpl.evaluation.guidance import kind_of


def read(tmp_path: Path, text: str, *argv: str) -> list[Arm]:
    file = tmp_path / "arms.yaml"
    file.write_text(text)
    shared = ["--arms", str(file), "--validation_samples=2", f"--output_dir={tmp_path / 'out'}"]
    return read_arms(parse_compare([*shared, *argv]))


def test_arms_are_the_shared_options_with_their_own(tmp_path: Path) -> None:
    text = "base: {use_lpl: false}\nlpl: {lpl_weight: 2, lpl_norm_type: channel}\nagain: {use_lpl: false}\n"
    arms = read(tmp_path, text, "--learning_rate=3e-4", "--seeds", "4", "5", "--resolution=64", "--lpl_weight=0.5")
    assert [arm.name for arm in arms] == ["base", "lpl", "again"]
    assert [arm.baseline for arm in arms] == [True, False, False]
    assert [arm.repeats for arm in arms] == [False, False, True]
    for arm in arms:
        assert list(arm.configs) == [4, 5]
        for seed, config in arm.configs.items():
            assert (config.run.seed, config.optim.learning_rate, config.data.resolution) == (seed, 3e-4, 64)
            assert config.run.output_dir == str(tmp_path / "out" / arm.name / f"seed-{seed}")
            assert config.data.validation_samples == 2
    assert arms[0].configs[4].lpl.use_lpl is False
    assert arms[0].configs[4].lpl.lpl_weight == 0.5
    assert arms[1].configs[5].lpl.lpl_weight == 2.0
    assert arms[1].configs[5].lpl.lpl_norm_type == "channel"


def test_a_shared_option_goes_where_an_arms_own_cannot_act_beside_it(tmp_path: Path) -> None:
    text = "base: {}\ngated: {lpl_reduction: gated}\ndepth: {lpl_random_depth: true}\nbatch: {lpl_norm_type: batch}\n"
    for shared in (["--config", "sd15-lora"], ["--lpl_budget=0.1"]):
        arms = read(tmp_path, text, *shared)
        assert [arm.configs[0].lpl.lpl_budget for arm in arms] == [0.1, None, None, None]


def test_every_option_survives_the_way_through_flags(tmp_path: Path) -> None:
    argv = ["--lr_warmup_steps=None", "--ema_device=cpu", "--use_ema", "--caption_separator=; ", "--max_grad_norm=0.5"]
    arm = read(tmp_path, "a: {}\nb: {}\n", *argv)[0]
    expected = parse_train([*argv, "--validation_samples=2"]).flat()
    found = arm.configs[0].flat()
    assert {k: v for k, v in found.items() if k != "output_dir"} == {
        k: v for k, v in expected.items() if k != "output_dir"
    }


def test_options_that_change_what_is_seen_are_named(tmp_path: Path) -> None:
    text = "base: {}\nother: {train_batch_size: 2, resolution: 32, lpl_weight: 3}\nlpl: {lpl_weight: 1}\n"
    arms = read(tmp_path, text)
    assert [arm.unpaired for arm in arms] == [(), ("resolution", "train_batch_size"), ()]
    assert [arm.why_unpaired for arm in arms] == [None, "it changes --resolution, --train_batch_size", None]
    assert [arm.sees_other_data for arm in arms] == [False, True, False]
    assert not read(tmp_path, "base: {}\nother: {train_batch_size: 2}\n")[1].sees_other_data


def test_an_arm_repeats_the_baseline_where_what_it_changes_comes_to_the_same(tmp_path: Path) -> None:
    text = "base: {}\nsaid: {lpl_sigma_threshold: 3}\nother: {lpl_t_threshold: 200}\n"
    assert [arm.repeats for arm in read(tmp_path, text)] == [False, True, False]
    arms = read(tmp_path, text, "--lpl_snr_threshold=1")  # an arm's gate replaces the one that all share
    assert [arm.repeats for arm in arms] == [False, False, False]
    gates = [(c.lpl_t_threshold, c.lpl_snr_threshold, c.lpl_sigma_threshold) for c in (a.configs[0].lpl for a in arms)]
    assert gates == [(None, 1.0, None), (None, None, 3.0), (200, None, None)]


def test_options_that_define_a_metric_are_named_by_its_kind(tmp_path: Path) -> None:
    text = (
        "base: {lpl_norm_type: channel}\n"
        "norm: {lpl_norm_type: shared, lpl_num_blocks: 3, lpl_t_threshold: 200}\n"
        "alike: {lpl_norm_type: channel_detached, lpl_sigma_threshold: 3, lpl_scale: false, snr_gamma: 1,"
        " lpl_random_depth: true, random_flip: true, lpl_weight: 0}\n"
        "plain: {use_lpl: false, lpl_num_blocks: 2}\n"
        "target: {prediction_type: v_prediction, lpl_norm_type: channel}\n"
        "large: {resolution: 32, lpl_norm_type: channel}\n"
        "held: {validation_samples: 3, lpl_norm_type: channel}\n"
        "snr: {rescale_betas_zero_snr: true, lpl_norm_type: channel}\n"
    )
    found = {arm.name: arm.redefined for arm in read(tmp_path, text)}
    assert found == {
        "base": {},
        "norm": {"lpl": ("lpl_norm_type", "lpl_num_blocks", "lpl_t_threshold")},
        "alike": {},
        "plain": {},
        "target": {"diffusion_loss": ("prediction_type",)},
        "large": dict.fromkeys(("diffusion_loss", "lpl", "samples"), ("resolution",)),
        "held": dict.fromkeys(("diffusion_loss", "lpl"), ("validation_samples",)),
        "snr": dict.fromkeys(("diffusion_loss", "lpl"), ("rescale_betas_zero_snr",)),
    }
    assert [kind_of(f"validation/ema/{loss}") for loss in ("lpl", "diffusion_loss")] == ["lpl", "diffusion_loss"]
    assert kind_of("frechet_efficientnet-lite0") == "samples"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("base: {}\n", "two arms"),
        ("- base\n- lpl\n", "two arms"),
        ("base: {}\n../x: {}\n", "names a folder"),
        ("base: {}\nlpl: {push_to_hub: true}\n", "push_to_hub is not taken: runs of a comparison are not pushed"),
        ("base: {}\nlpl: {hub_token: x}\n", "hub_token is not taken: runs of a comparison are not pushed"),
        ("base: {}\nlpl: {report_to: none}\n", "lpl: --report_to none: lpl compare reads the time of each step"),
        ("base: {}\nlpl: {lpl_wieght: 1}\n", "unknown option lpl_wieght; did you mean lpl_weight?"),
        ("base: {}\nlpl: {seed: 3}\n", "seed is not taken: --seeds sets it"),
        ("base: {}\nlpl: {pretrained_model_name_or_path: x}\n", "all arms begin with one model"),
        ("base: {}\nlpl: {lpl_weight: [1, 2]}\n", "single values"),
        ("base: {}\nlpl: {use_lpl: maybe}\n", "expected true or false"),
        ("base: {}\nlpl: {lpl_norm_type: other}\n", "lpl: "),
        ("base: {}\nlpl: 3\n", "single values"),
        ("a: {b\n", "not YAML"),
        ("base: {}\nlpl: {lpl_weight: 1}\nlpl: {lpl_weight: 2}\n", "line 3: lpl is given twice"),
        ("base: {}\nlpl: {lpl_weight: 1, lpl_weight: 2}\n", "line 2: lpl_weight is given twice"),
        ("base: {}\ncompare.json: {}\n", "compare.json is a file that lpl compare writes"),
        ("base: {}\nReport.html: {}\n", "Report.html is a file that lpl compare writes"),
        *(
            (f"base: {{}}\nlpl: {{{name}: x}}\n", f"{name} is not taken: all arms begin with one model")
            for name in ("pretrained_vae_model_name_or_path", "variant", "revision", "single_file_config")
        ),
    ],
)
def test_faults_are_one_line_with_the_file(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert part in str(caught.value)
    assert str(caught.value).startswith(f"--arms {tmp_path / 'arms.yaml'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "--arms is missing"),
        (["--arms=x"], "nothing would be measured"),
        (["--arms=x", "--validation_samples=2", "--seeds", "1", "1"], "has a seed twice"),
        (["--arms=x", "--validation_samples=2", "--seeds", "-1"], "--seeds must lie in"),
        (["--arms=x", "--validation_samples=2", "--seed=3"], "--seeds 0 1 2"),
        (["--arms=x", "--validation_samples=2", "--report_to=none"], "--report_to none"),
        (["--arms=x", "--validation_samples=2", "--push_to_hub"], "--push_to_hub: every run would overwrite"),
        (["--arms=x", "--validation_samples=2", "--num_samples=9"], "--num_samples acts with --reference_dir"),
        (["--arms=x", "--validation_samples=2", "--dry_run"], "--dry_run"),
        (["--arms=x", "--validation_samples=2", "--prompts=p.txt"], "--prompts acts with --reference_dir"),
    ],
)
def test_options_are_checked(argv: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        parse_compare(argv)


def test_no_such_file() -> None:
    options: Any = parse_compare(["--arms=/nowhere.yaml", "--validation_samples=2"])
    with pytest.raises(UserError, match=r"--arms /nowhere\.yaml: cannot be read"):
        read_arms(options)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "arms.yaml").write_bytes(b"base: {}\n# caf\xe9\nlpl: {lpl_weight: 1}\n")
    options: Any = parse_compare([f"--arms={tmp_path / 'arms.yaml'}", "--validation_samples=2"])
    with pytest.raises(UserError, match=r"^--arms .*arms\.yaml, line 2: not UTF-8 text \(byte 14 of the file\)"):
        read_arms(options)
