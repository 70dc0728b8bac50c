"""Cached batches against torch.load of a file for each sample: alternating in one process, warm, medians.

    OMP_NUM_THREADS=1 python benchmarks/data_reading.py [entries]

Entries are SDXL's at 512 px: a posterior of mean and std, (4, 64, 64), and with text also the captions' embeddings,
(77, 2048) and (1280,), all float32. "read": the keys of a batch are looked up and its tensors gathered. "batch" is all
that training does: crops, flips and captions drawn, keys hashed, tensors gathered, the posterior sampled. "load": a
dict of the same tensors, one file per sample, by torch.load; "load, sampled": the same, and the posterior sampled with
torch.randn. Each way reads different batches, so that none finds its entries in the processor's caches.
"""

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from lpl.config import DataConfig
from lpl.data.captions import CaptionRules
from lpl.data.catalogue import Catalogue, Row, Samples
from lpl.data.crops import Views
from lpl.data.dataset import TrainingData, split_repeats, split_samples
from lpl.data.filling import Caches, caption_key
from lpl.data.sampler import BatchOrder

BATCH, PIECE, SHARD_ROWS, ROUNDS = 16, 1024, 256, 5
LATENT = (4, 64, 64)
TEXT = {"prompt_embeds": (77, 2048), "pooled": (1280,)}
NO_TEXT = {"pooled": (1,)}
WAYS = ("read", "batch", "load", "load, sampled")


class Slice:
    """The attributes of a source's piece that a catalogue needs."""

    stamp = identity = ""

    def __init__(self, key: str) -> None:
        self.key = key


class Keys:
    """The keys that name the stores' folders."""

    latent_key, text_key = "latents", "text"


def make(folder: Path, entries: int, text: dict[str, tuple[int, ...]]) -> tuple[TrainingData, list[Path]]:
    """Writes the same entries to the caches, and to files for torch.load."""
    config = DataConfig(resolution=512, random_flip=True)
    views, rules = Views(config), CaptionRules(config, seed=0)
    caches, catalogue = Caches.open(folder, Keys()), Catalogue(folder, Slice(""))
    tables, files = [], []
    rows = [
        Row(
            f"{n:06}.png",
            [f"photograph {n}"],
            "",
            f"{n:06}.png",
            "",
            hashlib.sha256(b"%d" % n).digest(),
            700,
            512,
            None,
        )
        for n in range(entries)
    ]
    for start in range(0, entries, PIECE):
        piece = Slice(str(start))
        catalogue.write(piece, rows[start : start + PIECE])
        tables.append(catalogue.find(piece))
    for start in range(0, entries, SHARD_ROWS):
        part = rows[start : start + SHARD_ROWS]
        keys = [list(views.crops(row.id, row.digest, row.width, row.height)) for row in part]
        fields = {"mean": torch.randn(len(part), *LATENT), "std": torch.rand(len(part), *LATENT)}
        for flipped in range(2):
            caches.latents.write([own[flipped] for own in keys], fields)
        embeds = {name: torch.randn(len(part), *shape) for name, shape in text.items()}
        caches.text.write([caption_key(row.captions[0]) for row in part], embeds)
        for n in range(len(part)):
            entry = {name: value[n].clone() for name, value in (fields | embeds if text is TEXT else fields).items()}
            files.append(folder / f"{start + n}.pt")
            torch.save(entry, files[-1])
    samples = Samples([(tables, 1.0, "")])
    buckets = views.buckets.assign(samples.sizes[:, 0], samples.sizes[:, 1])
    split = split_samples(samples, config, 0)
    return TrainingData(samples, views, rules, caches, 0, buckets, split_repeats(samples, split, config), split), files


def keys(data: TrainingData, draws: list[tuple[int, int]]) -> tuple[list[bytes], list[bytes]]:
    """Keys of the latents and texts of a batch."""
    latents, texts = [], []
    for index, count in draws:
        row = data.samples[index]
        crop = data.views.draw(data.seed, row.id, row.width, row.height, count)
        latents.append(data.views.key(row.digest, crop))
        texts.append(caption_key(data.rules.draw(row.id, row.captions, count)))
    return latents, texts


def ways(data: TrainingData, files: list[Path], draws: list[tuple[int, int]]) -> dict[str, Callable[[], object]]:
    latents, texts = keys(data, draws)

    def sampled():
        for index, _ in draws:
            entry = torch.load(files[index])
            entry["mean"] + entry["std"] * torch.randn(LATENT)

    return {
        "read": lambda: (data.caches.latents.gather(latents), data.caches.text.gather(texts)),
        "batch": lambda: data.batch(draws),
        "load": lambda: [torch.load(files[index]) for index, _ in draws],
        "load, sampled": sampled,
    }


def main(entries: int = 4000) -> None:
    torch.set_num_threads(1)
    print("| entries | way | ms a sample | samples/s | times as fast as load |\n|---|---|---|---|---|")
    for name, text in (("latents", NO_TEXT), ("latents and text", TEXT)):
        with tempfile.TemporaryDirectory() as folder:
            data, files = make(Path(folder), entries, text)
            order = BatchOrder(0, data.buckets, data.repeats, BATCH)
            times: dict[str, list[float]] = {}
            steps = entries // BATCH
            for step in range(ROUNDS * steps):
                for place, way in enumerate(WAYS):
                    function = ways(data, files, order.batch(step + place * steps // len(WAYS)))[way]
                    start = time.perf_counter()
                    function()
                    if step >= steps:  # the first round warms the page cache
                        times.setdefault(way, []).append((time.perf_counter() - start) / BATCH)
        found = {way: median(values) for way, values in times.items()}
        for way, value in found.items():
            print(f"| {entries}, {name} | {way} | {value * 1e3:.3f} | {1 / value:.0f} | {found['load'] / value:.1f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
