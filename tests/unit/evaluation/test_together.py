"""Every process of a launch ends alike, whichever of them finds a fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from launching import environment
from process_state import fresh_process_state

from lpl.base.errors import StopRequestedError, UserError
from lpl.evaluation.command import _processes, stop_together, together


def test_alone_it_is_the_call_itself() -> None:
    assert together(lambda: 3) == 3
    with pytest.raises(UserError, match="no"):
        together(lambda: fail("no"))
    with pytest.raises(StopRequestedError, match="late"):
        stop_together(lambda: True, "late")
    stop_together(lambda: False, "late")


def fail(message: str) -> None:
    raise UserError(message)


def process(folder: Path) -> None:
    accelerator = Accelerator()
    rank, told = accelerator.process_index, []
    for bad in ((1,), (0, 1), ()):
        try:
            told.append(f"found {together(lambda bad=bad: fail(f'fault of {rank}') if rank in bad else rank)}")
        except UserError as error:
            told.append(str(error))
    try:
        stop_together(lambda: rank == 1, "late")
    except StopRequestedError as stop:
        told.append(str(stop))
    (folder / str(rank)).write_text("; ".join(told))
    accelerator.end_training()


def test_the_fault_of_one_is_that_of_all(tmp_path: Path) -> None:
    with fresh_process_state(), environment({"ACCELERATE_USE_CPU": "true"}):
        debug_launcher(process, (tmp_path,), num_processes=2)
    told = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert told == [f"fault of 1; fault of 0; found {rank}; late" for rank in (0, 1)]


def test_metrics_are_measured_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with fresh_process_state(), _processes():
        assert not torch.backends.cudnn.allow_tf32
