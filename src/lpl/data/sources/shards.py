"""Lists of shards: what --webdataset names."""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from lpl.config import require

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 1_000_000


def is_url(shard: str) -> bool:
    """Whether a shard is fetched rather than opened."""
    return "://" in shard


def without_secrets(shard: str) -> str:
    """A URL without user, query and fragment, where signatures and tokens are; a path as it is."""
    if not is_url(shard):
        return shard
    url = urlsplit(shard)
    return url._replace(netloc=url.netloc.rpartition("@")[2], query="", fragment="").geturl()


def list_shards(spec: str) -> list[str]:
    """Paths and URLs that a specification stands for, in its order.

    Args:
        spec: paths or URLs joined by `::`; each may hold {000..099} or {a,b}, a path also * ? [..] and ** (sorted).

    Raises:
        UserError: nothing there, braces that are none, or a shard named twice.
    """
    shards: list[str] = []
    for part in spec.split("::"):
        flag = f"--webdataset {without_secrets(part)}"
        require(part != "", f"--webdataset {without_secrets(spec)}: nothing before or after a ::: name a shard there")
        require(not part.startswith("pipe:"), f"{flag}: no command is run: give the shard's URL or path instead")
        for shard in expand_braces(part, flag):
            shards += [shard] if is_url(shard) else _local(os.path.expanduser(shard), flag)
    missing = [shard for shard in shards if not is_url(shard) and not os.path.isfile(shard)]
    require(
        not missing,
        f"--webdataset {missing[0] if missing else ''}: no such file ({len(missing)} of {len(shards)} shards are "
        "missing): correct the path",
    )
    names = list(map(absolute, shards))
    twice = len(set(names)) < len(names) and next(name for name in names if names.count(name) > 1)
    require(not twice, f"--webdataset {twice}: this shard is named twice: name it once")
    return shards


def _local(path: str, flag: str) -> list[str]:
    require(
        not os.path.isdir(path), f"{flag}: a folder: name its shards, such as {os.path.join(path, '*.tar')}, quoted"
    )
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    require(bool(found), f"{flag}: no file matches: correct the path")
    return found


def expand_braces(text: str, flag: str) -> list[str]:
    """What a text with any number of {first..last} and {one,other} stands for, the last brace running fastest.

    Args:
        text: the text; numbers keep the width of the first one where that begins with 0.
        flag: what to call it in a message.

    Raises:
        UserError: braces that hold neither, or too many shards.
    """
    pieces = _BRACES.split(text)
    choices = [[piece] if n % 2 == 0 else _choices(piece, flag) for n, piece in enumerate(pieces)]
    stray = any(mark in piece for piece in pieces[::2] for mark in "{}")
    require(not stray, f"{flag}: a brace without its other half, or one inside another: write {{000..099}} or {{a,b}}")
    count = math.prod(map(len, choices))
    require(count <= _MOST_SHARDS, f"{flag}: {count} shards; at most {_MOST_SHARDS} can be named: correct the range")
    return list(map("".join, itertools.product(*choices)))


def _choices(inside: str, flag: str) -> list[str]:
    bounds = _RANGE.fullmatch(inside)
    if bounds is None:
        require("," in inside, f"{flag}: {{{inside}}} is no range: write {{000..099}} or {{a,b}}")
        return inside.split(",")
    first, last = bounds.groups()
    require(int(first) <= int(last), f"{flag}: {{{inside}}} runs backwards: write the smaller number first")
    require(int(last) - int(first) < _MOST_SHARDS, f"{flag}: {{{inside}}} is too long a range: correct it")
    width = len(first) if first.startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def absolute(shard: str) -> str:
    """A path from the root on, or a URL without its secrets."""
    return without_secrets(shard) if is_url(shard) else Path(os.path.abspath(os.path.expanduser(shard))).as_posix()


def labels(shards: list[str]) -> list[str]:
    """A short name for each shard: its file's name without .tar, or as much of its path as tells it from the others."""
    paths = [absolute(shard).split("/") for shard in shards]
    folders = zip(*(path[:-1] for path in paths), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, folders))
    whole = ["/".join(path[shared:]) for path in paths]
    names = [path[-1].removesuffix(".tar") for path in paths]
    if len(set(names)) == len(names):
        return names
    names = [path.removesuffix(".tar") for path in whole]
    return names if len(set(names)) == len(names) else whole
