"""Presets, config.yaml and --dry_run on tiny models, and the ways to start a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lpl.base.errors import UserError
from lpl.config.command_line import parse_train
from lpl.config.files import RECORD
from lpl.presets import presets

PRESETS = [
    "auraflow-lora",
    "chroma-lora",
    "demo",
    "diffusers-lpl",
    "flux-lora",
    "klein-lora",
    "lumina2-lora",
    "qwen-lora",
    "sana-lora",
    "schnell-lora",
    "sd15",
    "sd15-lora",
    "sd35-lora",
    "sdxl",
    "sdxl-lora",
    "zimage-lora",
]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def test_these_are_the_presets() -> None:
    assert presets() == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_preset_sets_what_it_says(name: str) -> None:
    file = Path(__file__).parents[2] / "src" / "lpl" / "presets" / f"{name}.yaml"
    written = yaml.safe_load(file.read_text())
    assert len(written) > 10
    prompt = ["--validation_prompt", "what validation_steps acts on"]
    found = parse_train(["--config", name, *prompt]).flat()
    assert {key: found[key] for key in written} == written
    defaults = parse_train(prompt).flat()
    assert {key: found[key] for key in found if key not in written} == {
        key: defaults[key] for key in defaults if key not in written
    }


def test_preset_of_the_diffusers_project_has_its_numbers() -> None:
    """Defaults of that project's argparse (its switches are off)."""
    found = parse_train(["--config", "diffusers-lpl"]).flat()
    theirs = {
        "lpl_weight": 1.0, "lpl_t_threshold": 200, "lpl_loss_type": "mse", "lpl_norm_type": "default",
        "lpl_pow_law": False, "lpl_num_blocks": 4, "lpl_remove_outliers": False, "lpl_scale": False, "lpl_start": 0,
        "lpl_reduction": "gated", "train_batch_size": 16, "learning_rate": 1e-4, "lr_scheduler": "constant",
        "num_train_epochs": 100, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2,
        "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    assert {key: found[key] for key in theirs} == theirs


def test_a_budget_of_a_preset_goes_where_it_cannot_act() -> None:
    """And stays where it can; a budget that was asked for is refused beside the same flags."""
    budgets = [name for name in presets() if parse_train(["--config", name]).lpl.lpl_budget is not None]
    assert budgets == [name for name in PRESETS if name not in ("demo", "diffusers-lpl")]
    for flags in (["--lpl_reduction=gated"], ["--lpl_norm_type", "batch"], ["--lpl_random_depth"]):
        assert parse_train(["--config", "sdxl-lora", *flags]).lpl.lpl_budget is None
        with pytest.raises(UserError, match="--lpl_budget"):
            parse_train(["--config", "sdxl-lora", "--lpl_budget=0.2", *flags])
    assert parse_train(["--config", "sdxl-lora", "--no_use_lpl"]).lpl.lpl_budget is None
    for flags in (["--lpl_reduction=expected"], ["--lpl_norm_type", "channel"], ["--no_lpl_random_depth"]):
        assert parse_train(["--config", "sdxl-lora", *flags]).lpl.lpl_budget == 0.1


def test_flags_win_over_the_preset_wherever_they_stand() -> None:
    for argv in (["--config", "demo", "--seed", "5", "--no_use_ema"], ["--seed", "5", "--no_use_ema", "--config=demo"]):
        config = parse_train(argv)
        assert (config.run.seed, config.optim.use_ema, config.data.proportion_empty_prompts) == (5, False, 0.1)


@pytest.mark.parametrize(
    "name", ["demo", "sdxl-lora", *(pytest.param(n, marks=pytest.mark.slow) for n in ("diffusers-lpl", "sdxl"))]
)
def test_preset_trains_two_steps_and_its_config_yaml_repeats_them(
    train_in: Any, base_options: dict[str, Any], tmp_path: Path, name: str
) -> None:
    overrides = dict.fromkeys(base_options)  # nothing of base_options but what a tiny model needs
    overrides |= {
        key: base_options[key]
        for key in ("pretrained_model_name_or_path", "train_data_dir", "latent_cache_dir", "resolution")
    }
    overrides |= {"max_train_steps": 2, "log_every": 1}
    if name.startswith("sdxl"):
        overrides |= {"pretrained_vae_model_name_or_path": Path(base_options["pretrained_model_name_or_path"]) / "vae"}
        overrides |= {"bucket_step": 4}
    first = train_in(tmp_path / "first", "--config", name, **overrides)
    assert list(first.losses()["train_loss"]) == [1, 2]
    file = first.folder / "config.yaml"
    written = yaml.safe_load(file.read_text())
    assert {"torch", "diffusers", "latent-perceptual-loss", "git", "python"} <= written.pop(RECORD).keys()
    preset = parse_train(["--config", name]).flat()
    assert written.keys() == preset.keys() - {"hub_token", "dry_run", "resume_from_checkpoint"}
    changed = {key for key in written if written[key] != preset[key]}
    assert changed <= {*overrides, "output_dir", "lpl_sigma_threshold", "draws_per_image"}
    assert [written["lpl_t_threshold"], written["lpl_sigma_threshold"]].count(None) == 1
    nothing = dict.fromkeys(base_options)
    again = train_in(tmp_path / "again", "--config", str(file), **nothing)
    assert same(again.unet(), first.unet())
    assert again.losses() == first.losses()


def test_dry_run_prints_the_plan_and_writes_nothing(
    train_in: Any, base_options: dict[str, Any], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    options = {"latent_cache_dir": cache, "use_ema": True, "train_batch_size": 4, "max_train_steps": None}
    run = train_in(tmp_path / "out", "--dry_run", **options, num_train_epochs=10)
    assert not run.folder.exists()
    assert not cache.exists()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    for part in (
        "trains       68,188 parameters (the whole UNet)",
        "data         6 samples at 16 px, latents 4 x 4 x 4",
        "verdict      ready to train",
        "steps        15 steps of 4 samples, which draw each of 6 images 10 times on average",
        "tap mid     16 x 4 x 4, weight 1",
        "tap up_2    8 x 16 x 16, weight 0.25",
        "memory       about ",
        "AdamW state",
        "EMA",
    ):
        assert part in run.stdout
    weights = {line.split("  ")[1].strip(): line.split()[-2] for line in run.stdout.splitlines() if "MiB" in line}
    assert weights["UNet weights"] == f"{68188 * 4 / 2**20:.1f}"
    assert weights["AdamW state"] == f"{68188 * 8 / 2**20:.1f}"
    lora = train_in(tmp_path / "out", "--dry_run", **options, num_train_epochs=10, rank=2)
    assert "(LoRA of rank 2 on 68,188)" in lora.stdout
    plain = train_in(tmp_path / "out", "--dry_run", **options, num_train_epochs=301, use_lpl=False)
    assert "tap" not in plain.stdout
    assert plain.stdout.startswith("verdict      think again: each image is drawn 301 times")


def test_dry_run_agrees_with_the_run(train: Any) -> None:
    """Parameters and steps that the plan states are those that the run trains."""
    options = {"rank": 2, "max_train_steps": None, "draws_per_image": 1, "train_batch_size": 4}
    plan = train("--dry_run", **options).stdout
    run = train(**options)
    trained = sum(t.numel() for t in run.unet().values())
    assert f"trains       {trained:,} parameters" in plan
    assert "steps        2 steps of 4 samples" in plan
    assert list(run.losses()["train_loss"]) == [1, 2]


# --- processes


def test_the_command_of_the_issue_under_accelerate_launch(
    model: Path, data: Path, run_cli: Any, read_run: Any, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    """In a process of its own, as in this one. No --resolution: what the model was made for; no cache: the user's."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    command = (
        f"train --pretrained_model_name_or_path {model} --train_data_dir {data} --use_lpl --lpl_weight 1.0 "
        "--lpl_t_threshold 200 --lpl_loss_type mse --lpl_norm_type shared --lpl_pow_law --lpl_num_blocks 4 "
        "--lpl_remove_outliers --lpl_scale --lpl_start 0 --max_train_steps 4 --output_dir"
    ).split()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch = ["--cpu", "--num_processes", "1", "-m", "lpl", *command, str(tmp_path / "launched")]
    launch_command(launch_command_parser().parse_args(launch))
    err = capfd.readouterr().err
    assert "6 samples; 6 crops and 6 captions encoded" in err
    assert (
        "LPL compares decoder features in float32 where t < 200: on about 20 % of the samples; its weight is 1" in err
    )
    assert "100%" in err
    assert f"done: the result is in {tmp_path / 'launched'}" in err
    assert list((tmp_path / "cache" / "lpl" / "latents").iterdir())
    from diffusers import StableDiffusionXLPipeline

    StableDiffusionXLPipeline.from_pretrained(tmp_path / "launched", use_safetensors=True, add_watermarker=False)
    code, _, err = run_cli([*command, str(tmp_path / "plain")])
    assert code == 0, err
    launched, plain = read_run(tmp_path / "launched"), read_run(tmp_path / "plain")
    assert same(launched.unet(), plain.unet())
    assert launched.losses() == plain.losses()


def test_the_ways_to_start_a_process(run_cli: Any) -> None:
    import lpl

    script = Path(sys.executable).with_name("lpl")
    for start in ([sys.executable, "-m", "lpl"], *([[str(script)]] if script.exists() else [])):
        done = subprocess.run([*start, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"{lpl.__version__}\n"
    code, out, err = run_cli(["env"])
    assert (code, err) == (0, "")
    assert f"torch: {torch.__version__}" in out


def test_presets_are_listed_and_printed(run_cli: Any) -> None:
    code, listed, _ = run_cli(["presets"])
    assert code == 0
    for name in [*PRESETS, "ddp", "fsdp2"]:
        assert f"  {name} " in listed
        code, text, _ = run_cli(["presets", name])
        assert code == 0
        assert isinstance(yaml.safe_load(text), dict)
    code, _, err = run_cli(["presets", "nothing"])
    assert code == 2
    assert "presets nothing: there is none of that name" in err


@pytest.mark.parametrize(
    ("name", "set_by_it"),
    [
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        (
            "fsdp2",
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
        ),
    ],
)
def test_accelerate_reads_its_presets(run_cli: Any, tmp_path: Path, name: str, set_by_it: dict[str, str]) -> None:
    """What `accelerate launch` sets for its processes; tests/launching.py sets the same for FSDP2."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env
    from launching import FSDP

    file = tmp_path / f"{name}.yaml"
    file.write_text(run_cli(["presets", name])[1])
    argv = ["--config_file", str(file), "--num_processes", "2", "-m", "lpl"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    found = prepare_multi_gpu_env(arguments)
    assert arguments.num_processes == 2
    assert {key: found.get(key) for key in set_by_it} == set_by_it
    if name == "fsdp2":
        assert {key: found.get(key) for key in FSDP} == FSDP
