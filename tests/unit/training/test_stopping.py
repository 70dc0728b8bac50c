"""Stopping by signals and by the clock: where, with which exit code, and with nothing lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lpl.families.sdxl as sdxl
from lpl.base.errors import DamagedCacheError, StopRequestedError
from lpl.data.filling import Filler
from lpl.training import stopping
from lpl.training.engine import Batches
from lpl.training.trainer import Trainer

STEPS = 6
OPTIONS = {"max_train_steps": STEPS, "train_batch_size": 2, "use_ema": True, "log_every": 4}
SIGNALS = [signal.SIGTERM, signal.SIGINT]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def signal_at(step: int, number: int, patch: pytest.MonkeyPatch) -> None:
    """Sends this process a signal in the middle of an optimizer step, counted from 1."""
    original = Trainer._optimizer_step

    def signalled(self: Trainer) -> Any:
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        return original(self)

    patch.setattr(Trainer, "_optimizer_step", signalled)


def test_a_signal_saves_at_the_next_boundary_and_the_same_command_continues(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The boundary is no multiple of checkpointing_steps, nor of log_every."""
    whole = train(**OPTIONS, output="whole")
    before = [signal.getsignal(n) for n in SIGNALS]
    with monkeypatch.context() as patch:
        signal_at(3, signal.SIGINT, patch)
        stopped = train(**OPTIONS, expect_error=True)
    assert stopped.code == 4
    assert stopped.stderr.splitlines()[-1] == "stopped at step 3: the same command continues"
    assert stopped.errors == []
    assert [p.name for p in stopped.folder.glob("*checkpoint-*")] == ["checkpoint-3"]
    assert [signal.getsignal(n) for n in SIGNALS] == before
    again = train(**OPTIONS)
    assert same(again.unet(), whole.unet())
    assert again.losses() == whole.losses()
    assert list(again.losses()["train_loss"]) == [1, 4, STEPS]


