"""One writer at a time: a lock on a folder that a killed process cannot leave behind."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from lpl.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs at the same time do work twice
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
POLL_S = 0.2

logger = logging.getLogger("lpl")


@contextmanager
def locked(folder: Path, doing: str, proceed: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock of a folder, waiting for another process that has it; says so in the log.

    Args:
        folder: made if needed.
        doing: what the other process is doing, for the log.
        proceed: called while waiting; raises to stop.

    Raises:
        UserError: the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / LOCK, "w"))
        except OSError as error:
            raise UserError(
                f"cache {folder} cannot be written ({error.strerror}): name another folder with --latent_cache_dir"
            ) from error
        if fcntl is not None:
            waits = False
            while not _take(file):
                if not waits:
                    logger.warning("another run is %s: waiting for it", doing)
                waits = True
                proceed()
                time.sleep(POLL_S)
        yield


def _take(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
