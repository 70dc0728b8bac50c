"""From the end of model loading to the first batch, and the memory of a process that caches or starts.

    OMP_NUM_THREADS=1 python benchmarks/data_start.py            10,000 photographs: cached, then two more starts
    OMP_NUM_THREADS=1 python benchmarks/data_start.py memory     peaks while caching 20,000 and 100,000 images
    OMP_NUM_THREADS=1 python benchmarks/data_start.py million    a folder of a million images, their entries made up

Every run is a process of its own. Seconds count from the listing of the folder, all modules being loaded, to the first
batch; memory is the process's own peak (VmHWM), libraries included, and in brackets the part that is not files mapped
from disk. The encoder is a pooling, so what is measured is the pipeline alone.
"""

import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from lpl.config import DataConfig
from lpl.data import reading
from lpl.data.catalogue import Catalogue, Row
from lpl.data.crops import Views
from lpl.data.filling import Caches, caption_key
from lpl.data.prepare import prepare_data
from lpl.data.sampler import BatchOrder
from lpl.data.sources import Piece, Sample, Source, open_source
from lpl.data.sources.base import PIECE_SIZE

BATCH = 16


class Pooling:
    """A stand-in for the encoders: pools pixels, hashes captions."""

    latent_key, text_key = "latents", "text"

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = avg_pool2d(pixels, self.stride)
        mean = torch.cat([mean, mean[:, :1]], 1)
        return mean, mean.abs()

    def encode_text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return {"pooled": torch.tensor([list(hashlib.sha256(c.encode()).digest()) for c in captions]) / 255}

    def entry_bytes(self, height: int, width: int) -> tuple[int, int]:
        return 32 * (height // self.stride) * (width // self.stride), 128


def stream(size: int) -> Source:
    """Images generated when they are read, so that any number of them takes no space."""

    def samples(numbers: range) -> Iterator[Sample]:
        for n in numbers:
            yield Sample(
                f"{n:08}.png", (f"photograph number {n}",), "", "", f"/photographs/{n:08}.png", partial(png, n)
            )

    parts = [range(start, min(start + PIECE_SIZE, size)) for start in range(0, size, PIECE_SIZE)]
    pieces = [Piece(str(part.start), "", len(part), partial(samples, part)) for part in parts]
    return Source("made up", "made up", pieces, size)


def png(n: int, side: int = 8) -> bytes:
    """An image of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(n).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def start(photos: str, cache: str, resolution: str) -> None:
    """One start; photos is a folder, or the number of images to generate."""
    decoded = 0
    decode = reading.decode_with_alpha

    def counted(*args):
        nonlocal decoded
        decoded += 1
        return decode(*args)

    reading.decode_with_alpha = counted
    torch.randn(4) + 1
    config = DataConfig(train_data_dir=photos, latent_cache_dir=cache, resolution=int(resolution))
    began = time.perf_counter()
    source = stream(int(photos)) if photos.isdigit() else open_source(config, None)
    listed = time.perf_counter()
    data = prepare_data(source, None, config, Pooling(min(8, int(resolution))), 0, Path(cache) / "bad_files.jsonl")
    prepared = time.perf_counter()
    order = BatchOrder(0, data.buckets, data.repeats, BATCH)
    data.batch(order.batch(0))
    ended = time.perf_counter()
    status = Path("/proc/self/status").read_text()
    peak, own = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("VmHWM", "RssAnon"))
    seconds = f"{ended - began:.2f} s ({listed - began:.2f}, {prepared - listed:.2f}, {ended - prepared:.2f})"
    print(f"| {len(data)} | {seconds} | {decoded} | {peak:.0f} MiB ({own:.0f}) |")


def run(label: str, *args: object) -> None:
    command = [sys.executable, __file__, "start", *map(str, args)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"| {label} {result.stdout.strip()}", flush=True)


def head() -> None:
    print("| run | images | seconds (listing, caching, first batch) | decoded | peak memory |\n|---|---|---|---|---|")


def photographs(count: int = 10_000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        for n in range(count):
            ramp = np.add.outer(np.arange(96), np.arange(128))[..., None] * np.array([1, 2, 3]) + n
            Image.fromarray(ramp.astype(np.uint8)).save(photos / f"{n:06}.jpg")
            (photos / f"{n:06}.txt").write_text(f"photograph number {n}")
        head()
        for label in ("first", "second", "third"):
            run(label, photos, f"{folder}/cache", 64)
        (photos / "000000.txt").write_text("another caption")
        run("one caption changed", photos, f"{folder}/cache", 64)


def memory(*counts: int) -> None:
    head()
    with tempfile.TemporaryDirectory() as folder:
        for count in counts or (1_000, 20_000, 100_000):
            run("first", count, f"{folder}/{count}", 8)
            run("second", count, f"{folder}/{count}", 8)


def million(count: int = 1_000_000) -> None:
    """The images are empty files: they are not opened, since the caches have their entries."""
    with tempfile.TemporaryDirectory() as folder:
        photos, cache = Path(folder) / "photos", Path(folder) / "cache"
        for n in range(count):
            if n % 10_000 == 0:
                (photos / f"{n // 10_000:04}").mkdir(parents=True)
            path = f"{photos}/{n // 10_000:04}/{n:08}"
            os.close(os.open(f"{path}.png", os.O_CREAT | os.O_WRONLY))
            with open(f"{path}.txt", "w") as file:
                file.write(f"photograph number {n}")
        subprocess.run([sys.executable, __file__, "pretend", photos, cache], check=True)
        head()
        for label in ("first with all entries there", "second", "third"):
            run(label, photos, cache, 8)


def pretend(photos: str, cache: str) -> None:
    """Writes the entries of images that cannot be read."""
    config = DataConfig(train_data_dir=photos, latent_cache_dir=cache, resolution=8)
    source, views = open_source(config, None), Views(config)
    caches, catalogue = Caches.open(Path(cache), Pooling(8)), Catalogue(Path(cache), source)
    for piece in source.pieces:
        rows, keys = [], []
        for id_, captions, group, stamp, name, *_ in piece.samples():
            rows.append(Row(id_, list(captions), group, name, stamp, hashlib.sha256(id_.encode()).digest(), 8, 8, None))
            keys += views.crops(id_, rows[-1].digest, 8, 8)
        catalogue.write(piece, rows)
        caches.latents.write(keys, {"mean": torch.randn(len(keys), 4, 1, 1), "std": torch.rand(len(keys), 4, 1, 1)})
        texts = [row.captions[0] for row in rows]
        caches.text.write([caption_key(text) for text in texts], Pooling(8).encode_text(texts))


WAYS = {"start": start, "memory": memory, "million": million, "pretend": pretend, "photographs": photographs}

if __name__ == "__main__":
    way, *rest = sys.argv[1:] or ["photographs"]
    WAYS[way](*(int(value) if value.isdigit() and way in ("memory", "million") else value for value in rest))
