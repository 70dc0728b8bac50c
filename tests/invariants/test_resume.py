"""A run that was interrupted ends as if it had not been, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

STEPS, EVERY = 10, 5
# Six samples, four a step: step 5 ends inside the fourth epoch.
OPTIONS = {
    "max_train_steps": STEPS,
    "checkpointing_steps": EVERY,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lpl_weight": "auto",
    "random_flip": True,
    "crop_variants": 2,
    "proportion_empty_prompts": 0.2,
    "noise_offset": 0.05,
}
VARIANTS = {
    "full": {"use_ema": True, "ema_decay": 0.9, "snr_gamma": 5.0},
    "lora": {"rank": 2, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 7, "lpl_budget": 0.3},
}


class Killed(BaseException):
    """Stands for the end of the process: nothing of the trainer catches it."""


def kill_at(step: int, patch: pytest.MonkeyPatch) -> None:
    from lpl.training.trainer import Trainer

    original = Trainer._optimizer_step

    def dying(self: Trainer) -> Any:
        if self.step == step:
            raise Killed
        return original(self)

    patch.setattr(Trainer, "_optimizer_step", dying)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def assert_same_end(run: Any, expected: Any, parts: tuple[str, ...]) -> None:
    assert same(run.unet(), expected.unet())
    for part in parts:
        assert same(run.checkpoint(STEPS, part), expected.checkpoint(STEPS, part)), part
    states = [json.loads((r.folder / f"checkpoint-{STEPS}" / "state.json").read_text()) for r in (run, expected)]
    assert states[0] == states[1]
    assert run.losses() == expected.losses()
    assert list(run.losses()["train_loss"]) == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def full(train_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The whole run of the variant of that name; not to be changed."""
    return train_in(tmp_path_factory.mktemp("full") / "whole", **OPTIONS | VARIANTS["full"])


def parts_of(options: dict[str, Any]) -> tuple[str, ...]:
    return ("model", "optimizer", "ema") if options.get("use_ema") else ("model", "optimizer")


@pytest.mark.parametrize("name", VARIANTS)
def test_five_steps_and_five_more_equal_ten(
    train: Any, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpl.perceptual.budget.MEASURED_SAMPLES", 3)
    variant = OPTIONS | VARIANTS[name]
    whole = train(**variant, output="whole")
    half = train(**variant | {"max_train_steps": EVERY}, output="halves")
    assert not same(half.unet(), whole.unet())
    resumed = train(**variant, resume_from_checkpoint="latest", output="halves")
    last = [line for line in caplog.messages if line.startswith("LPL had ")]
    assert last[0] == last[2] == caplog.messages[-3]  # of the whole run, not of what was continued
    assert last[0] != last[1]
    assert_same_end(resumed, whole, parts_of(variant))
    if "lpl_budget" in variant:
        kept = [json.loads((half.folder / f"checkpoint-{n}" / "state.json").read_text())["budget"] for n in (5, 10)]
        assert kept[0]["measured"] > 0
        assert kept[1]["fixed"]


def test_the_same_command_continues_a_killed_run(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = OPTIONS | VARIANTS["full"] | {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
    whole = train(**options, output="whole")
    with monkeypatch.context() as patch:
        kill_at(7, patch)
        with pytest.raises(Killed):
            train(**options)
    again = train(**options)
    assert_same_end(again, whole, parts_of(options))
    assert again.counts() == whole.counts()
    before = {p: p.stat().st_mtime_ns for p in again.folder.rglob("*") if p.is_file()}
    idle = train(**options)
    assert "nothing to do" in idle.stdout
    assert {p: p.stat().st_mtime_ns for p in idle.folder.rglob("*") if p.is_file()} == before


def test_a_kill_while_a_checkpoint_is_written_loses_nothing(
    train: Any, full: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = OPTIONS | VARIANTS["full"]

    def dying(path: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        kill_at(7, patch)
        with pytest.raises(Killed):
            train(**options)
    with monkeypatch.context() as patch:
        patch.setattr("lpl.config.run_folder.sync_file", dying)
        with pytest.raises(Killed):
            train(**options)
    folder = tmp_path / "out"
    assert [p.name for p in folder.glob("checkpoint-*")] == [f"checkpoint-{EVERY}"]
    # A folder that has the name but not the end of a checkpoint, as a full disk may leave it.
    cut = Path(shutil.copytree(folder / f"checkpoint-{EVERY}", folder / "checkpoint-9"))
    (cut / "manifest.json").unlink()
    again = train(**options)
    assert "checkpoint-9 is damaged (manifest.json is missing): it is passed over" in again.stderr
    assert_same_end(again, full, parts_of(options))


def test_a_named_checkpoint_is_gone_back_to(train: Any) -> None:
    options = OPTIONS | {"checkpointing_steps": 4}
    whole = train(**options)
    expected, newest = whole.unet(), whole.checkpoint(8, "model")
    (whole.folder / "finished.json").unlink()
    again = train(**options, resume_from_checkpoint="checkpoint-4")
    assert same(again.unet(), expected)
    assert same(again.checkpoint(8, "model"), newest)
    assert list(again.losses()["train_loss"]) == list(range(1, STEPS + 1))


def test_epochs_may_be_added(train: Any) -> None:
    """Six samples, four a step: one epoch takes 2 steps, three take 5."""
    options = OPTIONS | {"max_train_steps": None, "checkpointing_steps": 1}
    whole = train(**options, num_train_epochs=3, output="whole")
    first = train(**options, num_train_epochs=1)
    assert list(first.losses()["train_loss"]) == [1, 2]
    more = train(**options, num_train_epochs=3)
    assert same(more.unet(), whole.unet())
    assert list(more.losses()["train_loss"]) == [1, 2, 3, 4, 5]
    assert "nothing to do" in train(**options, num_train_epochs=2).stdout


def test_length_may_not_change_where_it_enters_the_schedule(train: Any) -> None:
    options = OPTIONS | {"max_train_steps": 2, "lr_scheduler": "linear", "lr_warmup_steps": 0}
    train(**options)
    failed = train(**options | {"max_train_steps": 4}, expect_error=True)
    assert "--max_train_steps 2 -> 4" in failed.errors[0]


@pytest.mark.parametrize("log_every", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_logged_losses_of_a_killed_run_are_those_of_a_whole_one(
    train: Any, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """Checkpoints fall between logs, and the kill between checkpoints; no step is shown twice."""
    options = OPTIONS | VARIANTS["full"] | {"log_every": log_every, "checkpointing_steps": 5}
    whole = train(**options, output="whole")
    with monkeypatch.context() as patch:
        kill_at(9, patch)
        with pytest.raises(Killed):
            train(**options)
    again = train(**options)
    names = set(whole.logged()) - {"samples_per_second"}
    assert {n: again.logged()[n] for n in names} == {n: whole.logged()[n] for n in names}
    assert again.counts() == whole.counts()
    assert list(whole.losses()["train_loss"]) == sorted({1, *range(log_every, STEPS + 1, log_every), STEPS})
