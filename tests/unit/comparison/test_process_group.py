"""Runs of a comparison under a launcher: one process group for all of them."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from lpl.comparison.run import FORKED, _forget_run, one_process_group


def run() -> bool:
    """As every run does; whether there was a process group already."""
    before = torch.distributed.is_initialized()
    if not before:
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    accelerator = Accelerator(cpu=True)
    accelerator.end_training()
    _forget_run()
    return before


def test_runs_share_a_process_group_which_ends_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORKED, raising=False)
    with one_process_group():
        assert [run() for _ in range(3)] == [False, True, True]
    assert not torch.distributed.is_initialized()


def test_a_group_that_a_launcher_made_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORKED, "1")
    try:
        with one_process_group():
            run()
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
