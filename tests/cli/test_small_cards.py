"""bfloat16 weights and fused backward passes through `lpl train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lpl.training.step import TrainingStep

BFLOAT16 = {"weights_dtype": "bfloat16", "mixed_precision": "bf16", "learning_rate": 1e-4}
FUSED = {"fused_backward_pass": True, "max_grad_norm": 0}
STEPS = {"max_train_steps": 4, "checkpointing_steps": 2}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("optimizer", "fused"), [("adamw", False), ("adafactor", True), ("optimi.AdamW", True)])
def test_two_steps_and_two_more_equal_four(train: Any, optimizer: str, fused: bool) -> None:
    options = BFLOAT16 | (FUSED if fused else {}) | {"optimizer": optimizer, "use_ema": True, "ema_decay": 0.5}
    whole = train(**options | STEPS, output="whole")
    train(**options, output="halves")
    halves = train(**options | STEPS, output="halves")
    for part in ("model", "optimizer", "ema"):
        assert same(whole.checkpoint(4, part), halves.checkpoint(4, part)), part
    assert same(whole.unet(), halves.unet())
    assert whole.losses() == halves.losses()
    assert {value.dtype for value in whole.checkpoint(4, "model").values()} == {torch.bfloat16}
    assert {value.dtype for value in whole.unet().values()} == {torch.bfloat16}
    assert not same(whole.checkpoint(2, "model"), whole.checkpoint(4, "model"))


def test_the_average_of_bfloat16_weights_is_float32_and_moves(train: Any) -> None:
    """shadow <- d shadow + (1 - d) weights with d = 0.999: less than bfloat16 can tell apart."""
    run = train(
        **BFLOAT16 | STEPS, use_ema=True, ema_decay=0.999, ema_min_decay=0.999, checkpoints_total_limit=4,
        ema_update_every=2,
    )  # fmt: skip
    before, after = run.checkpoint(2, "ema"), run.checkpoint(4, "ema")
    weights = run.checkpoint(4, "model")
    assert {value.dtype for value in after.values()} == {torch.float32}
    for name, shadow in after.items():
        expected = before[name] - (1 - 0.999) * (before[name] - weights[name].float())
        torch.testing.assert_close(shadow, expected, rtol=1e-6, atol=1e-9)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in after])
    assert float((moved != 0).float().mean()) > 0.3
    low = [float((after[name].bfloat16() != before[name].bfloat16()).float().mean()) for name in after]
    assert max(low) < 0.3


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "optimi.AdamW"])
def test_float32_steps_in_the_backward_pass_are_those_after_it(train: Any, optimizer: str) -> None:
    options = {**STEPS, "optimizer": optimizer, "gradient_checkpointing": True, "use_ema": True}
    after = train(**options, max_grad_norm=0, output="after")
    fused = train(**options, **FUSED, output="fused")
    assert same(after.unet(), fused.unet())
    for part in ("model", "ema"):
        assert same(after.checkpoint(2, part), fused.checkpoint(2, part))
    losses, expected = fused.losses(), after.losses()
    assert losses.pop("gradient_norm") == pytest.approx(expected.pop("gradient_norm"), rel=1e-5)
    assert losses == expected


def test_without_a_limit_gradients_are_as_they_are(train: Any) -> None:
    """SGD's step is proportional to the gradient, so that clipping shows."""
    options = {"optimizer": "torch.optim.SGD", "max_train_steps": 1, "checkpointing_steps": 1}
    free = train(**options, max_grad_norm=0, output="free")
    wide = train(**options, max_grad_norm=1e6, output="wide")
    tight = train(**options, max_grad_norm=1e-3, output="tight")
    assert free.losses() == wide.losses()
    assert free.losses()["gradient_norm"][1] > 1e-2
    assert same(free.unet(), wide.unet())
    assert not same(free.unet(), tight.unet())


def spoil(patch: pytest.MonkeyPatch, step: int, gradient: bool) -> None:
    """Makes the loss of a step (from 1) infinite, or its gradient alone."""
    original = TrainingStep.__call__

    def spoiled(self: TrainingStep, denoiser: Any, batch: Any, device: Any, use_lpl: bool, at: int) -> Any:
        out = original(self, denoiser, batch, device, use_lpl, at)
        if at + 1 != step:
            return out
        if gradient:
            out.loss.register_hook(lambda value: value * float("inf"))
            return out
        bad = out.diffusion_per_sample * float("inf")
        return out._replace(loss=out.loss + float("inf"), diffusion_per_sample=bad)

    patch.setattr(TrainingStep, "__call__", spoiled)


def test_fused_a_loss_that_is_not_finite_is_seen_before_anything_moves(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3, gradient=False)
    options = {**FUSED, "max_train_steps": 4, "checkpointing_steps": 1}
    failed = train(**options, expect_error=True)
    assert failed.code == 3
    assert "the diffusion loss was not finite at step 3" in failed.errors[0]
    assert "checkpoint-2 is the last checkpoint" in failed.errors[0]
    run = train(**options, on_nonfinite="skip")
    assert "the step is skipped (1 of --max_skips 10)" in run.stderr
    assert same(run.checkpoint(2, "model"), run.checkpoint(3, "model"))
    assert same(run.checkpoint(2, "optimizer"), run.checkpoint(3, "optimizer"))
    assert not same(run.checkpoint(3, "model"), run.checkpoint(4, "model"))


