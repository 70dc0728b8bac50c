"""Encodes what the caches lack of a source: batches wait on disk until their piece is whole, and then become shards."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lpl.base.errors import UserError
from lpl.base.files import cache_writing
from lpl.base.terminal import progress
from lpl.data.bad_files import BadFiles
from lpl.data.captions import CaptionRules
from lpl.data.catalogue import FORMAT, Catalogue, Row, unsettled
from lpl.data.crops import Crop, Views, to_float
from lpl.data.masks import mask_keys, mask_source
from lpl.data.reading import Reader, in_order, threads_of
from lpl.data.shard import KEY_BYTES
from lpl.data.sources import Piece, Source
from lpl.data.store import TensorStore

SHARD_BYTES = 2**25
"""About how many bytes a shard has."""
MASKS_AT_ONCE = 64


Item = tuple[bytes, Any, str]
"""Key of an entry, what it is encoded from (pixels, a mask, a caption), and what to call it in a message."""


class Staging:
    """One piece's entries on their way into a store; they wait in a folder, which one process at a time may use.

    Each batch is a small file of its own as soon as it is encoded, so a kill loses one batch at most; a restart finds
    the batches there and goes on. Shards are written in the order in which keys were put, so the store ends up the
    same, byte for byte, however often the piece was interrupted.

    Args:
        store: where the entries end up.
        folder: where batches wait.
        encode: makes a batch's fields: (B, ...), or B tensors of several shapes.
        at_once: how many values of a shape are encoded together.
    """

    def __init__(
        self,
        store: TensorStore,
        folder: Path,
        encode: Callable[[list[Item]], Mapping[str, Tensor | list[Tensor]]],
        at_once: Callable[[Sequence[int]], int],
    ) -> None:
        self._store, self.folder, self._encode, self._at_once = store, folder, encode, at_once
        self._staged = TensorStore(folder)
        self._claimed: dict[bytes, None] = {}
        self._waiting: dict[tuple[int, ...], list[Item]] = {}

    def __contains__(self, key: bytes) -> bool:
        """Whether an entry need not be encoded: it is in the store, or waits here."""
        return key in self._store or key in self._staged

    def put(self, key: bytes, value: Any, name: str) -> None:
        """Takes an entry into the piece, unless the store has it; `value` may be None where it waits here already."""
        if key in self._claimed or key in self._store:
            return
        self._claimed[key] = None
        if key not in self._staged:
            shape = tuple(getattr(value, "shape", ()))
            queue = self._waiting.setdefault(shape, [])
            queue.append((key, value, name))
            if len(queue) >= self._at_once(shape):
                self._encode_all(queue)

    def flush(self) -> None:
        """Encodes what still waits for others of its shape."""
        for _, queue in sorted(self._waiting.items()):
            self._encode_all(queue)

    def commit(self) -> None:
        """Moves everything that was put into shards of the store, entries of one shape together."""
        by_shape: dict[str, list[bytes]] = {}
        for key in self._claimed:
            by_shape.setdefault(str(self._staged.layout(key)), []).append(key)
        for _, keys in sorted(by_shape.items()):
            rows = max(1, SHARD_BYTES // self._staged.entry_bytes(keys[0]))
            for start in range(0, len(keys), rows):
                part = keys[start : start + rows]
                self._store.write(part, self._staged.gather(part), scratch=self.folder)

    def clear(self) -> None:
        """Removes the batches that waited."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _encode_all(self, queue: list[Item]) -> None:
        if queue:
            fields = self._encode(queue)
            by_shape: dict[str, list[int]] = {}
            for n in range(len(queue)):
                by_shape.setdefault(str([values[n].shape for values in fields.values()]), []).append(n)
            for places in by_shape.values():
                rows = {name: torch.stack([values[n] for n in places]) for name, values in fields.items()}
                self._staged.write([queue[n][0] for n in places], rows)
            queue.clear()


ENCODE_PIXELS = 2**20
"""Pixels that go through the image encoder at once (whatever the batch size of training), at least one image."""
ENCODE_IMAGES = 16
CAPTION_BATCH = 32


