"""Validation images: a grid on disk and in the trackers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from lpl.data.files import write_atomically


def image_grid(images: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images of one size as a grid, row by row, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid


def image_file(folder: Path, step: int) -> Path:
    """Where the validation images of a step are."""
    return folder / f"step-{step:07d}.png"


def publish_images(accelerator: Accelerator, images: list[Image.Image], prompt: str, path: Path, step: int) -> None:
    """Sends the images to every tracker and writes them to path, last and in one go: with it, the step is validated."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stack = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images("validation", stack, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"validation": [wandb.Image(image, caption=prompt) for image in images]}, step=step)
    content = io.BytesIO()
    image_grid(images, min(len(images), 8)).save(content, "PNG")
    write_atomically(path, content.getvalue())