def test_stopped_at_the_last_step_only_the_result_is_left_to_write(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(**OPTIONS, output="whole")
    with monkeypatch.context() as patch:
        signal_at(STEPS, signal.SIGTERM, patch)
        stopped = train(**OPTIONS, expect_error=True)
    assert (stopped.code, (stopped.folder / "unet").exists()) == (4, False)
    monkeypatch.setattr(Trainer, "_optimizer_step", None)
    assert same(train(**OPTIONS).unet(), whole.unet())


def test_a_damaged_cache_saves_the_steps_before_it(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the middle of an accumulated step: exit 3; at the first step there is nothing to save, and it is 2."""
    options = OPTIONS | {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    whole = train(**options, output="whole")
    original = Batches.batch
    for damaged, code in ((0, 2), (3, 3)):

        def batch(self: Batches, step: int, micro_batch: int, damaged: int = damaged) -> Any:
            if (step, micro_batch) == (damaged, 1):
                raise DamagedCacheError("cache file x is damaged")
            return original(self, step, micro_batch)

        with monkeypatch.context() as patch:
            patch.setattr(Batches, "batch", batch)
            stopped = train(**options, expect_error=True)
        assert stopped.code == code
        assert "cache file x is damaged" in stopped.stderr.splitlines()[-1]
        assert [p.name for p in stopped.folder.glob("*checkpoint-*")] == (["checkpoint-3"] if damaged else [])
    assert "checkpoint-3 is the last checkpoint" in stopped.stderr
    assert same(train(**options).unet(), whole.unet())


def test_minutes_run_out(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer._optimizer_step

    def slow(self: Trainer) -> Any:
        norm = original(self)
        if self.step == 1:
            self.stop._deadline = time.monotonic() - 1
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimizer_step", slow)
        stopped = train(**OPTIONS, max_minutes=60, expect_error=True)
    assert (stopped.code, stopped.stderr.splitlines()[-1]) == (4, "stopped at step 2: the same command continues")
    none = train(**OPTIONS, max_minutes=1e-9, expect_error=True)
    assert none.stderr.splitlines()[-1] == "stopped at step 2: the same command continues"
    assert train(**OPTIONS, max_minutes=60).code == 0


def test_a_signal_while_images_are_drawn_draws_them_the_next_time(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdxl.SDXL, "steps", 3)
    options = OPTIONS | {"validation_prompt": "a pattern", "validation_steps": 2, "num_validation_images": 1}
    whole = train(**options, output="whole")
    original, calls = sdxl.SDXL.sample, []

    def signalled(self: Any, *args: Any) -> Any:
        *rest, proceed = args

        def counted() -> None:
            calls.append(1)
            if len(calls) == 2 * 4 + 2:  # of the first image of step 2: before it, and after its first step
                os.kill(os.getpid(), signal.SIGTERM)
            proceed()

        return original(self, *rest, counted)

    with monkeypatch.context() as patch:
        patch.setattr(sdxl.SDXL, "sample", signalled)
        stopped = train(**options, expect_error=True)
    assert len(calls) == 10
    assert (stopped.code, stopped.stderr.splitlines()[-1]) == (4, "stopped at step 2: the same command continues")
    assert [path.name for path in (stopped.folder / "samples").iterdir()] == ["step-0000000.png"]
    again = train(**options)
    assert same(again.unet(), whole.unet())
    images = [{p.name: p.read_bytes() for p in (r.folder / "samples").iterdir()} for r in (again, whole)]
    assert images[0] == images[1]
    assert len(images[0]) == 4


@pytest.mark.parametrize("command", ["train", "cache"])
def test_a_signal_while_caching_keeps_what_is_encoded(
    run_cli: Any, as_flags: Any, base_options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("lpl.data.filling.ENCODE_IMAGES", 2)
    options = base_options | {"latent_cache_dir": tmp_path / "cache", "output_dir": tmp_path / "out"}
    original, encoded = Filler._encode_images, []

    def signalled(self: Filler, batch: Any) -> Any:
        made = original(self, batch)
        if not encoded:
            os.kill(os.getpid(), signal.SIGINT)
        encoded.extend(batch)
        return made

    monkeypatch.setattr(Filler, "_encode_images", signalled)
    code, _, err = run_cli([command, *as_flags(options)])
    assert (code, err.splitlines()[-1]) == (4, "stopped while caching: the same command continues")
    assert len(encoded) == 2
    code, _, err = run_cli([command, *as_flags(options)])
    assert (code, len(encoded)) == (0, 6), err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_leaves_at_once(number: int) -> None:
    child = os.fork()
    if not child:
        with stopping.stoppable():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), number)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


def test_a_launchers_echo_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop = stopping.Stop()
    stop.handle(signal.SIGINT, None)
    stop.handle(signal.SIGTERM, None)
    assert (stop.asked, left) == (True, [])
    monkeypatch.setattr(stopping, "ECHO_S", -1.0)
    stop.handle(signal.SIGINT, None)
    assert left == [130]


def test_the_clock_alone_asks_too() -> None:
    stop = stopping.Stop(1e-9)
    time.sleep(0.001)
    with pytest.raises(StopRequestedError, match="same command continues"):
        stop.raise_if_asked()
    assert not stopping.Stop(1.0).agreed()


def _vote(results: Any) -> None:
    from accelerate import PartialState

    PartialState._reset_state()  # the parent's
    state = PartialState(cpu=True)
    stop = stopping.Stop()
    answers = [stop.agreed()]
    if state.process_index == 1:
        stop.handle(signal.SIGTERM, None)
    answers.append(stop.agreed())
    results[state.process_index] = answers


def test_processes_agree_on_the_step() -> None:
    """One of two has had a signal: both stop, at the same boundary."""
    from accelerate import debug_launcher

    results = torch.multiprocessing.get_context("fork").Manager().dict()
    debug_launcher(_vote, (results,), num_processes=2)
    assert dict(results) == {0: [False, True], 1: [False, True]}
