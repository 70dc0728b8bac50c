"""Where the cache folder is, and the locks by which runs and maintenance share it."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lpl.base.errors import UserError
from lpl.config import DataConfig


def default_cache_dir() -> Path:
    """The user's cache folder for this package: $XDG_CACHE_HOME/lpl, or ~/.cache/lpl."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lpl"


def cache_dir(config: DataConfig) -> Path:
    """--latent_cache_dir, or the default."""
    return Path(config.latent_cache_dir) if config.latent_cache_dir else default_cache_dir()


LOCK = "lock"
IN_USE, RUN = "in-use", ".run"
"""Folder of a cache in which every run that uses it holds a lock of its own, with this ending."""
POLL_S, MAINTENANCE_S = 0.2, 5.0

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
    lock = FileLock(folder / LOCK, timeout=0)
    waits = False
    while not lock.is_locked:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            if not waits:
                logger.warning("another run is %s: waiting for it", doing)
            waits = True
            proceed()
            time.sleep(POLL_S)
        except OSError as error:
            raise UserError(
                f"cache {folder} cannot be written ({error.strerror}): name another folder with --latent_cache_dir"
            ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def in_use(cache: Path) -> Iterator[None]:
    """Keeps maintenance away from a cache while a run uses it; in a launch, the first process does so for all.

    A cache that this user cannot write is used without a lock.
    """
    folder = cache / IN_USE
    own = FileLock(folder / f"{uuid.uuid4().hex}{RUN}", timeout=0)
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if os.environ.get("RANK", "0") == "0" and os.access(parent, os.W_OK):
        with locked(folder, "removing files from the cache"):
            own.acquire()
    try:
        yield
    finally:
        if own.is_locked:
            Path(own.lock_file).unlink()
            own.release()


@contextmanager
def maintenance(cache: Path) -> Iterator[None]:
    """Keeps runs from beginning to use a cache; raises UserError if one is using it, or other maintenance goes on."""
    folder, flag = cache / IN_USE, f"--latent_cache_dir {cache}"
    with ExitStack() as stack:
        try:
            folder.mkdir(exist_ok=True)
            stack.enter_context(FileLock(folder / LOCK, timeout=MAINTENANCE_S))
            for file in folder.glob(f"*{RUN}"):
                with FileLock(file, timeout=0):
                    file.unlink()  # of a run that was killed
        except Timeout as error:
            raise UserError(f"{flag}: another lpl command is using it: wait for its end") from error
        except OSError as error:
            raise UserError(f"{flag}: cannot be written ({error.strerror})") from error
        yield
