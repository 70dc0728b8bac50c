"""Draws samples, each from noise of its own, into a folder or into memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpl.base.errors import UserError, require
from lpl.base.files import write_output
from lpl.base.json_files import object_in, read_object, write_json
from lpl.base.terminal import progress
from lpl.config.run_folder import IMAGES, SETTINGS
from lpl.diffusion.draws import keyed_generator
from lpl.evaluation.images import CAPTIONS, as_png

PER_FOLDER = 1000
OWN = re.compile(rf"\d{{5}}/\d{{8}}\.png|{re.escape(CAPTIONS)}")
"""Names of lpl's own files in the folder of images: see image_name."""
Draw = Callable[[Sequence[str], Sequence[torch.Generator], int, float | None, int], Tensor]
"""A sampler: prompts, generators, steps, guidance (None: its own) and resolution to images (B, 3, H, H), uint8."""


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn. All but batch_size decide what they are.

    Batches only change the rounding of the arithmetic, so some pixels by one of 255.
    """

    resolution: int
    num_inference_steps: int = 25
    guidance_scale: float | None = 5.0
    seed: int = 0
    batch_size: int = 16


def image_name(index: int) -> str:
    """Where sample number `index` is, below the folder of images."""
    return f"{index // PER_FOLDER:05}/{index:08}.png"


def generator_of(seed: int, index: int) -> torch.Generator:
    """The generator of the noise of sample number `index`."""
    return keyed_generator(seed, "sample", index)


def generate(draw: Draw, prompts: Sequence[str], num_samples: int, sampling: Sampling, show: bool = False) -> Tensor:
    """Samples in memory, (num_samples, 3, resolution, resolution), uint8; sample i is of prompt i % len(prompts)."""
    drawn = [images for _, images in _drawn(draw, prompts, num_samples, sampling, show, lambda _: True, 0, 1)]
    return torch.cat(drawn)


def generate_into(
    draw: Draw,
    prompts: Sequence[str],
    folder: Path,
    num_samples: int,
    sampling: Sampling,
    *,
    rank: int = 0,
    world: int = 1,
    show: bool = False,
) -> int:
    """Writes the samples that are missing in a folder as PNG files (see image_name); each appears whole.

    Batches are the same whatever was there before and however many processes share them, so that an interrupted run
    that goes on ends with the same bytes.

    Args:
        draw: families.sampling.PipelineSampler, or alike.
        prompts: at least one.
        folder: of images; check_settings has passed.
        num_samples: how many in all.
        sampling: how they are drawn.
        rank, world: this process and how many share the work: every world-th batch.
        show: a progress bar.

    Returns:
        How many files this process wrote.

    Raises:
        UserError: the folder cannot be written to.
    """
    written = 0
    missing = lambda index: not (folder / image_name(index)).is_file()  # noqa: E731
    for indices, images in _drawn(draw, prompts, num_samples, sampling, show, missing, rank, world):
        for index, image in zip(indices, images, strict=True):
            if missing(index):
                write_output(folder / image_name(index), as_png(image), f"--output_dir {folder}")
                written += 1
    return written


def _drawn(
    draw: Draw,
    prompts: Sequence[str],
    num_samples: int,
    sampling: Sampling,
    show: bool,
    wanted: Callable[[int], bool],
    rank: int,
    world: int,
) -> Iterator[tuple[range, Tensor]]:
    starts = range(rank * sampling.batch_size, num_samples, world * sampling.batch_size)
    with progress(desc="samples", unit="img", total=num_samples, show=show) as bar:
        for start in starts:
            indices = range(start, min(start + sampling.batch_size, num_samples))
            if any(wanted(index) for index in indices):
                yield (
                    indices,
                    draw(
                        [prompts[index % len(prompts)] for index in indices],
                        [generator_of(sampling.seed, index) for index in indices],
                        sampling.num_inference_steps,
                        sampling.guidance_scale,
                        sampling.resolution,
                    ),
                )
            bar.update(min(len(indices) * world, num_samples - bar.n))


def check_settings(folder: Path, settings: dict[str, Any], remedy: str = "choose another folder") -> None:
    """Refuses a folder whose samples were drawn otherwise, and says what differs.

    Args:
        folder: of the output.
        settings: of settings_of; keys that only one side has are not compared.
        remedy: what errors tell the user to do.

    Raises:
        UserError: another run's samples are there.
    """
    file = folder / SETTINGS
    if not file.is_file():
        require(
            not (folder / IMAGES).exists(),
            f"--output_dir {folder}: has images but no {SETTINGS} that says how they were drawn; {remedy}",
        )
        return
    try:
        old = read_object(file)
    except UserError as error:
        raise UserError(f"--output_dir {folder}: {file} is damaged; {remedy}") from error
    differing = [f"{k} {str(old[k])[:60]} -> {v}" for k, v in settings.items() if k in old and old[k] != v]
    require(
        not differing,
        f"--output_dir {folder}: has samples that were drawn otherwise ({', '.join(differing)}); {remedy}",
    )


def remove_samples(folder: Path) -> None:
    """Removes the samples of a folder, and last the file that says how they were drawn; nothing else."""
    images = folder / IMAGES
    for file in [path for path in images.rglob("*") if OWN.fullmatch(path.relative_to(images).as_posix())]:
        file.unlink()
    for below in (*images.glob("*"), images):
        if below.is_dir() and not any(below.iterdir()):
            below.rmdir()
    (folder / SETTINGS).unlink(missing_ok=True)


def are_settings(path: Path) -> bool:
    """Whether a file is one that write_settings wrote."""
    return {"resolution", "prompts"} <= object_in(path).keys()


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes beside the images how they are drawn.

    Raises:
        UserError: the folder cannot be written to.
    """
    write_json(folder / SETTINGS, settings, f"--output_dir {folder}")


def settings_of(sampling: Sampling, **further: Any) -> dict[str, Any]:
    """What decides the samples, as JSON holds it."""
    return {key: value for key, value in asdict(sampling).items() if key != "batch_size"} | further
