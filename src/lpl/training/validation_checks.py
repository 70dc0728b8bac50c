"""Checks of the options of validation, before anything loads."""

from __future__ import annotations

from pathlib import Path

from lpl.config import LoggingConfig, TrainConfig
from lpl.data.prompts import Prompt, read_prompts
from lpl.data.sources import Source
from lpl.errors import UserError


def check_validation(config: TrainConfig, source: Source) -> None:
    """Refuses to hold out everything, and prompts that cannot be read.

    Raises:
        UserError: so.
    """
    held = config.data.validation_samples
    if held and source.size is not None and held >= source.size:
        raise UserError(
            f"--validation_samples {held}: {source.name} has {source.size} images, which leaves none to train on: hold "
            "out fewer"
        )
    validation_prompts(config.logging)


def validation_prompts(config: LoggingConfig) -> list[Prompt]:
    """The prompts of validation images in order; none if no images are asked for.

    Raises:
        UserError: a file that is none of prompts.
    """
    if config.validation_prompts is None:
        return [] if config.validation_prompt is None else [Prompt(config.validation_prompt)]
    return read_prompts(Path(config.validation_prompts), "--validation_prompts")
