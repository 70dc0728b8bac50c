"""Training in forked processes that are killed: after a given time, or at a call that changes what is on disk.

The parent has imported everything, so a child is at work at once. A child counts its steps and calls in memory that it
shares with the parent, where a kill leaves them.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir")
"""Functions of os that change what is on disk."""
HANG_S = 120


class Training:
    """Forked runs of `lpl train`.

    Args:
        main: runs the command line with these arguments, in this process.
        argv: of `lpl train`, without --output_dir.
    """

    def __init__(self, main: Callable[[list[str]], Any], argv: list[str]) -> None:
        self._main, self._argv = main, argv
        self._memory = mmap.mmap(-1, 16)

    def _add(self, place: int) -> int:
        value = struct.unpack_from("<q", self._memory, place)[0] + 1
        struct.pack_into("<q", self._memory, place, value)
        return value

    @property
    def steps(self) -> int:
        """Optimizer steps that the child has done."""
        return int(struct.unpack_from("<q", self._memory, 0)[0])

    @property
    def calls(self) -> int:
        """Calls that the child has made since its first step."""
        return int(struct.unpack_from("<q", self._memory, 8)[0])

    def start(self, folder: Path, kill_at: int | None = None) -> int:
        """Forks a run into a folder; returns its process id.

        Args:
            folder: --output_dir.
            kill_at: it kills itself before the call of this number, counted from 1 and from its first step.
        """
        struct.pack_into("<qq", self._memory, 0, 0, 0)
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            self._hook(kill_at)
            self._main(["train", f"--output_dir={folder}", *self._argv])
            status = 0
        except BaseException:  # noqa: BLE001 - nothing may run on in the child
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)

    def _hook(self, kill_at: int | None) -> None:
        from lpl.training.trainer import Trainer

        step = Trainer._optimizer_step

        def counted_step(trainer: Trainer) -> Any:
            norm = step(trainer)
            self._add(0)
            return norm

        Trainer._optimizer_step = counted_step  # type: ignore[method-assign]

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                if self.steps and self._add(8) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return call

        for name in CALLS:
            setattr(os, name, watched(getattr(os, name)))

    def wait_for_step(self, child: int) -> bool:
        """Waits for the child's first step; False: it ended before."""
        limit = time.monotonic() + HANG_S
        while not self.steps:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                assert status == 0, f"a run failed: its wait status is {status}"
                return False
            assert time.monotonic() < limit, "a run hangs"
            time.sleep(0.001)
        return True


def finished(child: int) -> bool:
    """Waits for a process; whether it came to its end rather than being killed.

    Raises:
        AssertionError: it failed.
    """
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"a run failed: its wait status is {status}"
    return status == 0
