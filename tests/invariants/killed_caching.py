"""Caching in forked processes that are killed: at a given system call, or after a given time.

The parent has imported everything, so a child is at work at once. What children encode is counted in memory that they
share with the parent, where a kill leaves it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d

from lpl.config import DataConfig
from lpl.data import filling
from lpl.data.prepare import Processes, prepare_data
from lpl.data.sources import folder as folder_module
from lpl.data.sources import open_regularisation, open_source

BATCH = 4
"""Most images, or captions, that are encoded together."""
CALLS = ("replace", "fsync", "unlink", "rmdir", "mkdir")
"""Functions of os that change what is on disk; a child can be killed at the n-th call of any."""
SIZES = [(40, 32), (32, 32), (24, 40), (50, 30), (32, 64)]
BARRIER_S, HANG_S = 60, 120


class Counters:
    """Numbers that forked processes share."""

    NAMES = ("calls", "images", "captions")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(self.NAMES))

    def add(self, name: str, amount: int = 1) -> int:
        """Adds to a number and returns it."""
        place = 8 * self.NAMES.index(name)
        value = struct.unpack_from("<q", self._memory, place)[0] + amount
        struct.pack_into("<q", self._memory, place, value)
        return value


class ConvEncoder:
    """A convolution of fixed weights and a hash of captions."""

    latent_key = "aa"
    text_key = "bb"

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._weight = torch.randn((8, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 14

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = conv2d(pixels, self._weight, stride=8).chunk(2, 1)
        self._counters.add("images", len(pixels))
        return mean, 0.1 + spread.abs()

    def entry_bytes(self, height: int, width: int) -> tuple[int, int]:
        return 2 * 4 * 4 * (height // 8) * (width // 8), 4 * (8 * 4 + 5)

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        rows = [list(hashlib.sha256(caption.encode()).digest()) for caption in captions]
        embeds = torch.tensor(rows, dtype=torch.float32) / 255
        self._counters.add("captions", len(captions))
        return {"prompt_embeds": embeds.reshape(len(captions), 8, 4), "pooled": embeds[:, :5]}


def make_photos(root: Path, count: int) -> None:
    """Tiny captioned images of several shapes; the last is the first again, one is no image."""
    root.mkdir()
    for n in range(count):
        width, height = SIZES[n % len(SIZES)]
        pixels = np.random.default_rng(n).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{n:03}.png")
        (root / f"{n:03}.txt").write_text("a photograph" if n % 9 == 0 else f"a, b, number {n}")
    (root / f"{count - 1:03}.png").write_bytes((root / "000.png").read_bytes())
    (root / "003.png").write_bytes(b"no image")


class Caching:
    """Runs that cache the same photographs into folders of a test.

    Args:
        root: where photographs and caches are put.
        photos: how many photographs.
        monkeypatch: makes pieces, batches and shards small, so that there are many of each.
    """

    def __init__(self, root: Path, photos: int, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.set_num_threads(1)  # threads do not survive a fork
        monkeypatch.setattr(folder_module, "PIECE_SIZE", 16)
        monkeypatch.setattr(filling, "ENCODE_PIXELS", BATCH * 32 * 32)
        monkeypatch.setattr(filling, "CAPTION_BATCH", BATCH)
        monkeypatch.setattr(filling, "SHARD_BYTES", 10 * 2**9)
        self.root, self.counters = root, Counters()
        make_photos(root / "photos", photos)
        make_photos(root / "regularisation", 8)

    def start(self, cache: Path, kill_at: int | None = None, processes: Processes | None = None) -> int:
        """Forks a run that fills a cache; returns its process id.

        Args:
            cache: the cache folder; the list of bad images lies beside it.
            kill_at: it kills itself before the call of this number, counted from 1, that changes what is on disk.
            processes: if it is one of several.
        """
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            self._hook(kill_at)
            self.prepare(cache, processes or Processes())
            status = 0
        except BaseException:  # noqa: BLE001 - nothing may run on in the child
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)

    def prepare(self, cache: Path, processes: Processes) -> Any:
        """Fills a cache, in this process."""
        config = DataConfig(
            train_data_dir=str(self.root / "photos"),
            reg_data_dir=str(self.root / "regularisation"),
            latent_cache_dir=str(cache),
            resolution=32,
            buckets=True,
            bucket_step=8,
            random_flip=True,
            shuffle_caption=True,
            caption_variants=3,
            proportion_empty_prompts=0.1,
            max_bad_fraction=0.2,
            dataloader_num_workers=2,
        )
        sources = open_source(config, None), open_regularisation(config)
        bad = cache.with_suffix(".jsonl")
        return prepare_data(*sources, config, ConvEncoder(self.counters), 0, bad, processes)

    def run(self, cache: Path) -> dict[str, int]:
        """Runs to the end; returns what it has counted, and its nanoseconds."""
        before = self.counted()
        start = time.perf_counter_ns()
        assert finished(self.start(cache))
        taken = {name: value - before[name] for name, value in self.counted().items()}
        return taken | {"ns": time.perf_counter_ns() - start}

    def run_two(self, cache: Path, kill_at: tuple[int | None, int | None] = (None, None)) -> bool:
        """Two processes of one run; if one is killed so is the other, as launchers do. Whether both came to the end."""
        barrier = get_context("fork").Barrier(2)
        parts = [Processes(rank, 2, lambda: barrier.wait(BARRIER_S) and None) for rank in range(2)]
        running = {self.start(cache, at, part) for at, part in zip(kill_at, parts, strict=True)}
        whole = True
        while running:
            child, status = os.waitpid(-1, 0)
            running.remove(child)
            if status and whole:
                whole = False
                for other in running:
                    os.kill(other, signal.SIGKILL)
        return whole

    def counted(self) -> dict[str, int]:
        """What all children have done so far."""
        return {name: self.counters.add(name, 0) for name in Counters.NAMES}

    def _hook(self, kill_at: int | None) -> None:
        own = 0

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal own
                own += 1
                self.counters.add("calls")
                if own == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return call

        for name in CALLS:
            setattr(os, name, watched(getattr(os, name)))


def finished(child: int) -> bool:
    """Waits for a process; whether it came to its end.

    Raises:
        AssertionError: it failed or hung, rather than being killed.
    """
    limit = time.monotonic() + HANG_S
    found, status = os.waitpid(child, os.WNOHANG)
    while not found:
        if time.monotonic() > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("a run hangs")
        time.sleep(0.001)
        found, status = os.waitpid(child, os.WNOHANG)
    assert status in (0, signal.SIGKILL), f"a run failed: its wait status is {status}"
    return status == 0


def kill_after(child: int, seconds: float) -> bool:
    """Kills a process; whether it had come to its end before."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return finished(child)


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of a cache and the list of bad images; but for the locks, which are empty."""
    paths = [path for path in cache.rglob("*") if path.is_file() and path.name != "lock"]
    found = {str(path.relative_to(cache)): path.read_bytes() for path in paths}
    return found | {"bad": cache.with_suffix(".jsonl").read_bytes()}
