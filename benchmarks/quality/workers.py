"""Processes of the benchmark, so many at a time, one core each; an interruption loses little.

While the file `pause` is in the output folder, all of them stand still.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.measure import Request, as_json
from benchmarks.quality.variants import OPTIONS as VARIANT_OPTIONS
from lpl.base.errors import UserError
from lpl.config.files import as_flags

ROOT = Path(__file__).parents[2]
DIVERGED, STOPPED = 3, 4


def as_texts(options: dict[str, Any]) -> dict[str, str]:
    """Values as they stand in a config file."""
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in options.items()}


class BudgetSpentError(Exception):
    """The minutes are over; the same command goes on."""


class DivergedError(UserError):
    """A training run ended with a loss that is not finite."""


@dataclass
class Workers:
    """Starts processes and waits for them.

    Attributes:
        number: at a time.
        budget_minutes: until processes are asked to end: training does with a checkpoint, a measurement loses the point
            it is at; None: no limit.
        pause: the file; None: there is none.
        lock: file descriptor of a lock that processes hold on to, should they outlive this one; None: no lock.
    """

    number: int = 2
    budget_minutes: float | None = None
    lock: int | None = None
    pause: Path | None = None
    _begun: float = field(default_factory=time.monotonic)
    _stop: threading.Event = field(default_factory=threading.Event)
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def left(self) -> float | None:
        """Minutes."""
        return None if self.budget_minutes is None else self.budget_minutes - (time.monotonic() - self._begun) / 60

    def check(self) -> None:
        """Raises BudgetSpentError if there is no time left to begin anything."""
        left = self.left()
        if self._stop.is_set() or (left is not None and left <= 0):
            raise BudgetSpentError

    def map(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """work(item) for all items, so many at a time; what has begun is ended before an exception is passed on."""
        with ThreadPoolExecutor(self.number) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException as error:
                if not isinstance(error, BudgetSpentError):  # a fault: the others stop with checkpoints
                    self.stop()
                for future in futures:
                    future.cancel()
                raise

    def stop(self) -> None:
        """Asks every process to end; training leaves a checkpoint."""
        self._stop.set()
        for process in list(self._running):
            process.terminate()

    def train(self, command: str, options: dict[str, Any], log: Path) -> None:
        """A run to its end, from where it was left.

        Args:
            command: the module, "lpl" or that of the variants.
            options: of `lpl train`, output_dir among them, and of variants.
            log: file that its output is appended to.

        Raises:
            BudgetSpentError: it was stopped, or the time was up before it began.
            UserError: it failed.
        """
        texts = as_texts(options)
        own = [f"--{name}={texts.pop(name)}" for name in list(texts) if name in VARIANT_OPTIONS]
        head = ["lpl", "train"] if command == "lpl" else [command, *own]
        self.call([*head, *as_flags(texts)], log)

    def measure(self, run: Path, folder: Path, weights: Path, request: Request, log: Path) -> None:
        """Figures of a finished run, into its folder; raises as train."""
        self.call(["benchmarks.quality.measure", str(run), str(folder), str(weights), as_json(request)], log)

    def floors(self, folder: Path, weights: Path, samples: int, log: Path) -> None:
        """Figures of real pictures, into the cache; raises as train."""
        self.call(["benchmarks.quality.measure", str(folder), str(weights), str(samples)], log)

    def call(self, arguments: list[str], log: Path) -> None:
        """A Python module with its arguments, on one core, to its end or the budget's; its output is appended to log.

        Raises:
            BudgetSpentError: it was stopped.
            UserError: it failed.
        """
        self.check()
        paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C comes from stop() alone: a second signal would end training at once
                pass_fds=[] if self.lock is None else [self.lock],
            )
            self._running.add(process)
            try:
                code = self._wait(process)
            finally:
                self._running.discard(process)
        if code == STOPPED or (code and self._stop.is_set()):
            raise BudgetSpentError
        if code:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            kind = DivergedError if code == DIVERGED else UserError
            raise kind(f"{arguments[0]} ended with code {code} ({lines[-1] if lines else ''}); see {log}")

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Its exit code; it is stopped while there is the file `pause`, and asked to end when the budget is spent."""
        paused = False
        while True:
            try:
                return process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                wanted = self.pause is not None and self.pause.exists()
                left = self.left()
                if left is not None and left <= 0 and not self._stop.is_set():
                    self.stop()
                if paused != (wanted and not self._stop.is_set()):
                    paused = not paused
                    process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)
