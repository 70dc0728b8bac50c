"""Checkpoints: whole or not there, and what comes back is what was saved."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lpl.base.errors import TrainingStoppedError, UserError
from lpl.config import OptimConfig
from lpl.config.run_folder import find_checkpoint, list_checkpoints
from lpl.training.checkpoint import full_disk, load_checkpoint, recover, save_checkpoint
from lpl.training.weights import Average


class Training:
    """A small network with its optimizer and average after some steps."""

    def __init__(self, seed: int, steps: int = 3) -> None:
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        self.parameters = dict(self.net.named_parameters())
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.1 * (seed + 1))
        self.ema = Average(list(self.net.parameters()), OptimConfig(ema_decay=0.9))
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.net(torch.arange(6.0).view(2, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(list(self.net.parameters()))

    def save(self, folder: Path, step: int, limit: int | None = None, **state: Any) -> Path:
        return save_checkpoint(folder, step, self.parameters, self.optimizer, self.ema, state, limit)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_round_trip_and_the_steps_after_it(tmp_path: Path) -> None:
    saved, other = Training(0), Training(1, steps=1)
    path = saved.save(tmp_path, 3, schedule={"last_epoch": 3}, auto_weight=None)
    assert path == tmp_path / "checkpoint-3"
    assert not same(saved.optimizer.state_dict(), other.optimizer.state_dict())
    state = load_checkpoint(path, other.parameters, other.optimizer, other.ema)
    assert state == {"step": 3, "schedule": {"last_epoch": 3}, "auto_weight": None}
    for _ in range(2):
        assert same(dict(saved.net.state_dict()), dict(other.net.state_dict()))
        assert same(saved.optimizer.state_dict(), other.optimizer.state_dict())
        assert same(saved.ema.state_dict(), other.ema.state_dict())
        saved.step()
        other.step()


def test_nothing_is_pickled(tmp_path: Path) -> None:
    files = sorted(p.name for p in Training(0).save(tmp_path, 1).iterdir())
    assert files == ["ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_newest_complete_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    training = Training(0)
    for step in (9, 10, 2):
        training.save(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()  # no state.json: never finished
    (tmp_path / ".tmp-checkpoint-12").mkdir()
    (tmp_path / ".tmp-checkpoint-12" / "state.json").write_text("{}")
    (tmp_path / "checkpoint-x").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    for choice in (None, "latest"):
        assert find_checkpoint(tmp_path, choice) == tmp_path / "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path / "elsewhere", str(tmp_path / "checkpoint-2")) == tmp_path / "checkpoint-2"
    assert find_checkpoint(tmp_path / "elsewhere", "latest") is None
    with pytest.raises(UserError, match=r"checkpoint-11: no complete .* has checkpoint-2, checkpoint-9, checkpoint-10"):
        find_checkpoint(tmp_path, "checkpoint-11")


def test_old_checkpoints_go_only_when_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(0)
    for step in (1, 2, 3):
        training.save(tmp_path, step, limit=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    with monkeypatch.context() as patch:
        patch.setattr("lpl.training.checkpoint.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(TrainingStoppedError, match=r"-4 cannot be written \(disk full\); .*checkpoint-3 is "):
            training.save(tmp_path, 4, limit=1)
    assert [p.name for p in tmp_path.glob(".*")] == []
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    training.save(tmp_path, 4, limit=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    training = Training(0)
    path = training.save(tmp_path, 1)
    fewer = {name: p for name, p in training.parameters.items() if name != "0.bias"}
    for parameters in (fewer, training.parameters | {"extra": torch.zeros(1)}):
        with pytest.raises(UserError, match="other parameters than this run trains"):
            load_checkpoint(path, parameters, training.optimizer, training.ema)
    with pytest.raises(UserError, match="with --use_ema"):
        load_checkpoint(path, training.parameters, training.optimizer, None)


@pytest.mark.parametrize("name", ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("what", ["bit", "cut", "gone"])
def test_damage_is_recognised_and_the_checkpoint_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, what: str
) -> None:
    training = Training(0)
    for step in (1, 2):
        training.save(tmp_path, step)
    file = tmp_path / "checkpoint-2" / name
    content = bytearray(file.read_bytes())
    if what == "gone":
        file.unlink()
    elif what == "cut":
        file.write_bytes(content[:-1])
    else:
        content[-3] ^= 1
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "lpl"):
        assert find_checkpoint(tmp_path, None) == tmp_path / "checkpoint-1"
    fault = {
        "gone": f"{name} is missing",
        "cut": f"{name} has {len(content) - 1} of {len(content)} bytes",
        "bit": f"{name} does not match its checksum",
    }[what]
    assert caplog.messages == [f"{tmp_path / 'checkpoint-2'} is damaged ({fault}): it is passed over"]
    if what != "gone" or name != "state.json":
        with pytest.raises(UserError, match="checkpoint-2 is damaged"):
            find_checkpoint(tmp_path, "checkpoint-2")


def test_a_damaged_manifest_is_damage(tmp_path: Path) -> None:
    training = Training(0)
    for step, content in ((1, None), (2, "{"), (3, "[]"), (4, '{"state.json": 3}')):
        path = training.save(tmp_path, step)
        if content is not None:
            (path / "manifest.json").write_text(content)
    assert find_checkpoint(tmp_path, None) == tmp_path / "checkpoint-1"
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    with pytest.raises(UserError, match="every checkpoint in it is damaged"):
        find_checkpoint(tmp_path, "latest")


def test_limit_counts_good_checkpoints_only(tmp_path: Path) -> None:
    training = Training(0)
    for step in (1, 2, 3):
        training.save(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"cut")
    training.save(tmp_path, 4, limit=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]


@pytest.mark.parametrize("before", [False, True])
def test_killed_before_the_rename_loses_nothing(tmp_path: Path, before: bool) -> None:
    """Also where a checkpoint of that step was there and has been moved aside."""
    training = Training(0)
    path = training.save(tmp_path, 3)
    if before:
        training.save(tmp_path, 2)
    path.rename(tmp_path / ".tmp-checkpoint-3")
    recover(tmp_path)
    assert find_checkpoint(tmp_path, None) == path
    (path / "manifest.json").unlink()
    path.rename(tmp_path / ".tmp-checkpoint-3")
    (tmp_path / ".tmp-old-checkpoint-1").mkdir()
    recover(tmp_path)
    assert not path.exists()
    assert list(tmp_path.glob(".tmp*")) == []


def test_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for the disk: safetensors meets the system's own error."""
    resource = pytest.importorskip("resource")
    training = Training(0)
    good = training.save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(TrainingStoppedError, match=r"-2 cannot be written \(.*; .*checkpoint-1 is the last"):
            training.save(tmp_path, 2, limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [good]
    assert find_checkpoint(tmp_path, None) == good


def test_full_disk_is_one_line_wherever_it_is_met(tmp_path: Path) -> None:
    Training(0).save(tmp_path, 1)
    errors = (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    )
    for error in errors:
        (tmp_path / ".tmp-result").mkdir()
        with (
            pytest.raises(TrainingStoppedError, match="-1 is the last checkpoint: make room"),
            full_disk(tmp_path),
        ):
            raise error
        assert not (tmp_path / ".tmp-result").exists()
    for other in (OSError(errno.ENOENT, "none"), safetensors.SafetensorError("invalid header")):
        with pytest.raises(type(other)), full_disk(tmp_path):
            raise other


def test_what_a_kill_left_beyond_the_limit_goes_at_the_next_start(train: Any) -> None:
    options = {"max_train_steps": 4, "checkpointing_steps": 2}
    run = train(**options)
    assert sorted(p.name for p in run.folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    train(**options | {"max_train_steps": 5, "checkpoints_total_limit": 1})
    assert [p.name for p in run.folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_going_on_from_an_older_checkpoint_removes_no_newer_one(train: Any) -> None:
    options = {"max_train_steps": 4, "checkpointing_steps": 2}
    run = train(**options)
    train(**options | {"max_train_steps": 3, "checkpoints_total_limit": 1, "resume_from_checkpoint": "checkpoint-2"})
    assert sorted(p.name for p in run.folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
