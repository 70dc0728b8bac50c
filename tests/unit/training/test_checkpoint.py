"""Checkpoints: whole or not there, and what comes back is what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lpl.config import OptimConfig
from lpl.errors import UserError
from lpl.training.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from lpl.training.ema import Average


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
    assert files == ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]


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
        with pytest.raises(OSError, match="disk full"):
            training.save(tmp_path, 4, limit=1)
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
