"""A run of so many steps: it learns, resumes where it stopped as if it had not, and stops at its last step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tools.demo_weights.base import BaseModel, EncodedCrops, fit_base
from tools.demo_weights.training_run import TrainingRun


def make_run(checkpoint: Path, steps: int) -> TrainingRun:
    torch.manual_seed(0)
    return TrainingRun(nn.Linear(4, 1), checkpoint, steps, learning_rate=0.05, ema_decay=0.9, warmup=5)


def fit(run: TrainingRun, stop_at: int | None = None) -> None:
    """Fit y = sum of x."""

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        if step == stop_at:
            raise InterruptedError
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = (run.module(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}

    run.fit(loss_of)


def test_run_learns_and_averages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run.pt", 300)
    fit(run)
    assert run.step == 300
    torch.testing.assert_close(run.average.weight, torch.ones(1, 4), atol=0.2, rtol=0.0)
    assert not any(parameter.requires_grad for parameter in run.average.parameters())


def test_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, stopped = make_run(tmp_path / "whole.pt", 40), make_run(tmp_path / "stopped.pt", 40)
    fit(whole)
    stopped.save_every = 0.0
    with pytest.raises(InterruptedError):
        fit(stopped, stop_at=17)
    again = make_run(tmp_path / "stopped.pt", 40)
    assert again.step == 17
    fit(again)
    assert torch.equal(again.average.weight, whole.average.weight)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_step_in_parts_is_the_same_step(parts: int, tmp_path: Path) -> None:
    captions = ("a red bird", "a blue house", "trees")
    torch.manual_seed(1)
    data = EncodedCrops(torch.randn(12, 16, 8, 8), torch.rand(12, 16, 8, 8), torch.arange(12) % 3)
    found = []
    for count in (1, parts):
        torch.manual_seed(0)
        run = TrainingRun(BaseModel(captions, (16, 16)), tmp_path / f"{count}.pt", 1, learning_rate=1e-3)
        fit_base(run, captions, data, batch=6, parts=count)
        moments = [run.optimizer.state[p]["exp_avg"] for p in run.module.parameters() if p in run.optimizer.state]
        found.append(torch.cat([moment.flatten() for moment in moments]))
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
