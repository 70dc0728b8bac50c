"""How long a run is, how often it draws each image and what it does on the way, in words for the user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lpl.config import TrainConfig

MOST_DRAWS = 300
"""Draws of an image above which a model learns it by heart."""


class Length(NamedTuple):
    """The steps of a run and what they come to."""

    steps: int
    samples: int
    """Samples of a step."""
    images: int
    """Training images, without those of --reg_data_dir."""
    draws: float
    """Draws of each image, on average."""
    by: str
    """The option that it follows from, with its value."""

    def __str__(self) -> str:
        often = f"{self.draws:,.0f}" if self.draws >= 10 else f"{self.draws:.2g}"
        times = "once" if often == "1" else f"{often} times"
        draw = "draws" if self.steps == 1 else "draw"
        return (
            f"{count(self.steps, 'step')} of {count(self.samples, 'sample')}, which {draw} each of "
            f"{count(self.images, 'image')} {times} on average (by {self.by})"
        )

    def warning(self) -> str | None:
        """Why it is too long for so few images; None: it is not."""
        if self.draws <= MOST_DRAWS:
            return None
        return (
            f"each image is drawn {self.draws:,.0f} times, and above {MOST_DRAWS} a model learns images by heart: give "
            "--draws_per_image 150, or more images"
        )


def count(number: int, noun: str) -> str:
    """A number of things, as in "1 step" and "2,000 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def length_of(
    config: TrainConfig, processes: int, images: int, epoch: int | None = None, repeats: float = 1.0
) -> Length:
    """The length of a run.

    Args:
        images: training images, without those of --reg_data_dir.
        epoch: draws of an epoch, those of --reg_data_dir included; None: the number of images.
        repeats: how often an epoch draws a training image on average.
    """
    run, samples = config.run, config.samples_per_step(processes)
    epoch = images if epoch is None else epoch
    steps = config.num_steps(epoch, processes, repeats)
    by = f"--num_train_epochs {run.num_train_epochs}"
    if run.max_train_steps == steps:
        by = f"--max_train_steps {steps}"
    elif run.draws_per_image is not None:
        by = f"--draws_per_image {run.draws_per_image:g}"
    return Length(steps, samples, images, steps * samples * repeats / epoch, by)


def on_the_way(config: TrainConfig, steps: int) -> Iterator[tuple[str, str]]:
    """What a run of `steps` steps saves, validates and mirrors, as a label and a line each."""
    run, log = config.run, config.logging
    saved = [f"a checkpoint every {count(run.checkpointing_steps, 'step')}"] if run.checkpointing_steps <= steps else []
    if run.save_steps is not None and run.save_steps <= steps:
        saved.append(f"weights to use every {run.save_steps:,}")
    yield "saves", ", ".join([*saved, "the result at the end"])
    shown = ["both losses on held-out images"] * config.data.holds_out + ["images of the prompts"] * log.draws_images
    often = (
        count(log.validation_epochs, "epoch") if log.validation_steps is None else count(log.validation_steps, "step")
    )
    nothing = "nothing (--validation_prompt draws images)"
    yield "validates", f"{' and '.join(shown)} every {often}" if shown else nothing
    yield "mirrors", "images at random (--random_flip)" if config.data.random_flip else "no image"
