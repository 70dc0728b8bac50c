"""Ending a run early without losing anything: SIGTERM, SIGINT and --max_minutes.

A signal only sets a flag. The trainer looks at it between two optimizer steps, caching between two batches, sampling
between two of its steps; what is under way there is finished, and nothing else is begun. A second signal ends the
process at once, as if there were no handler.

Several processes must stop at the same step, and a signal reaches them at different moments, or one of them only. Their
flags are therefore added up once a step, over a gloo group: processes wait for each other on the CPU, where the step's
gradient has made them meet anyway, and no device is synchronised.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from lpl.base.errors import StopRequestedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO_S = 5.0
"""Launchers forward a Ctrl-C to processes that already got it from the terminal: for so long it is the same one."""


class Stop:
    """Whether this run has been asked to end.

    Args:
        max_minutes: after this many minutes it is asked; None: only by signals.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal_at: float | None = None
        self._group: Any = None

    @property
    def asked(self) -> bool:
        """Whether this process has been asked, or its time is up."""
        return self._signal_at is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    def agreed(self) -> bool:
        """Whether any process of the run has been asked; all must call this equally often, and all get one answer."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return self.asked
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        flag = torch.tensor(int(self.asked))
        torch.distributed.all_reduce(flag, group=self._group)
        return bool(flag)

    def raise_if_asked(self) -> None:
        """For work that each process can end anywhere, on its own.

        Raises:
            StopRequestedError: this process has been asked.
        """
        if self.asked:
            raise StopRequestedError("stopped while caching: the same command continues")

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The handler: the first signal sets the flag, the second ends the process with 128 + its number."""
        now, name = time.monotonic(), signal.Signals(number).name
        if self._signal_at is None:
            self._signal_at = now
            _say(f"{name}: stopping as soon as nothing is lost; a second signal stops at once")
        elif "TORCHELASTIC_RUN_ID" not in os.environ or now - self._signal_at > ECHO_S:
            _say(f"{name} again: stopped at once; the same command continues from the last checkpoint")
            os._exit(128 + number)


@contextmanager
def stoppable(max_minutes: float | None = None) -> Iterator[Stop]:
    """Signals end the block gently; afterwards they do what they did before.

    Python delivers signals to the main thread alone: elsewhere only max_minutes acts.
    """
    stop = Stop(max_minutes)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    """Writes a line from within a handler, which may have interrupted any other writing."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{line}\n".encode())
