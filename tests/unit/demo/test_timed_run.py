"""A run with a budget of minutes: it learns, resumes where it stopped, and stops when the budget is spent."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lpl.demo.timed_run import TimedRun


def make_run(checkpoint: Path, seconds: float) -> TimedRun:
    torch.manual_seed(0)
    return TimedRun(nn.Linear(4, 1), checkpoint, seconds / 60, learning_rate=0.05, ema_decay=0.9, warmup=5)


def fit(run: TimedRun) -> None:
    """Fit y = sum of x."""

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = (run.module(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}

    run.fit(loss_of)


def test_run_learns_and_averages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run.pt", 1.0)
    fit(run)
    assert run.is_spent
    torch.testing.assert_close(run.average.weight, torch.ones(1, 4), atol=0.2, rtol=0.0)
    assert not any(parameter.requires_grad for parameter in run.average.parameters())


def test_run_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run.pt", 0.1)
    fit(run)
    again = make_run(tmp_path / "run.pt", 0.1)
    assert (again.step, again.spent) == (run.step, run.spent)
    assert torch.equal(again.average.weight, run.average.weight)
    fit(again)
    assert again.step == run.step
    longer = make_run(tmp_path / "run.pt", 0.2)
    fit(longer)
    assert longer.step > run.step