def test_fused_weights_that_a_gradient_has_spoilt_are_not_saved(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**FUSED, "max_train_steps": 4, "checkpointing_steps": 2, "on_nonfinite": "skip"}
    with monkeypatch.context() as patch:
        spoil(patch, 4, gradient=True)
        failed = train(**options, expect_error=True)
    assert failed.code == 3
    (line,) = failed.errors
    assert "the gradient was not finite at step 4, though the loss was" in line
    assert "checkpoint-2 is the last checkpoint" in line
    assert not (failed.folder / "checkpoint-3").exists()
    assert not (failed.folder / "checkpoint-4").exists()
    assert all(bool(value.isfinite().all()) for value in train(**options).unet().values())


@pytest.mark.slow
def test_validation_and_saved_weights_with_bfloat16_weights(train: Any) -> None:
    """Without an effect on training, though they put the average in the place of the weights for a while."""
    options = BFLOAT16 | FUSED | {"optimizer": "adafactor", "use_ema": True}
    seen = train(**options, validation_prompt="a", validation_steps=1, save_steps=1, output="seen")
    assert (seen.folder / "saved-2" / "ema" / "unet" / "config.json").is_file()
    assert list((seen.folder / "samples").glob("*.png"))
    assert same(seen.unet(), train(**options, output="plain").unet())


REFUSED = {
    "prodigy": ({"optimizer": "prodigy"}, "--weights_dtype bfloat16 with --optimizer prodigy: it estimates"),
    "schedule-free": (
        {"optimizer": "schedulefree_adamw"}, "--weights_dtype bfloat16 with --optimizer schedulefree_adamw: it keeps",
    ),
    "other": ({"optimizer": "torch.optim.SGD"}, "with --optimizer torch.optim.SGD: it is not known to"),
    "kahan": ({"optimizer": "optimi.AdamW", "optimizer_args": "kahan_sum=False"}, "kahan_sum=False: small updates"),
    "precision": ({"mixed_precision": "no"}, "--weights_dtype bfloat16 needs --mixed_precision bf16, not no"),
    "rank": ({"rank": 2}, "--weights_dtype bfloat16 with --rank 2"),
    "clipping": ({"fused_backward_pass": True}, "--fused_backward_pass with --max_grad_norm 1: "),
    "accumulation": (FUSED | {"gradient_accumulation_steps": 2}, "with --gradient_accumulation_steps 2: every"),
    "scaler": (
        FUSED | {"mixed_precision": "fp16", "weights_dtype": None}, "--fused_backward_pass with --mixed_precision fp16",
    ),
    "fused prodigy": (
        FUSED | {"optimizer": "prodigy", "weights_dtype": None}, "--fused_backward_pass with --optimizer prodigy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(train: Any, case: str) -> None:
    options, message = REFUSED[case]
    run = train(**BFLOAT16 | {"pretrained_model_name_or_path": "/none"} | options, expect_error=True)
    line, *_, model = run.errors
    assert message in line
    assert "--pretrained_model_name_or_path /none" in model
    assert run.code == 2


@pytest.mark.parametrize("options", [{"optimizer": "adamw"}, {"optimizer": "optimi.AdamW"}])
def test_several_processes_are_refused(train: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = train(**BFLOAT16, **FUSED, **options, expect_error=True)
    assert "--fused_backward_pass in 2 processes" in run.errors[0]
    run = train(**BFLOAT16, **options, expect_error=True)
    assert "--weights_dtype bfloat16 in 2 processes: each would round" in run.errors[0]


@pytest.mark.parametrize(("package", "optimizer"), [("torchao", "adamw"), ("optimi", "optimi.AdamW")])
def test_a_missing_package_is_named(train: Any, monkeypatch: pytest.MonkeyPatch, package: str, optimizer: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == package else object())
    run = train(**BFLOAT16, optimizer=optimizer, expect_error=True)
    assert f"needs {package}: pip install 'latent-perceptual-loss[optim]'" in run.errors[0]


def test_the_plan_knows_both(run_cli: Any, model: Path) -> None:
    code, out, err = run_cli(
        ["plan", f"--pretrained_model_name_or_path={model}", "--resolution=16", "--no_use_lpl",
         "--mixed_precision=bf16", "--optimizer=adafactor", "--weights_dtype=bfloat16", "--fused_backward_pass",
         "--max_grad_norm=0"]
    )  # fmt: skip
    assert code == 0, err
    words = out.split()
    assert words[words.index("weights", words.index("parts:")) + 1 :][:2] == ["0.1", "MiB"]  # 68,188 of two bytes
    assert "optimizer step" not in out
    assert "--weights_dtype float32 " in out
    assert "--no_fused_backward_pass " in out
    assert "--mixed_precision no " not in out  # refused with bfloat16 weights


def test_packages_are_loaded_only_where_they_are_needed(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "optimi"]:
        monkeypatch.delitem(sys.modules, name)
    train(max_train_steps=1)
    assert "optimi" not in sys.modules
