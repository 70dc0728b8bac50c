"""One command at a time in a folder: locks of the operating system, which a killed process cannot leave behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from lpl.errors import UserError

LOCK = ".lpl.lock"


@contextmanager
def alone_in(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Holds a folder's lock for as long as a command writes into it; of a launch the first process does for all.

    The folder is made, and removed again where nothing else came into it.

    Raises:
        UserError: another command is at work there, or the folder cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{flag} {folder}: another lpl command is at work in it: wait for its end, or name another folder"
        ) from error
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        _end(lock)
        for path in takewhile(lambda path: not os.listdir(path), made):
            path.rmdir()


@contextmanager
def alone_at(file: Path, flag: str) -> Iterator[None]:
    """The same for a single file or folder that appears whole; the lock is beside it, and goes with its end.

    Raises:
        UserError: another command is writing it, or nothing can be written there.
    """
    lock = FileLock(file.with_name(f".{file.name}{LOCK}"), timeout=0)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{flag} {file}: another lpl command is writing it") from error
    except OSError as error:
        raise UserError(f"{flag} {file}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        _end(lock)


def _end(lock: BaseFileLock) -> None:
    """Releases a lock and leaves no file; who has opened that file already sees that it is gone, and tries anew."""
    if os.name == "posix":  # elsewhere an open file cannot be removed
        Path(lock.lock_file).unlink()
    lock.release()
