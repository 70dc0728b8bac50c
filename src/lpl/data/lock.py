"""One writer at a time: a lock on a folder that a killed process cannot leave behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lpl.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs at the same time do work twice
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"

logger = logging.getLogger("lpl")


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Holds the lock of a folder, waiting for another process that has it; says so in the log.

    Args:
        folder: made if needed.
        doing: what the other process is doing, for the log.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise UserError(
            f"cache {folder} cannot be written ({error.strerror}): name another folder with --latent_cache_dir"
        ) from error
    with open(folder / LOCK, "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("another run is %s: waiting for it", doing)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