class Encoder(Protocol):
    """What turns images and captions into what is cached."""

    latent_key: str
    """Hex hash of the image encoder's weights and settings."""
    latent_stride: int
    """Pixels per latent, in height and in width."""
    text_key: str
    """Hex hash of the text encoders' weights and settings."""

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and std, (B, C, h, w), float32, CPU, raw latent space, of pixels (B, 3, H, W) in [-1, 1]."""

    def encode_text(self, captions: list[str]) -> Mapping[str, Tensor | list[Tensor]]:
        """By field, on the CPU, for B captions: (B, ...), or B tensors whose first dimensions differ."""

    def entry_bytes(self, height: int, width: int) -> tuple[int, int]:
        """Bytes in float32 that are cached for an image of this size, in pixels, and for a caption."""


class Caches(NamedTuple):
    """The stores of one model's latents, text embeddings and masks, within a cache folder."""

    folder: Path
    latents: TensorStore
    text: TensorStore
    dtype: torch.dtype
    """The precision in which latents and text embeddings are stored."""

    masks: TensorStore | None = None
    """The masks of crops, at the resolution of latents; None: not in use."""

    @property
    def stores(self) -> list[TensorStore]:
        """All that are in use."""
        return [self.latents, self.text] + ([] if self.masks is None else [self.masks])

    @classmethod
    def open(cls, folder: Path, encoder: Encoder, dtype: str = "float32", masks: bool = False) -> Caches:
        """Opens the stores that hold this encoder's output in this precision; with masks, theirs too."""
        suffix = FORMAT if dtype == "float32" else f"{FORMAT}-{dtype}"
        return cls(
            folder,
            TensorStore(folder / "latents" / f"{encoder.latent_key}{suffix}"),
            TensorStore(folder / "text" / f"{encoder.text_key}{suffix}"),
            getattr(torch, dtype),
            TensorStore(folder / "masks" / f"stride-{encoder.latent_stride}{FORMAT}") if masks else None,
        )

    def refresh(self) -> None:
        """Adds what other processes have written."""
        for store in self.stores:
            store.refresh()

    def staging(self, source: Source) -> Path:
        """Where unfinished pieces of a source wait."""
        name = "\0".join((source.identity, self.latents.folder.name, self.text.folder.name))
        return self.folder / "staged" / hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def caption_key(caption: str) -> bytes:
    """Key of a caption in the text cache."""
    return hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


