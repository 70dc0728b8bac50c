"""Validation images: the same prompts and seeds every time, drawn by all processes, decoded one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image, ImageDraw

from lpl.base.terminal import progress
from lpl.base.text import Prompt
from lpl.data.sheets import KEY, Cell, font_for, wrap, write
from lpl.diffusion.draws import keyed_seed
from lpl.families.base import Family

MOST_PIXELS = 2**26
"""Most pixels of a grid; cells shrink to keep to it."""
LETTERS, LINE, GAP = 14, 18, 4
PROMPT_LINES = 3
NARROWEST = 240
"""Smallest width of a grid, for its text."""


class ImageDrawer:
    """Draws every prompt's images with the weights that the denoiser has.

    Memory: latents are sampled first, one image at a time. Then the denoiser makes room for the decoder and waits on
    the CPU (unless it is sharded over processes); where LPL does not keep the VAE on the device, it is there for this
    time only. So the peak is training's or below it: sampling without gradients takes less than a step, and decoding
    (of large images in tiles) less than the denoiser's weights. `lpl plan` counts it.

    Args:
        family: with the prompts prepared.
        count: images of each prompt.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        family: Family,
        prompts: Sequence[Prompt],
        count: int,
        seed: int,
        resolution: int,
    ) -> None:
        self.accelerator, self.family, self.resolution = accelerator, family, resolution
        self.prompts, self.count = list(prompts), count
        self.jobs = [(p, image_seed(p, seed, n, i)) for n, p in enumerate(prompts) for i in range(count)]

    def draw(self, denoiser: Any, proceed: Callable[[], None] = lambda: None) -> list[Image.Image]:
        """All images, prompt by prompt, alike on every process.

        Every process runs the denoiser equally often: one with an image fewer draws one that is not shown.

        Args:
            denoiser: bare, in eval mode.
            proceed: called between sampling steps and images, on every process equally often; raises to stop there.
        """
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        rounds = range(0, len(self.jobs), size)
        own = [self.jobs[min(first + rank, len(self.jobs) - 1)] for first in rounds]
        latents = []
        for p, s in progress(own, desc="drawing", unit="image", show=self.accelerator.is_local_main_process):
            latents.append(self.family.sample(denoiser, p.text, p.negative, s, self.resolution, proceed))
        drawn = []
        with self._decoder_on_device(denoiser):
            for raw in latents:
                proceed()
                drawn.append(np.asarray(self.family.decode(raw)))
        pixels = torch.from_numpy(np.stack(drawn)).to(self.accelerator.device)
        gathered = self.accelerator.gather(pixels).cpu().numpy()  # process by process
        order = [place % size * len(own) + place // size for place in range(len(self.jobs))]
        return [Image.fromarray(gathered[place]) for place in order]

    @contextmanager
    def _decoder_on_device(self, denoiser: Any) -> Iterator[None]:
        device, vae = self.accelerator.device, self.family.vae
        home = next(vae.parameters()).device
        moves = self.accelerator.distributed_type != DistributedType.FSDP
        try:
            if moves:
                denoiser.to("cpu")
            vae.to(device)
            yield
        finally:
            vae.to(home)
            if moves:
                denoiser.to(device)


def image_seed(prompt: Prompt, seed: int, number: int, image: int) -> int:
    """Seed of an image: the prompt's own plus the image's number, or drawn for (run seed, prompt number, image)."""
    if prompt.seed is not None:
        return prompt.seed + image
    return keyed_seed(seed, "validation_image", number, image)


def label_grid(
    pictures: dict[str, list[Image.Image]], prompts: Sequence[Prompt], title: str, seeds: Sequence[int] | None = None
) -> Image.Image:
    """One picture of all: under each prompt a row for each kind of weights, its images side by side.

    Its `info` says where each image lies (data/sheets.py).

    Args:
        pictures: by kind, prompt by prompt, equally many of each, all of one size.
        seeds: of the images of one kind, in order; None: not noted.
    """
    kinds = list(pictures)
    columns = len(pictures[kinds[0]]) // len(prompts)
    (width, height), cells = pictures[kinds[0]][0].size, len(kinds) * len(prompts) * columns
    shrink = min(1.0, (MOST_PIXELS / (cells * width * height)) ** 0.5)
    width, height = max(1, int(width * shrink)), max(1, int(height * shrink))
    left = GAP + max(int(font_for(kind, LETTERS).getlength(kind)) for kind in kinds) + GAP
    across = max(NARROWEST, left + columns * (width + GAP))
    texts = [wrap(_described(prompt), across - 2 * GAP, LETTERS, PROMPT_LINES) for prompt in prompts]
    row = max(height, LINE) + GAP
    down = LINE + 2 * GAP + sum(LINE * len(lines) + GAP + row * len(kinds) for lines in texts)
    grid = Image.new("RGB", (across, down), "white")
    pen = ImageDraw.Draw(grid)

    write(pen, (GAP, GAP), title, "gray", LETTERS)
    noted: list[Cell] = []
    y = LINE + 2 * GAP
    for number, lines in enumerate(texts):
        for line in lines:
            write(pen, (GAP, y), line, "black", LETTERS)
            y += LINE
        y += GAP
        for kind in kinds:
            write(pen, (GAP, y), kind, "gray", LETTERS)
            for column in range(columns):
                image = pictures[kind][number * columns + column]
                if image.size != (width, height):
                    image = image.resize((width, height), Image.Resampling.LANCZOS)
                x, place = left + column * (width + GAP), number * columns + column
                grid.paste(image, (x, y))
                seed = None if seeds is None else seeds[place]
                noted.append(Cell(kind, _described(prompts[number]), seed, (x, y, x + width, y + height)))
            y += row
    grid.info[KEY] = noted
    return grid


def _described(prompt: Prompt) -> str:
    return f"{prompt.text} (without: {prompt.negative})" if prompt.negative else prompt.text
