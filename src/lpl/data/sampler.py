"""What each step of a run draws, and how often an epoch draws each image (--repeats)."""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from lpl.base.errors import UserError
from lpl.diffusion.draws import keyed_generator, keyed_uniform

logger = logging.getLogger("lpl")

SHOWN = 10


def parse_repeats(text: str | None, folders: Sequence[str], inverse: np.ndarray) -> np.ndarray:
    """Repeats of each sample, (N,), float64, 0 or more and not all 0.

    Args:
        text: one of
            None: every sample once;
            `dogs=10,cats=2.5`: a name stands for a folder and all below it; where several apply, the one nearest to
            the images counts; folders that are not named are drawn once; 0 leaves a folder out;
            `balanced`: every folder as often as the largest: its repeats are largest size / size of the folder;
            `names`: the number that the name of the folder begins with, as in kohya's `10_dogs`, or else the name of
            the nearest folder above that begins so, or else 1. The number is the whole name or ends at an _.
        folders: each once, in any order, relative to the root, with /, "" at the root.
        inverse: which of them each sample lies in, (N,), integers.

    Raises:
        UserError: text that says none of this, a folder that is not there or is named twice, a number that is not 0
            or more, nothing left to draw, or more draws in an epoch than an order can hold.
    """
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


def _named_values(text: str, folders: Sequence[str], used: set[str]) -> np.ndarray:
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


GOLDEN = (5**0.5 - 1) / 2
MAX_DRAWS = 2**31 - 1

T = TypeVar("T")


