"""Looking after a cache folder: finding damage, and removing what no run has used for long."""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from contextlib import nullcontext, suppress
from pathlib import Path

from lpl.base.errors import DamagedCacheError, UnreadCacheError, UserError
from lpl.base.files import cache_writing
from lpl.base.terminal import progress
from lpl.data.catalogue import FORMAT, read_table
from lpl.data.catalogue import SUFFIX as TABLE
from lpl.data.lock import default_cache_dir, maintenance
from lpl.data.shard import SUFFIX, Shard
from lpl.data.store import INDEX, verify_index

DAY = 24 * 3600
HASHED = re.compile(r"([0-9a-f]{32}|stride-\d+)(-\w+)*")
"""Names of the folders that caching makes; others are not lpl's."""


def verify_cache(folder: str | None, delete: bool) -> None:
    """Prints for every damaged file what is wrong, and removes it if asked.

    Raises:
        UserError: no such folder, with `delete` one that is in use, or damage that is still there.
    """
    cache = _existing(folder)
    with maintenance(cache) if delete else nullcontext():
        count, found, unread = damaged(cache)
        for wrong in (*(wrong for _, wrong in found), *unread):
            print(wrong)
        if delete:
            remove([path for path, _ in found])
    print(f"{cache}: {count} files, {len(found)} damaged{' and removed' if delete and found else ''}")
    if old := [path for path in stores(cache) if not of_this_format(path)]:
        print(f"{cache}: {len(old)} folders are of another version, which is not read: `lpl cache prune` removes them")
    if unread:
        raise UserError(f"cache {cache}: {len(unread)} of {count} files could not be read: correct their permissions")
    if found and not delete:
        raise UserError(f"cache {cache}: {len(found)} of {count} files are damaged: remove them with --delete")


def prune_cache(folder: str | None, days: float, dry_run: bool) -> None:
    """Removes what no run has used for `days` days, or says how much it would remove.

    Raises:
        UserError: no such folder, or one that is in use.
    """
    cache = _existing(folder)
    with nullcontext() if dry_run else maintenance(cache):
        paths, size = unused(cache, days)
        if not dry_run:
            remove(paths)
    print(f"{cache}: {len(paths)} files, {size / 2**30:.2f} GiB, {'would be removed' if dry_run else 'removed'}")


def _existing(folder: str | None) -> Path:
    cache = Path(folder) if folder else default_cache_dir()
    if not cache.is_dir():
        raise UserError(f"--latent_cache_dir {cache}: no such folder")
    return cache


def stores(cache: Path) -> list[Path]:
    """Folders of shards within a cache folder."""
    return [path for kind in ("latents", "text", "masks") for path in _hashed(cache / kind)]


def _hashed(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if HASHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink())


def of_this_format(store: Path) -> bool:
    """Whether a folder of shards is named as runs name theirs now: a hash, the format, perhaps a precision."""
    return f"{store.name}-".rpartition(f"{FORMAT}-")[1] != ""


def damaged(cache: Path) -> tuple[int, list[tuple[Path, str]], list[str]]:
    """Reads every file of a cache and compares it with its checksums, and indices with the shards.

    Returns:
        How many files there are; path and fault of those that are damaged; faults of those that could not be read.
    """
    found: dict[Path, str] = {}
    unread: dict[Path, str] = {}
    folders = [folder for folder in stores(cache) if of_this_format(folder)]
    staged = [folder for folder in (cache / "staged").glob("*/*/*") if folder.is_dir()]
    shards = [path for folder in (*folders, *staged) for path in sorted(folder.glob(f"[!.]*{SUFFIX}"))]
    tables = sorted((cache / "catalogues").glob(f"*/[!.]*{TABLE}"))
    indices = [path for folder in folders if (path := folder / INDEX).exists()]
    for path in progress([*shards, *tables, *indices], desc="verifying", unit="file"):
        try:
            if path.suffix == TABLE:
                read_table(path)
            elif path.name != INDEX:
                Shard(path).verify()
            elif not any(shard.parent == path.parent for shard in (*found, *unread)):
                verify_index(path.parent)
        except UnreadCacheError as error:
            unread[path] = str(error)
        except DamagedCacheError as error:
            if os.path.lexists(path):  # else a run has removed it meanwhile
                found[path] = str(error)
    return len(shards) + len(tables) + len(indices), list(found.items()), list(unread.values())


def unused(cache: Path, days: float) -> tuple[list[Path], int]:
    """Shards and catalogues that no run has used for `days` days, and what killed runs have left; and their bytes.

    A run that starts sets the time of change of the files that it uses.
    """
    limit = time.time() - days * DAY
    folders = [*stores(cache), *_hashed(cache / "catalogues")]
    paths = [path for folder in folders for path in folder.iterdir() if path.name != INDEX]
    paths += _hashed(cache / "staged")
    old = [path for path in sorted(paths) if max((s.st_mtime for s in _statuses(path)), default=0.0) < limit]
    return old, sum(s.st_size for path in old for s in _statuses(path) if not stat.S_ISDIR(s.st_mode))


def remove(paths: list[Path]) -> None:
    """Removes files and folders, and folders that are empty then; raises UserError if the cache cannot be written."""
    for path in paths:
        parent = path.parent
        with cache_writing(parent):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if all(entry.name == INDEX for entry in parent.iterdir()):
                shutil.rmtree(parent)


def _statuses(path: Path) -> list[os.stat_result]:
    """The status of a file, or of a folder and all that is in it, without what a run has removed since."""
    inside = path.rglob("*") if path.is_dir() else ()
    return [status for each in (path, *inside) if (status := _status(each)) is not None]


def _status(path: Path) -> os.stat_result | None:
    """The status of what a path or link leads to, or of a broken link itself; None: it is gone."""
    for follow in (True, False):
        with suppress(FileNotFoundError):
            return path.stat(follow_symlinks=follow)
    return None
