"""Fills the latent and text caches, each image crop and caption once, split over processes.

A latent's key holds the image's bytes, its crop and the encoder; a caption's holds the caption and the text encoders.
Nothing else enters, so a run with another loss, batch size or schedule encodes nothing anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from lpl.config import DataConfig
from lpl.data.cache import TensorCache, default_cache_dir
from lpl.data.dataset import TrainingData, caption_key
from lpl.data.plan import ImageJob, plan_views
from lpl.data.sources import Source
from lpl.data.transforms import decode_image, render
from lpl.errors import UserError

SHARD_ENTRIES = 256
CAPTION_BATCH = 32

logger = logging.getLogger("lpl")
T = TypeVar("T")


class Encoder(Protocol):
    """What turns images and captions into what is cached."""

    @property
    def latent_key(self) -> str:
        """Hex hash of the image encoder's weights and settings."""
        ...

    @property
    def text_key(self) -> str:
        """Hex hash of the text encoders' weights and settings."""
        ...

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and std, (B, C, h, w), float32, CPU, raw latent space, of pixels (B, 3, H, W) in [-1, 1]."""
        ...

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """By field, (B, ...) on the CPU, for B captions."""
        ...


class Renderer(TorchDataset[Any]):
    """Reads and decodes one image at a time, in the workers of a DataLoader.

    An item is (job, pixels (n, 3, H, W) in [-1, 1] of its n crops), or a UserError: returned, since a worker's
    exception would arrive with its one line wrapped in a traceback.
    """

    def __init__(self, source: Source, jobs: Sequence[ImageJob], interpolation: str) -> None:
        self.source = source
        self.jobs = jobs
        self.interpolation = interpolation

    def __len__(self) -> int:
        """Number of images."""
        return len(self.jobs)

    def __getitem__(self, item: int) -> tuple[ImageJob, Tensor] | UserError:
        """The crops of one image."""
        job = self.jobs[item]
        try:
            image = decode_image(self.source.read(job.index), self.source.describe(job.index))
        except UserError as error:
            return error
        return job, torch.stack([render(image, crop, self.interpolation) for crop in job.crops.values()])


def encode_dataset(
    source: Source,
    config: DataConfig,
    family: Encoder,
    seed: int,
    batch_size: int,
    process_index: int,
    num_processes: int,
    barrier: Callable[[], None],
    progress: bool,
) -> TrainingData:
    """Encodes what the caches lack and returns the samples, ready to be drawn.

    Every process plans all images and encodes its share of those that are missing; the cache folder must be one that
    all of them see.

    Args:
        source: images and captions.
        config: crops, flips, caption dropout, cache folder and workers.
        family: the encoders.
        seed: seed of the run, which places random crops.
        batch_size: images per call of the encoder; captions go by 32 or this, whichever is more.
        process_index: this process, 0 to num_processes - 1.
        num_processes: how many processes there are.
        barrier: returns when all processes have called it; called twice.
        progress: whether to show progress bars.

    Raises:
        UserError: an image that cannot be read, an encoder that makes NaN or Inf, a cache that cannot be used.
    """
    folder = Path(config.latent_cache_dir).expanduser() if config.latent_cache_dir else default_cache_dir()
    latents = TensorCache(folder / "latents" / family.latent_key)
    text = TensorCache(folder / "text" / family.text_key)
    plan = plan_views(source, config, seed, progress)
    dropped = [""] if config.proportion_empty_prompts > 0 else []
    captions = {caption_key(caption): caption for caption in [*(r.caption for r in source.records), *dropped]}
    crop_keys = {key for job in plan.jobs for key in job.crops}
    missing_crops = crop_keys - latents.keys()
    missing_captions = captions.keys() - text.keys()
    if process_index == 0 and plan.upscaled:
        logger.warning(
            "%d of %d images are smaller than --resolution %d and are scaled up: they will train blur",
            *(plan.upscaled, len(source), config.crop_size),
        )
    barrier()  # nobody writes before all have counted what is missing

    share = slice(process_index, None, num_processes)  # of everything, so that shares fit whatever each has seen
    jobs = [ImageJob(j.index, {k: c for k, c in j.crops.items() if k in missing_crops}) for j in plan.jobs[share]]
    lines = [(key, caption) for key, caption in list(captions.items())[share] if key in missing_captions]
    _encode_images(source, [job for job in jobs if job.crops], config, family, batch_size, latents, progress)
    _encode_captions(lines, family, max(batch_size, CAPTION_BATCH), text, progress)
    barrier()

    for cache, keys in ((latents, crop_keys), (text, captions.keys())):
        cache.refresh()
        if absent := keys - cache.keys():
            raise UserError(
                f"cache {cache.folder} lacks {len(absent)} of {len(keys)} entries that other processes encoded: name a "
                "folder that all of them see with --latent_cache_dir"
            )
    if process_index == 0:
        logger.info(
            "cache: %d encoded, %d reused (latents); %d encoded, %d reused (captions) in %s",
            *(len(missing_crops), len(crop_keys) - len(missing_crops)),
            *(len(missing_captions), len(captions) - len(missing_captions), folder),
        )
    return TrainingData(source.records, plan.views, latents, text, seed, config.proportion_empty_prompts)


class _ShardWriter:
    """Collects entries and writes a shard whenever enough have come together, so that a kill loses one at most."""

    def __init__(self, cache: TensorCache) -> None:
        self._cache = cache
        self._pending: dict[str, dict[str, Tensor]] = {}

    def add(self, key: str, entry: dict[str, Tensor]) -> None:
        self._pending[key] = entry
        if len(self._pending) >= SHARD_ENTRIES:
            self.flush()

    def flush(self) -> None:
        self._cache.write(self._pending)
        self._pending = {}


def _encode_images(
    source: Source,
    jobs: Sequence[ImageJob],
    config: DataConfig,
    family: Encoder,
    batch_size: int,
    cache: TensorCache,
    progress: bool,
) -> None:
    """Encodes crops in batches; all of a run have one size, so any of them go together."""
    if not jobs:
        return
    renderer = Renderer(source, jobs, config.image_interpolation_mode)
    loader = DataLoader(renderer, batch_size=None, num_workers=config.dataloader_num_workers)
    shards = _ShardWriter(cache)
    with tqdm(total=sum(len(job.crops) for job in jobs), desc="encoding images", disable=not progress) as bar:
        for batch in _batches(_crops(loader), batch_size):
            mean, std = family.encode_images(torch.stack([pixels for _, _, pixels in batch]))
            for (index, key, _), entry_mean, entry_std in zip(batch, mean, std, strict=True):
                entry = {"mean": entry_mean, "std": entry_std}
                _require_finite(entry, source.describe(index), "the VAE", "--pretrained_vae_model_name_or_path")
                shards.add(key, entry)
            bar.update(len(batch))
    shards.flush()


def _encode_captions(
    captions: Sequence[tuple[str, str]], family: Encoder, batch_size: int, cache: TensorCache, progress: bool
) -> None:
    shards = _ShardWriter(cache)
    with tqdm(total=len(captions), desc="encoding captions", disable=not (progress and captions)) as bar:
        for batch in _batches(captions, batch_size):
            fields = family.encode_text([caption for _, caption in batch])
            for position, (key, caption) in enumerate(batch):
                entry = {name: values[position] for name, values in fields.items()}
                name = f"caption {caption[:60]!r}"
                _require_finite(entry, name, "the text encoder", "--pretrained_model_name_or_path")
                shards.add(key, entry)
            bar.update(len(batch))
    shards.flush()


def _crops(loader: Iterable[Any]) -> Iterator[tuple[int, str, Tensor]]:
    """(sample index, key, pixels (3, H, W)) of every crop that a loader of Renderer items brings."""
    for item in loader:
        if isinstance(item, UserError):
            raise item
        job, pixels = item
        for key, crop_pixels in zip(job.crops, pixels, strict=True):
            yield job.index, key, crop_pixels


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _require_finite(entry: dict[str, Tensor], name: str, encoder: str, flag: str) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in entry.values()):
        raise UserError(f"{name}: {encoder} makes NaN or Inf of it: check it, or choose another model with {flag}")
