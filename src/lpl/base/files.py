"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from lpl.base.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

WINDOWS = os.name == "nt"
PATIENCE = 20
TEMPORARY = ".tmp"
PROBED = 4096
ELSEWHERE = ": make room there, or name another folder"
GONE = "gone"
"""The stamp of a file that does not exist or cannot be read."""


def write_atomically(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Writes a file under a temporary name, syncs and renames it; makes the folders.

    The temporary file is in `scratch`, on the same file system, or beside the file; it stays if the process is killed.

    Raises:
        OSError: it cannot be written; nothing is left behind then.
    """
    scratch = scratch or path.parent
    for folder in (scratch, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    temporary = scratch / f".{uuid.uuid4().hex}{TEMPORARY}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_file(path.parent)


def _replace(temporary: Path, path: Path) -> None:
    """os.replace; on Windows, where a file that another program reads cannot be replaced, tries for two seconds."""
    for _ in range(PATIENCE if WINDOWS else 0):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(0.1)
    os.replace(temporary, path)


def write_cached(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """write_atomically for a file of the cache; raises UserError."""
    with cache_writing(path.parent):
        write_atomically(path, data, scratch)


@contextmanager
def writing(what: str, remedy: str = "") -> Iterator[None]:
    """Turns a fault of the file system into a UserError: what cannot be written, why, and what to do (": ...")."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written ({error.strerror}){remedy}") from error


def cache_writing(folder: Path) -> AbstractContextManager[None]:
    """The same for a folder of the cache."""
    return writing(f"cache {folder}", f"{ELSEWHERE} with --latent_cache_dir")


def sync_file(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk, where the system supports it."""
    if WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows syncs no file opened to read
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def probe(path: str | Path) -> str:
    """A hash of a file's first, middle and last 4 KiB: tells apart files of the same size and time of change.

    Raises:
        OSError: it cannot be read.
    """
    found = xxhash.xxh3_64()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in sorted({0, max(0, size // 2 - PROBED // 2), max(0, size - PROBED)}):
            file.seek(start)
            found.update(file.read(PROBED))
    return found.hexdigest()


def status_of(file: os.DirEntry[str] | str) -> os.stat_result | None:
    """The status of a file, links followed; None if it does not exist."""
    try:
        return os.stat(file) if isinstance(file, str) else file.stat()
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return None


def stamp_of(status: os.stat_result | None, path: str | None = None) -> str:
    """A text without spaces that tells versions of a file apart: size, time of change, probe of `path`; or GONE."""
    try:
        probed = "" if status is None or path is None else f".{probe(path)}"
    except OSError:
        return GONE
    return GONE if status is None else f"{status.st_size:x}.{status.st_mtime_ns:x}{probed}"


def checksum(path: Path) -> str:
    """XXH3 (128 bits) of a file's content."""
    found = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            found.update(block)
    return found.hexdigest()


LOCK = ".lpl.lock"


@contextmanager
def alone_in(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Holds a folder's lock while a command writes into it; in a launch, the first process holds it for all.

    The folder is made, and removed again if nothing was written into it.

    Raises:
        UserError: another command is at work there, or the folder cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    busy = "another lpl command is at work in it: wait for its end, or name another folder"
    lock = _locked(folder / LOCK, f"{flag} {folder}", busy)
    try:
        yield
    finally:
        _end(lock)
        for path in takewhile(lambda path: not os.listdir(path), made):
            path.rmdir()


@contextmanager
def alone_at(file: Path, flag: str) -> Iterator[None]:
    """The same for a single file or folder that appears whole; the lock lies beside it until it is released.

    Raises:
        UserError: another command is writing it, or nothing can be written there.
    """
    lock = _locked(file.with_name(f".{file.name}{LOCK}"), f"{flag} {file}", "another lpl command is writing it")
    try:
        yield
    finally:
        _end(lock)


def _locked(file: Path, where: str, busy: str) -> BaseFileLock:
    from filelock import FileLock, Timeout  # not for --help

    lock = FileLock(file, timeout=0)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{where}: {busy}") from error
    except OSError as error:
        raise UserError(f"{where}: cannot be written ({error.strerror})") from error
    return lock


def _end(lock: BaseFileLock) -> None:
    """Releases a lock and removes its file; a process that has that file open sees that it is gone, and tries again."""
    if not WINDOWS:  # Windows cannot remove an open file
        Path(lock.lock_file).unlink()
    lock.release()
    if WINDOWS:
        with suppress(OSError):  # another command has it by now
            Path(lock.lock_file).unlink()


def write_output(path: Path, data: bytes, where: str) -> None:
    """write_atomically for the output of a command.

    Args:
        path: the file.
        data: its content.
        where: the option that named its place, with its value, for the message.

    Raises:
        UserError: it cannot be written.
    """
    with writing(f"{where}:"):
        write_atomically(path, data)
