"""How often an epoch draws each image: what --repeats says of the folders they lie in."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence

import numpy as np

from lpl.data.sampler import MAX_DRAWS
from lpl.errors import UserError

logger = logging.getLogger("lpl")

SHOWN = 10


def parse_repeats(
    text: str | None, groups: Sequence[str] | np.ndarray, inverse: np.ndarray | None = None
) -> np.ndarray:
    """Repeats of each sample, (N,), float64, 0 or more and not all 0.

    Args:
        text: one of
            None: every sample once;
            `dogs=10,cats=2.5`: a name stands for a folder and all below it, of several the one nearest to the images
            counts, and folders that are not named come once; 0 leaves a folder out;
            `balanced`: every folder as often as the largest, by largest size / size of the folder;
            `names`: the number that the name of the folder begins with, as in kohya's `10_dogs`, or else the name of
            the nearest folder above that begins so, or else 1. A number is what stands before the first _.
        groups: folder of each sample relative to the root, with /, "" at the root; or, with `inverse`, every folder
            once, in any order.
        inverse: which of `groups` each sample lies in, (N,), integers.

    Raises:
        UserError: text that says none of this, a folder that is not there or is named twice, a number that is not 0
            or more, nothing left to draw, or more draws in an epoch than an order can hold.
    """
    if inverse is None:
        numbers = {group: number for number, group in enumerate(dict.fromkeys(map(str, groups)))}
        inverse = np.fromiter((numbers[str(group)] for group in groups), dtype=np.int32, count=len(groups))
        groups = list(numbers)
    folders = [str(group) for group in groups]
    sizes = np.bincount(inverse, minlength=len(folders))
    used = {folder for folder, size in zip(folders, sizes, strict=True) if size}
    if text is None:
        values = np.ones(len(folders))
    elif text == "balanced":
        if len(used) == 1:
            logger.warning("--repeats balanced: has no effect, as all images lie in one folder")
        values = sizes.max(initial=0) / np.maximum(sizes, 1)
    elif text == "names":
        found = [_number_in(folder) for folder in folders]
        if all(number is None for number in found):
            logger.warning("--repeats names: has no effect, as no folder is named like 10_dogs: %s", _list(used))
        values = np.array([1.0 if number is None else float(number) for number in found])
    else:
        values = _named_values(text, folders, used)
    repeats = values[inverse]
    if not repeats.any():
        raise UserError(f"--repeats {text}: leaves no image to draw; let a folder have more than 0")
    if repeats.sum() > MAX_DRAWS:
        raise UserError(f"--repeats {text}: an epoch would have {repeats.sum():.3g} draws; lower the numbers")
    return repeats


def _named_values(text: str, folders: list[str], used: set[str]) -> np.ndarray:
    named: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.rpartition("="))
        name = name.strip("/")
        if not equals or not name:
            raise UserError(
                f"--repeats {text}: found {part.strip()!r}; give folder=number, several joined by commas, or balanced, "
                "or names"
            )
        if not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", value):
            raise UserError(f"--repeats {name}={value}: give a number of 0 or more, such as 10 or 2.5")
        if name in named:
            raise UserError(f"--repeats {text}: names {name} twice; name it once")
        named[name] = float(value)
    there = {above for folder in used for above in _upwards(folder)}
    for name in named:
        if name not in there:
            raise UserError(f"--repeats {name}: no image lies in a folder of that name; there are {_list(used)}")
    return np.array([next((named[above] for above in _upwards(folder) if above in named), 1.0) for folder in folders])


def _upwards(folder: str) -> Iterator[str]:
    """A folder and those it lies in, the nearest first, without the root."""
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]


def _number_in(folder: str) -> int | None:
    for above in _upwards(folder):
        found = re.match(r"([0-9]+)(?:_|$)", above.rpartition("/")[2])
        if found:
            return int(found[1])
    return None


def _list(folders: set[str]) -> str:
    names = [folder or "the root itself" for folder in sorted(folders)]
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join(names[:SHOWN] + more)
