"""Reads every image of a run once, without a model or a cache, and works out what the run will draw of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from lpl.base.errors import UserError
from lpl.base.terminal import progress
from lpl.config import TrainConfig
from lpl.config.length import Length, length_of
from lpl.data.bad_files import Bad, BadFiles, BadImageError
from lpl.data.captions import CaptionRules
from lpl.data.catalogue import MASKED, SCHEMA, Row, Samples, bad_in, table_of
from lpl.data.crops import Crop, Views
from lpl.data.dataset import VALIDATION, drawn_images, split_repeats, split_samples
from lpl.data.decode import decode_with_alpha, parse_color
from lpl.data.masks import Mask, mask_of
from lpl.data.prepare import REGULARISATION, none_usable
from lpl.data.reading import Reader, in_order, threads_of
from lpl.data.sampler import BatchOrder
from lpl.data.sources import Piece, Sample, Source, open_validation

T = TypeVar("T")


class Part(NamedTuple):
    """What one source holds."""

    source: Source
    rows: pa.Table
    """The usable samples, in order."""
    bad: list[Bad]
    """The others."""
    start: int
    """Number of its first sample among those of all sources."""


@dataclass(frozen=True)
class Survey:
    """The sources of a run, read through.

    Attributes:
        config: the options, resolution filled in.
        parts: the training images, then the regularisation images if there are any.
        samples: the usable samples of all parts.
        buckets: (N,), bucket of each sample.
        repeats: (N,), how often an epoch draws each.
        order: what each step draws; None if nothing is usable.
        processes: how many processes share a step.
        left_out: samples that are held out of training, and copies of such.
        fault: why a run on these data would not start; None if it would.
    """

    config: TrainConfig
    parts: list[Part]
    samples: Samples
    views: Views
    rules: CaptionRules
    buckets: np.ndarray
    repeats: np.ndarray
    order: BatchOrder | None
    processes: int
    fault: UserError | None
    left_out: int = 0

    @property
    def batch_size(self) -> int:
        """Draws of an optimizer step, over all processes and micro-batches."""
        return self.config.samples_per_step(self.processes)

    @property
    def length(self) -> Length:
        """The steps of the run, and what they come to."""
        assert self.order is not None
        images, repeats = drawn_images(self.samples, self.repeats)
        return length_of(self.config, self.processes, images, self.order.epoch_size, repeats)


@dataclass(frozen=True)
class Draw:
    """One draw of a run."""

    step: int
    index: int
    """Number of the sample."""
    count: int
    """Number of this draw of the sample, as in BatchOrder.batch."""
    row: Row
    crop: Crop
    caption: str
    """What the text encoder gets; empty if dropped."""


def read_through(
    config: TrainConfig, source: Source, regularisation: Source | None, bad_files: Path, processes: int = 1
) -> Survey:
    """Reads and decodes every image once, in threads; crops, order and captions are planned as training does it.

    Args:
        config: the options, with a resolution.
        source, regularisation: training images, and those of --reg_data_dir.
        bad_files: where images that cannot be used are listed; removed if there are none.
        processes: how many processes the run will have.

    Raises:
        UserError: a source that cannot be read, captions of another kind, --repeats that does not go with the folders.
    """
    data, run = config.data, config.run
    views, rules = Views(data), CaptionRules(data, run.seed)
    bad = BadFiles(data.max_bad_fraction, bad_files)
    parts: list[Part] = []
    tables: list[tuple[list[pa.Table], float, str]] = []
    fault: UserError | None = None
    for own, weight, prefix in ((source, 1.0, ""), (regularisation, data.prior_loss_weight, REGULARISATION)):
        if own is None:
            continue
        read = _read(own, views)
        whole = pa.concat_tables(read)
        usable, found = whole.filter(pc.is_null(whole.column("reason"))), bad_in(read)
        try:
            bad.settle(own.name, found, len(whole))
        except UserError as error:
            fault = fault or error
        parts.append(Part(own, usable, found, sum(len(part.rows) for part in parts)))
        tables.append((read, weight, prefix))
    bad.write()
    samples = Samples(tables)
    buckets = views.buckets.assign(samples.sizes[:, 0], samples.sizes[:, 1])
    repeats, order, left_out = np.zeros(0), None, 0
    if len(samples):
        folder = open_validation(data)
        more = [] if folder is None else [(_read(folder, views), 1.0, VALIDATION)]
        everything = Samples([*tables, *more])
        split = split_samples(everything, data, run.seed)
        split = split._replace(trained=split.trained[everything.prefixes() != VALIDATION])
        repeats, left_out = split_repeats(samples, split, data), int((~split.trained).sum())
        order = BatchOrder(run.seed, buckets, repeats, config.samples_per_step(processes))
    else:
        fault = fault or none_usable(source, bad_files)
    return Survey(config, parts, samples, views, rules, buckets, repeats, order, processes, fault, left_out)


def first_draws(survey: Survey, number: int) -> list[Draw]:
    """The first `number` draws of the run, in its order; fewer if the run is shorter."""
    order, draws = survey.order, []
    assert order is not None
    for step in range(min(survey.length.steps, -(-number // survey.batch_size))):
        for index, count in order.batch(step):
            row = survey.samples[index]
            crop = survey.views.draw(survey.config.run.seed, row.id, row.width, row.height, count)
            caption = survey.rules.draw(row.id, row.captions, count)
            draws.append(Draw(step, index, count, row, crop, caption))
    return draws[:number]


def look_again(survey: Survey, jobs: Mapping[int, Callable[[Image.Image, Image.Image | None], T]]) -> dict[int, T]:
    """Decodes chosen images once more; only pieces with one of them are opened, up to the last of them.

    `jobs` has for each sample, by its number, a function of its upright RGB image and its mask (mode L, of its size;
    None: it has none), which is called in a thread.

    Raises:
        UserError: an image or mask that is no longer what it was.
    """
    background = parse_color(survey.config.data.background_color)
    by_piece: dict[int, dict[str, int]] = {}
    for index in sorted(jobs):
        row = survey.samples[index]
        by_piece.setdefault(survey.samples.piece(index), {})[row.id] = index

    def make(item: tuple[int, bytes, Sample]) -> tuple[int, T]:
        index, data, sample = item
        row = survey.samples[index]
        try:
            image, alpha = decode_with_alpha(data, background)
            mask = mask_of(survey.config.data, sample, Mask(row.digest, image), alpha)
        except BadImageError as error:
            raise _changed(row) from error
        if (b"" if mask is None else mask.digest) != row.mask:
            raise _changed(row)
        return index, jobs[index](image, None if mask is None else mask.image)

    made: dict[int, T] = {}
    pieces = [(part, piece) for part in survey.parts for piece in part.source.pieces]
    with progress(desc="drawing", unit="image", total=len(jobs)) as bar:
        for number, wanted in by_piece.items():
            part, piece = pieces[number]
            prefix = REGULARISATION if part is not survey.parts[0] else ""
            with closing(_chosen(survey, piece, prefix, wanted)) as chosen:
                for index, result in in_order(make, chosen, threads_of(survey.config.data)):
                    made[index] = result
                    bar.update()
            if wanted:
                raise _changed(survey.samples[next(iter(wanted.values()))])
    return made


def _chosen(
    survey: Survey, piece: Piece, prefix: str, wanted: dict[str, int]
) -> Generator[tuple[int, bytes, Sample], None, None]:
    """The wanted samples with their numbers and bytes; each is removed from `wanted` as it comes."""
    with closing(piece.samples()) as samples:
        for sample in samples:
            index = wanted.pop(prefix + sample.id, None)
            if index is None:
                continue
            row = survey.samples[index]
            try:
                data = sample.read()
            except BadImageError as error:
                raise _changed(row) from error
            if hashlib.sha256(data).digest() != row.digest:
                raise _changed(row)
            yield index, data, sample
            if not wanted:
                return


def _changed(row: Row) -> UserError:
    return UserError(f"{row.name} has changed while the data were read: run again")


def _read(source: Source, views: Views) -> list[pa.Table]:
    config = views.config
    reader = Reader(views.crops, config, lambda _: True)  # as if all crops were cached: none is rendered
    tables = []
    with progress(desc="reading", unit="image", total=source.size) as bar:
        for piece in source.pieces:
            rows = []
            with closing(piece.samples()) as samples:
                for read in in_order(reader, samples, threads_of(config)):
                    rows.append(read.row)
                    bar.update()
            tables.append(table_of(rows, SCHEMA if config.masked_loss == "none" else MASKED))
    return tables