class BatchOrder:
    """The global batch of every optimizer step, a pure function of the arguments and the step.

    Permutations are kept as int32, those of two epochs for each bucket, and are only a cache: steps may be asked for
    in any order, by any process.

    Args:
        seed: seed of the run.
        buckets: bucket of each sample, (N,), integers; keys of the draws contain them where several are in use.
        repeats: how often an epoch draws each sample, (N,), 0 or more; 0 leaves it out.
        batch_size: samples of an optimizer step, over all processes and micro-batches.

    Attributes:
        epoch_size: draws in an epoch.
        epoch_sizes: draws in an epoch by bucket, of those that are drawn from.

    Raises:
        ValueError: arrays that do not fit together, repeats below 0 or not finite, nothing to draw, more than
            MAX_DRAWS draws in an epoch, or a batch size below 1.
    """

    def __init__(self, seed: int, buckets: np.ndarray, repeats: np.ndarray, batch_size: int) -> None:
        buckets, repeats = np.asarray(buckets), np.asarray(repeats, dtype=np.float64)
        if buckets.ndim != 1 or buckets.shape != repeats.shape:
            raise ValueError(f"buckets and repeats must be of one length, not {buckets.shape} and {repeats.shape}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not (np.isfinite(repeats).all() and (repeats >= 0).all()):
            raise ValueError("repeats must be finite and 0 or more")
        if not repeats.any():
            raise ValueError("no samples to draw")
        if repeats.sum() > MAX_DRAWS:
            raise ValueError(f"{repeats.sum():.0f} draws in an epoch: at most {MAX_DRAWS} are possible")
        members = np.flatnonzero(repeats)
        members = members[np.argsort(buckets[members], kind="stable")].astype(np.int32)
        starts = np.flatnonzero(np.diff(buckets[members])) + 1
        parts = np.split(members, starts)
        self.seed = seed
        self.batch_size = batch_size
        self._buckets = [
            BucketDraws(seed, int(buckets[part[0]]) if len(parts) > 1 else None, part, repeats[part]) for part in parts
        ]
        self._sizes = np.array([bucket.size for bucket in self._buckets], dtype=np.int64)
        self.epoch_size = int(self._sizes.sum())
        self.epoch_sizes = {int(buckets[p[0]]): b.size for p, b in zip(parts, self._buckets, strict=True)}
        self._shuffled: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int32))

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The draws of an optimizer step: `batch_size` pairs (sample index, count), all of one bucket.

        A count tells a sample's draws apart: no pair comes twice in a run. For a sample of repeats r in epoch e of its
        bucket it is e ceil(r) + copy, copy in 0..ceil(r) - 1; with repeats 1 it is e.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step must be 0 or more, not {step}")
        if len(self._buckets) == 1:
            return self._buckets[0].draws(step * self.batch_size, self.batch_size)
        epoch = self.epoch_of(step)
        before, after = self._completed(epoch), self._completed(epoch + 1)
        ends = np.cumsum(after - before)
        place = int(self._shuffle(epoch, int(ends[-1]))[step - int(before.sum())])
        bucket = int(np.searchsorted(ends, place, side="right"))
        number = int(after[bucket] - ends[bucket]) + place
        return self._buckets[bucket].draws(number * self.batch_size, self.batch_size)

    def steps_through(self, epochs: int) -> int:
        """Steps that are completed when `epochs` epochs are: the sum over buckets of floor(n epochs / batch_size)."""
        return int(self._completed(epochs).sum())

    def epoch_of(self, step: int) -> int:
        """Epoch in which a step is completed: the last e with steps_through(e) <= step.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step must be 0 or more, not {step}")
        # Each bucket's floor takes less than 1 from epochs * epoch_size / batch_size.
        first = step * self.batch_size // self.epoch_size
        last = (step + 1 + len(self._buckets)) * self.batch_size // self.epoch_size + 1
        return bisect_right(range(last + 1), step, lo=first, key=self.steps_through) - 1

    def _completed(self, epochs: int) -> np.ndarray:
        return self._sizes * epochs // self.batch_size

    def _shuffle(self, epoch: int, size: int) -> np.ndarray:
        cached = self._shuffled  # read once: threads share it
        if cached[0] != epoch:
            self._shuffled = cached = epoch, _permutation(size, self.seed, "batches", epoch)
        return cached[1]


class BucketDraws:
    """The endless sequence of draws of one bucket.

    `number` is the bucket's, for the keys of its draws, None where there is only one; `members` (M,), int32, are the
    indices of its samples, `repeats` (M,) their repeats, above 0; `size` is the number of draws in an epoch.
    """

    def __init__(self, seed: int, number: int | None, members: np.ndarray, repeats: np.ndarray) -> None:
        self._seed = seed
        self._key: tuple[int, ...] = () if number is None else (number,)
        self._members = members
        whole = np.floor(repeats).astype(np.int32)
        self._copies = np.ceil(repeats).astype(np.int32)
        self._ends = np.cumsum(whole, dtype=np.int32)
        self._whole_draws = int(self._ends[-1])
        self._add_fractions(repeats - whole, at_least=0 if whole.all() else 1)
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _add_fractions(self, fractions: np.ndarray, at_least: int) -> None:
        owners = np.flatnonzero(fractions).astype(np.int32)
        owners = owners[_permutation(len(owners), self._seed, "extra", *self._key)]
        shares = fractions[owners]
        total = float(np.cumsum(shares)[-1]) if len(owners) else 0.0
        extra = max(at_least, int(total + 0.5))
        self.size = self._whole_draws + extra
        if extra > total:  # scaling what is missing to 1 keeps every share within 1
            shares = 1 - (1 - shares) * (len(owners) - extra) / (len(owners) - total)
        elif extra:
            shares = shares * (extra / total)
        self._owners, self._owner_ends = owners, np.cumsum(shares)
        self._start = keyed_uniform(self._seed, "extra", *self._key)

    def draws(self, first: int, count: int) -> list[tuple[int, int]]:
        """(sample index, count) at the positions first to first + count - 1."""
        taken: list[tuple[int, int]] = []
        while len(taken) < count:
            epoch, offset = divmod(first + len(taken), self.size)
            order, extra = self._epoch(epoch)
            entries = order[offset : offset + count - len(taken)]
            ranks = np.searchsorted(self._ends, entries, side="right")
            is_extra = entries >= self._whole_draws
            ranks[is_extra] = extra[entries[is_extra] - self._whole_draws]
            copies = self._copies[ranks]
            # a sample's whole draws are the entries before its end, its extra draw is the last of its copies
            numbers = np.where(is_extra, copies - 1, entries - np.where(ranks > 0, self._ends[ranks - 1], 0))
            counts = epoch * copies.astype(np.int64) + numbers
            taken += zip(self._members[ranks].tolist(), counts.tolist(), strict=True)
        return taken

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Permutation of an epoch's entries, and the rank in the bucket of the sample that each extra entry draws."""
        cached = self._cache.get(epoch)
        if cached is None:
            cached = _permutation(self.size, self._seed, "order", epoch, *self._key), self._extra(epoch)
            # A new dict, so that threads may share the order; two epochs, as a batch may lie in both.
            self._cache = dict([*list(self._cache.items())[-1:], (epoch, cached)])
        return cached

    def _extra(self, epoch: int) -> np.ndarray:
        steps = np.arange(self.size - self._whole_draws)
        points = steps + (self._start + epoch * GOLDEN) % 1
        found = np.searchsorted(self._owner_ends, points, side="right") - steps
        # Where rounding puts two points into one interval, or the last beyond the end, a neighbour takes one.
        found = np.minimum(np.maximum.accumulate(found), len(self._owners) - len(steps))
        return self._owners[found + steps]


def share(
    batch: Sequence[T], micro_batch: int, process: int, batch_size: int, accumulation: int, processes: int
) -> Sequence[T]:
    """What one process takes of a global batch in one micro-batch; together the shares are the batch, in its order.

    Args:
        batch: a step's draws, batch_size * accumulation * processes of them, however that is split.
        micro_batch: which of the step's micro-batches, 0 to accumulation - 1.
        process: which process, 0 to processes - 1.
        batch_size: samples per process and micro-batch.
        accumulation: micro-batches per optimizer step.
        processes: number of processes.

    Raises:
        ValueError: a batch of another length, or a micro-batch or process outside its range.
    """
    if len(batch) != batch_size * accumulation * processes:
        raise ValueError(f"a batch of {len(batch)} is not {batch_size} x {accumulation} x {processes}")
    if not (0 <= micro_batch < accumulation and 0 <= process < processes):
        raise ValueError(f"no micro-batch {micro_batch} of {accumulation}, process {process} of {processes}")
    start = (micro_batch * processes + process) * batch_size
    return batch[start : start + batch_size]


def _permutation(size: int, *key: int | str) -> np.ndarray:
    return torch.randperm(size, generator=keyed_generator(*key)).to(torch.int32).numpy()
