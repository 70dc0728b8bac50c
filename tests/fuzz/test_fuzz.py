"""Whatever a file holds, the outcome is right, or a line for each fault and exit code 2, 3 or 4; in time and 2 GiB.

LPL_FUZZ=N tries N changes of each kind of file, LPL_FUZZ_FROM=M begins at change number M.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fuzz_kinds import KINDS, Base, Kind
from fuzz_mutations import mutated

from lpl.base.errors import StopRequestedError, TrainingStoppedError, UserError

SECONDS, STUCK = 30, 300
"""For one file; and after which even what Python cannot interrupt ends."""
MEMORY = 2 * 2**30
ASKED, FIRST = int(os.environ.get("LPL_FUZZ", "0")), int(os.environ.get("LPL_FUZZ_FROM", "0"))


class TooLongError(BaseException):
    """It took longer than SECONDS."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Ends what takes too long, and gives no more than MEMORY."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TooLongError

    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(STUCK, exit=True)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def fault_of(act: Any, right: bool = False) -> str | None:
    """What is wrong with the outcome; None: nothing. Of a file that is right, that it is refused, too."""
    try:
        with limits():
            found = act()
    except (UserError, TrainingStoppedError, StopRequestedError) as error:
        if right:
            return f"refused: {error}"
        return f"more than one line: {str(error)!r:.300}" if "\n" in str(error) else None
    except TooLongError:
        return f"longer than {SECONDS} s\n{traceback.format_exc(limit=-3)}"
    except MemoryError:
        return f"beyond {MEMORY / 2**30:g} GiB\n{traceback.format_exc(limit=-3)}"
    except BaseException:  # noqa: BLE001 (whatever it is, a user would see it)
        return traceback.format_exc(limit=-6)
    if isinstance(found, tuple):
        code, out, err = found
        if right and code != 0:
            return f"refused: {err[-2000:]}"
        told = [line for line in err.splitlines() if line.startswith("error: ")]
        if code not in (0, 2, 3, 4) or "Traceback" in err or (code != 0 and not told):
            return f"exit code {code}\n{err[-2000:]}"
        shown = (out + err).replace("\x1b[A", "")  # bars below each other
        if any(letter < " " and letter not in "\n\t\r" for letter in shown):
            return f"raw control characters: {shown!r:.500}"
    return None


@pytest.fixture(scope="session")
def run(train_in: Any, shared: Path, request: pytest.FixtureRequest) -> Path:
    """A run of two steps, with checkpoints and validation, and the cache it has filled."""
    options = {"validation_samples": 2, "validation_steps": 1, "checkpointing_steps": 1, "use_ema": True}
    train_in(shared / "fuzzed-run", **options, latent_cache_dir=shared / "fuzzed-cache")
    return shared / "fuzzed-run"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace(" ", "-"))
def test_one_line_whatever_the_file_holds(
    kind: Kind, run: Path, model: Path, data: Path, shared: Path, run_cli: Any, tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    file, act = kind.prepare(Base(tmp_path / "own", model, data, run, shared / "fuzzed-cache", run_cli))
    original = file.read_bytes()
    fault = fault_of(act, right=True)
    assert fault is None, f"{kind.name}, as it should be: {fault}"
    faults = []
    for number in range(FIRST, FIRST + (ASKED or kind.count)):
        way, content = mutated(original, kind.ways, kind.name, number)
        file.write_bytes(content)
        fault = fault_of(act)
        if fault is not None:
            kept = tmp_path / f"{number}-{file.name}"
            kept.write_bytes(content)
            faults.append(f"{kind.name}, {way}, LPL_FUZZ_FROM={number} LPL_FUZZ=1, {kept}: {fault}")
    file.write_bytes(original)
    assert not faults, f"{len(faults)} faults\n" + "\n\n".join(faults[:10])
