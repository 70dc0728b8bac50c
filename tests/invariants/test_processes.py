"""Several processes, split by DDP or FSDP2, train what one process trains, and their files say nothing of them.

As in test_accumulation.py AdamW's epsilon is large, so that rounding stays rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import FSDP, launch, launch_all

SAMPLES = 4
"""Samples of a step; the data have six, so epochs end within steps."""
STEPS, RATE, EPSILON = 4, 1e-2, 1e-2
FLOAT_ERROR = 2e-6
SLOW = pytest.param(2, 2, 1, True, marks=pytest.mark.slow)
OPTIONS = {
    "max_train_steps": STEPS,
    "learning_rate": RATE,
    "adam_epsilon": EPSILON,
    "train_batch_size": SAMPLES,
    "lpl_weight": "auto",
    "lpl_t_threshold": 400,
    "snr_gamma": 5.0,
    "use_ema": True,
    "ema_decay": 0.7,
    "proportion_empty_prompts": 0.2,
    "random_flip": True,
    "checkpointing_steps": 2,
    "save_steps": 4,
}
LORA = {"rank": 2, "lora_alpha": 1.0, "max_train_steps": 2, "save_steps": 2, "lpl_budget": 0.5}


@pytest.fixture(scope="module")
def run(base_options: Any, as_flags: Any, read_run: Any) -> Any:
    """Runs `lpl train` with OPTIONS in several processes."""

    def start(folder: Path, processes: int, fsdp: bool = False, **options: Any) -> Any:
        options = {**base_options, **OPTIONS, "output_dir": folder, **options}
        launch(["train", *as_flags(options)], processes, fsdp)
        return read_run(folder)

    return start


@pytest.fixture(scope="module")
def whole(train_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_in(tmp_path_factory.mktemp("whole") / "out", **OPTIONS)


@pytest.fixture(scope="module")
def sharded(base_options: Any, as_flags: Any, read_run: Any, train_in: Any, run: Any, tmp_path_factory: Any) -> Any:
    """What two processes leave that FSDP2 splits the model over: by name, runs of four steps but for "begun"."""
    home = tmp_path_factory.mktemp("sharded")
    # One that others have begun.
    train_in(home / "continued", **OPTIONS | {"max_train_steps": 2, "checkpointing_steps": 1})
    run(home / "continued", 4, False, train_batch_size=1, max_train_steps=3, checkpointing_steps=1)
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    runs = {
        "split": split,
        "lora": LORA | {"train_batch_size": 2},
        "begun": {"train_batch_size": 2, "max_train_steps": 1, "checkpointing_steps": 1},
        "continued": split,
    }
    every = [{**base_options, **OPTIONS, "output_dir": home / name, **options} for name, options in runs.items()]
    launch_all([["train", *as_flags(options)] for options in every], 2, True)
    return {name: read_run(home / name) for name in runs}


def assert_same_run(a: Any, b: Any, steps: int = STEPS) -> None:
    losses, expected = a.losses(), b.losses()
    assert losses.keys() == expected.keys() >= {"diffusion_loss", "lpl/loss", "lpl/weighted_loss", "gradient_norm"}
    for name, values in expected.items():
        assert list(losses[name]) == list(values) == list(range(1, steps + 1))
        for step, value in values.items():
            assert losses[name][step] == pytest.approx(value, rel=5e-5, abs=1e-9), (name, step)
    assert_close(a.unet(), b.unet())


def assert_close(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        bound = STEPS * RATE / EPSILON * FLOAT_ERROR * max(1.0, float(value.abs().max()))
        assert tensors[name].shape == value.shape, name
        assert (tensors[name].double() - value.double()).abs().max() <= bound, name


def test_some_processes_of_four_have_no_sample_for_lpl(whole: Any) -> None:
    """Else the test below would not show what it is for."""
    ratios = set(whole.logged()["lpl/application_ratio"].values())
    assert any(0 < ratio < 1 for ratio in ratios)


@pytest.mark.parametrize(
    ("processes", "batch", "accumulation", "fsdp"),
    [(2, 1, 2, False), (4, 1, 1, False), SLOW, (2, 1, 2, True)],
)
def test_processes_train_what_one_trains(
    request: Any, run: Any, whole: Any, tmp_path: Path, processes: int, batch: int, accumulation: int, fsdp: bool
) -> None:
    if fsdp and accumulation > 1:
        split = request.getfixturevalue("sharded")["split"]
    else:
        options = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        split = run(tmp_path / "split", processes, fsdp, **options)
    assert_same_run(split, whole)
    sums, expected = (json.loads((r.folder / f"checkpoint-{STEPS}/state.json").read_text()) for r in (split, whole))
    assert sums["tracker"]["lpl"] == pytest.approx(expected["tracker"]["lpl"], rel=1e-3)
    for part in ("model", "optimizer", "ema"):
        assert_close(split.checkpoint(STEPS, part), whole.checkpoint(STEPS, part))
    for kind in ("raw", "ema"):
        from safetensors.torch import load_file

        file = f"saved-{STEPS}/{kind}/unet/diffusion_pytorch_model.safetensors"
        assert_close(load_file(split.folder / file), load_file(whole.folder / file))


def test_stratified_timesteps_and_buckets_do_not_depend_on_processes(run: Any, train: Any, tmp_path: Path) -> None:
    options = {"timestep_sampling": "stratified", "buckets": True, "bucket_step": 8, "max_train_steps": 3}
    one = train(**OPTIONS | options, output="one")
    assert_same_run(run(tmp_path / "two", 2, train_batch_size=2, **options), one, steps=3)


def test_a_lora_is_trained_and_saved(run: Any, train: Any, sharded: Any, tmp_path: Path) -> None:
    one = train(**OPTIONS | LORA, output="one")
    for two in (run(tmp_path / "two", 2, train_batch_size=2, **LORA), sharded["lora"]):
        assert_same_run(two, one, steps=2)


def test_a_run_goes_on_with_other_processes(whole: Any, sharded: Any, train_in: Any) -> None:
    """One, then four, then two of FSDP2; and two of FSDP2, then one."""
    train_in(sharded["begun"].folder, **OPTIONS)
    for last in (sharded["continued"], sharded["begun"]):
        assert_same_run(last, whole)
        assert_close(last.checkpoint(STEPS, "optimizer"), whole.checkpoint(STEPS, "optimizer"))
        assert_close(last.checkpoint(STEPS, "ema"), whole.checkpoint(STEPS, "ema"))


def test_what_depends_on_the_division_asks_for_allow_changes(run: Any, train_in: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = {"lpl_reduction": "gated", "lpl_weight": 1.0}
    run(folder, 2, train_batch_size=2, max_train_steps=2, **options)
    failed = train_in(folder, **OPTIONS | options, expect_error=True)
    assert failed.code == 2
    assert failed.errors == [
        f"error: {folder / 'checkpoint-2'}: was trained with 2 samples x 1 micro-batches x 2 processes, not 4 samples "
        "x 1 micro-batches x 1 processes, which --lpl_reduction gated depends on; restore that, or choose another "
        "--output_dir and name this checkpoint with --resume_from_checkpoint, or continue all the same with "
        "--allow_changes"
    ]
    allowed = train_in(folder, **OPTIONS | options, allow_changes=True)
    assert json.loads((allowed.folder / "finished.json").read_text())["step"] == STEPS


@pytest.mark.slow
def test_split_model_in_bfloat16_follows_the_whole_one(run: Any, tmp_path: Path) -> None:
    """Both compute in bfloat16: their losses differ by its rounding of sums in another order."""
    options = {"mixed_precision": "bf16", "max_train_steps": 2, "use_ema": False, "save_steps": None}
    split = run(tmp_path / "split", 2, True, train_batch_size=2, **options).losses()["diffusion_loss"]
    both = run(tmp_path / "both", 2, False, train_batch_size=2, **options).losses()["diffusion_loss"]
    assert split == pytest.approx(both, rel=0.02)


@pytest.mark.parametrize(
    ("options", "environment", "told"),
    [
        ({"optimizer": "adafactor"}, {}, "--optimizer adafactor cannot be split by FSDP2"),
        ({"compile_denoiser": True}, {}, "--compile_denoiser does not go with FSDP2"),
        ({"train_text_encoder": True, "validation_prompt": "x"}, {}, "FSDP2 draws no validation images where --train_"),
        ({}, {"FSDP_VERSION": "1"}, "accelerate's configuration has fsdp_version 1"),
        ({}, {"FSDP_OFFLOAD_PARAMS": "true"}, "accelerate's configuration has fsdp_offload_params"),
        ({}, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "has fsdp_activation_checkpointing"),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_line(
    run: Any, tmp_path: Path, capfd: Any, monkeypatch: Any, options: Any, environment: Any, told: str
) -> None:
    monkeypatch.setattr("launching.FSDP", FSDP | environment)
    with pytest.raises(Exception, match="exit code 2"):
        run(tmp_path / "run", 2, True, **options)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(set(errors)) == 1  # this launcher does not say which process speaks for all
    assert told in errors[0]


@pytest.mark.slow
def test_schedule_free_weights_are_split_too(run: Any, train: Any, tmp_path: Path) -> None:
    options = {"optimizer": "schedulefree_adamw", "use_ema": False, "ema_decay": None, "max_train_steps": 2}
    one = train(**OPTIONS | options, output="one")
    assert_same_run(run(tmp_path / "two", 2, True, train_batch_size=2, **options), one, steps=2)


def test_the_model_is_split_block_by_block(base_options: Any) -> None:
    """The launch's environment names no classes: the model's own list is used."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from diffusers import UNet2DConditionModel

    from lpl.training.launch import environment

    unet = UNet2DConditionModel.from_pretrained(base_options["pretrained_model_name_or_path"], subfolder="unet")
    with environment(FSDP):
        plugin = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(unet)
    assert {"BasicTransformerBlock", "ResnetBlock2D"} <= set(plugin.transformer_cls_names_to_wrap)
