"""Steps whose loss or gradient is not finite: left out before anything moved, counted, and kept to be looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lpl.training.nonfinite import DUMPS, spoil
from lpl.training.step import TrainingStep
from lpl.training.trainer import Trainer

OPTIONS: dict[str, Any] = {"max_train_steps": 5, "checkpointing_steps": 100, "train_batch_size": 2, "use_ema": True}
OPTIONS |= {"lpl_weight": "auto"}


def spoil_steps(patch: pytest.MonkeyPatch, steps: set[int], term: str = "diffusion") -> None:
    """Makes the loss of some steps (counted from 1) NaN: of the second sample, or its gradient alone."""
    original = TrainingStep.__call__

    def spoiled(self: TrainingStep, denoiser: Any, batch: Any, device: Any, use_lpl: bool, step: int) -> Any:
        out = original(self, denoiser, batch, device, use_lpl, step)
        if step + 1 not in steps:
            return out
        if term == "gradient":
            out.loss.register_hook(lambda gradient: gradient * float("inf"))
            return out
        per_sample = out.diffusion_per_sample.clone()
        per_sample[1] = float("inf")
        # A loss that is infinite though its gradient is not.
        return out._replace(loss=out.loss + float("inf"), diffusion_per_sample=per_sample)

    patch.setattr(TrainingStep, "__call__", spoiled)


def watch(patch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights before each step."""
    seen: list[dict[str, torch.Tensor]] = []
    original = Trainer._optimizer_step

    def step(self: Trainer) -> Any:
        seen.append({name: p.detach().clone() for name, p in self.trained.parameters.items()})
        return original(self)

    patch.setattr(Trainer, "_optimizer_step", step)
    return seen


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_spoil_changes_no_bit_of_a_finite_loss() -> None:
    for value, expected in ((3.0, 1.0), (float("inf"), None), (float("nan"), None)):
        x = torch.tensor(1.5, requires_grad=True)
        (spoil(x + value)).backward()
        assert x.grad is not None
        assert bool(x.grad.isnan()) if expected is None else x.grad.item() == expected
    x = torch.tensor(0.1)
    assert torch.equal(spoil(x), x)


@pytest.mark.parametrize("term", ["diffusion", "gradient"])
def test_stops_before_the_update_with_a_checkpoint_and_skip_goes_on_from_it(
    train: Any, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    with monkeypatch.context() as patch:
        spoil_steps(patch, {3}, term)
        weights = watch(patch)
        failed = train(**OPTIONS, log_every=100, expect_error=True)
        assert failed.code == 3
        (line,) = failed.errors
        what = {"diffusion": "the diffusion loss was not", "gradient": "the gradient was not"}[term]
        assert f"{what} finite at step 3" in line
        assert "checkpoint-2 is the last checkpoint" in line
        assert "--on_nonfinite skip" in line
        assert same(failed.checkpoint(2, "model"), weights[2])
        skipped = train(**OPTIONS, log_every=100, on_nonfinite="skip")
        assert "the step is skipped (1 of --max_skips 10)" in skipped.stderr
        one_go = train(**OPTIONS, log_every=100, on_nonfinite="skip", output="one_go")
    assert same(skipped.unet(), one_go.unet())
    assert skipped.losses() == one_go.losses()
    assert all(bool(value.isfinite().all()) for value in skipped.unet().values())


def test_a_skipped_step_moves_nothing(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_steps(monkeypatch, {2, 3})
    weights = watch(monkeypatch)
    run = train(**OPTIONS | {"checkpointing_steps": 1}, on_nonfinite="skip", lr_scheduler="linear", lr_warmup_steps=0)
    assert not same(weights[0], weights[1])
    assert same(weights[1], weights[2])
    assert same(weights[2], weights[3])
    assert not same(weights[3], weights[4])
    for part in ("optimizer", "ema"):
        assert same(run.checkpoint(1, part), run.checkpoint(3, part))
    states = [json.loads((run.folder / f"checkpoint-{n}" / "state.json").read_text()) for n in (1, 3, 4)]
    assert [state["skips"] for state in states] == [0, 2, 0]
    assert states[0]["auto_weight"] == states[1]["auto_weight"]
    assert states[0]["schedule"] == states[1]["schedule"]
    assert list(run.losses()["train_loss"]) == [1, 4, 5]
    assert run.stderr.count("the step is skipped") == 2


def test_more_skips_in_a_row_than_allowed_stop(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_steps(monkeypatch, {1, 3, 4, 5})
    failed = train(**OPTIONS, on_nonfinite="skip", max_skips=2, expect_error=True)
    assert failed.code == 3
    assert "not finite at step 5" in failed.errors[0]
    assert "more steps in a row were skipped than --max_skips 2" in failed.errors[0]
    assert "checkpoint-4 is the last checkpoint" in failed.errors[0]
    # The count goes on where it was.
    again = train(**OPTIONS, on_nonfinite="skip", max_skips=2, expect_error=True)
    assert "more steps in a row" in again.errors[0]
    assert train(**OPTIONS, on_nonfinite="skip", max_skips=3).code == 0


def test_dump_reproduces_the_step(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very inputs of the network, and the loss that follows from them and the checkpoint."""
    inputs: list[dict[str, torch.Tensor]] = []
    spoil_steps(monkeypatch, {2})
    spoiled = TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda *a: (spy_only(inputs, a), spoiled(*a))[1])
    options = OPTIONS | {"gradient_accumulation_steps": 2}
    failed = train(**options, expect_error=True)
    path: Path = failed.folder / "nonfinite-step-2.safetensors"
    found = load_file(path)
    for i, expected in enumerate(inputs[2:4]):
        for name, value in expected.items():
            assert torch.equal(found[f"{i}.{name}"], value), name
        assert found[f"{i}.diffusion_per_sample"].isinf().tolist() == [False, True]
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["step"], about["seed"], len(about["samples"])) == (2, 0, 2)
    assert "not finite at step 2" in about["fault"]


def spy_only(inputs: list[dict[str, torch.Tensor]], args: tuple[Any, ...]) -> None:
    step, _, batch = args[:3]
    noise, levels = step.draw(batch)
    inputs.append({"raw_latents": batch.raw_latents, **batch.extra, "noise": noise, "timesteps": levels})
    inputs[-1] |= {f"text.{name}": value for name, value in batch.text.items()}


def test_dumps_of_skipped_steps_are_few(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpl.training.nonfinite.DUMPS", 2)
    spoil_steps(monkeypatch, {1, 2, 4, 5})
    run = train(**OPTIONS, on_nonfinite="skip")
    assert DUMPS == 20
    assert len(list(run.folder.glob("nonfinite-step-*.safetensors"))) == 2


def test_float16_decoder_that_overflows_names_itself(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lpl.perceptual.objective import PerceptualObjective

    original = PerceptualObjective.__call__

    def overflown(self: Any, *args: Any, **options: Any) -> Any:
        term = original(self, *args, **options)
        return term._replace(loss=term.loss + float("inf"))

    monkeypatch.setattr(PerceptualObjective, "__call__", overflown)
    failed = train(lpl_dtype="float16", lpl_t_threshold=1000, expect_error=True)
    assert "LPL was not finite at step 1" in failed.errors[0]
    assert "its float16 decoder overflowed; --lpl_dtype bfloat16 or float32 does not overflow" in failed.errors[0]