@dataclass
class Filler:
    """Brings one source into the caches.

    Attributes:
        bad: counts what cannot be used, and stops the run if there is too much of it.
        prefix: put before ids wherever something is drawn for them, as `Samples` does.
        proceed: called between batches and images; raises to stop there.
        catalogue: what is known of the source.
        always: captions that are cached whatever the samples say.
    """

    source: Source
    views: Views
    rules: CaptionRules
    encoder: Encoder
    caches: Caches
    bad: BadFiles
    prefix: str
    proceed: Callable[[], None]
    encoded_images: int = 0
    encoded_captions: int = 0
    made_masks: int = 0
    empty_masks: int = 0

    def __post_init__(self) -> None:
        self.config = self.views.config
        self.catalogue = Catalogue(self.caches.folder, self.source, mask_source(self.config))
        self.always = [""] if self.config.proportion_empty_prompts > 0 else []

    def crops(self, sample: str, digest: bytes, width: int, height: int) -> dict[bytes, Crop]:
        """Every crop of an image that is cached, by key."""
        return self.views.crops(self.prefix + sample, digest, width, height)

    def texts(self, sample: str, captions: Sequence[str]) -> list[str]:
        """Every text of a sample that is cached."""
        return self.rules.variants(self.prefix + sample, captions)

    def entries(self, row: dict[str, Any]) -> tuple[Iterable[bytes], list[bytes], Iterable[bytes]]:
        """Keys of what is cached for a usable sample of the catalogue: latents, texts, masks."""
        crops = self.crops(row["id"], row["digest"], row["width"], row["height"])
        texts = [caption_key(text) for text in self.texts(row["id"], row["captions"])]
        return crops, texts, mask_keys(self.config, row.get("mask", b""), crops)

    def missing(self, piece: Piece) -> int:
        """Crops of a piece that are not cached or not known; -1 if the piece is new or changed, or lacks captions."""
        table = None if self.config.rehash else self.catalogue.find(piece)
        if table is None or self.changed([table]):
            return -1
        if any(caption_key(text) not in self.caches.text for text in self.always):
            return -1
        absent = int(unsettled(table).sum()) * self.views.per_image
        for row in table.to_pylist():
            if row["reason"] is None:
                crops, texts, masks = self.entries(row)
                absent += sum(key not in self.caches.latents for key in crops)
                absent += any(self.caches.masks is None or key not in self.caches.masks for key in masks)
                if any(key not in self.caches.text for key in texts):
                    return -1
        return absent

    def changed(self, tables: Sequence[pa.Table]) -> bool:
        """Whether a file that a sample names, and that its source does not, has changed."""
        columns = ["files", "versions"]
        named = [pa.table([pc.list_flatten(table.column(name)) for name in columns], columns) for table in tables]
        distinct = pa.concat_tables(named).group_by(columns).aggregate([])
        return self.source.versions.differ(*(distinct.column(name).to_pylist() for name in columns))

    def fill(self, pieces: Sequence[Piece], show: bool) -> None:
        """Reads, encodes and stores what is missing of some pieces.

        Raises:
            UserError: too many bad images, an encoder that makes NaN or Inf, a cache that cannot be written.
        """
        if not pieces:
            return
        self.catalogue.load_known()
        total = None if any(piece.size is None for piece in pieces) else sum(piece.size or 0 for piece in pieces)
        with progress(total=total, desc="caching", unit="image", show=show) as bar:
            for piece in pieces:
                self._fill_piece(piece, bar)
        self.catalogue.forget_known()

    def _fill_piece(self, piece: Piece, bar: Any) -> None:
        folder = self.caches.staging(self.source) / self.catalogue.path(piece).stem
        latents = Staging(self.caches.latents, folder / "latents", self._encode_images, batch_of)
        text = Staging(self.caches.text, folder / "text", self._encode_captions, lambda _: CAPTION_BATCH)
        stagings = [latents, text]
        known = None if self.config.rehash else self.catalogue
        reader = Reader(self.crops, self.config, latents.__contains__, known, versions=self.source.versions)
        masks: Staging | None = None
        if self.caches.masks is not None:
            masks = Staging(self.caches.masks, folder / "masks", self._stack_masks, lambda _: MASKS_AT_ONCE)
            reader = replace(reader, mask_cached=masks.__contains__, stride=self.encoder.latent_stride)
            stagings.append(masks)
        rows: list[Row] = []
        with closing(piece.samples()) as samples:
            for read in in_order(reader, samples, threads_of(self.config)):
                self.proceed()
                rows.append(read.row)
                self.bad.count(read.row.id, read.row.name, read.row.reason)
                for key in read.keys:
                    latents.put(key, read.pixels.get(key), read.row.name)
                if masks is not None:
                    for key in read.mask_keys:
                        masks.put(key, read.masks.get(key), read.row.name)
                bar.update()
        latents.flush()
        captions = (caption for row in rows if row.reason is None for caption in self.texts(row.id, row.captions))
        for caption in (*self.always, *captions):
            text.put(caption_key(caption), caption, f"caption {caption[:60]!r}")
        for staging in stagings:
            staging.flush()
        for staging in stagings:
            staging.commit()
        for staging in stagings:
            staging.clear()
        self.catalogue.write(piece, rows, scratch=folder)
        with cache_writing(folder):
            shutil.rmtree(folder)

    def _encode_images(self, batch: list[Item]) -> dict[str, Tensor]:
        self.proceed()
        encoded = self.encoder.encode_images(to_float(torch.stack([pixels for _, pixels, _ in batch])))
        mean, std = (values.to(self.caches.dtype) for values in encoded)
        for (_, _, name), own_mean, own_std in zip(batch, mean, std, strict=True):
            _require_finite((own_mean, own_std), name, "the VAE", "--pretrained_vae_model_name_or_path")
        self.encoded_images += len(batch)
        return {"mean": mean, "std": std}

    def _stack_masks(self, batch: list[Item]) -> dict[str, Tensor]:
        masks = torch.stack([mask for _, mask, _ in batch])
        self.made_masks += len(masks)
        self.empty_masks += int((masks.flatten(1) == 0).all(1).sum())
        return {"mask": masks}

    def _encode_captions(self, batch: list[Item]) -> dict[str, Tensor | list[Tensor]]:
        self.proceed()
        encoded = self.encoder.encode_text([caption for _, caption, _ in batch])
        rows = [narrowed({name: v[n] for name, v in encoded.items()}, self.caches.dtype) for n in range(len(batch))]
        fields: dict[str, Tensor | list[Tensor]] = {name: [row[name] for row in rows] for name in encoded}
        for position, (_, _, name) in enumerate(batch):
            values = [values[position] for values in fields.values()]
            _require_finite(values, name, "the text encoder", "--pretrained_model_name_or_path")
        self.encoded_captions += len(batch)
        return fields


def cast_floats(fields: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in another precision; tokens stay the integers that they are."""
    return {name: values.to(dtype) if values.is_floating_point() else values for name, values in fields.items()}


def narrowed(fields: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in another precision, except those that are no larger: encoders may run in half precision themselves."""
    large = {name: value for name, value in fields.items() if value.itemsize > dtype.itemsize}
    return {**fields, **cast_floats(large, dtype)}


def batch_of(shape: Sequence[int]) -> int:
    """How many crops (3, H, W) go through the image encoder at once."""
    return max(1, min(ENCODE_IMAGES, ENCODE_PIXELS // (shape[-1] * shape[-2])))


def _require_finite(tensors: Sequence[Tensor], name: str, encoder: str, flag: str) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        hint = " in --cache_dtype float16" if tensors[0].dtype == torch.float16 else ""
        raise UserError(f"{name}: {encoder} makes NaN or Inf of it{hint}: check it, or take another model with {flag}")
