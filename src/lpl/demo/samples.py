"""The demo's reference images, and its picture: real crops, and samples without and with LPL from the same noise."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from lpl.data.sheets import Cell, write
from lpl.demo.photographs import export_crops, random_crops, training_crops

SEED = 7
SAMPLING_STEPS = 25
GUIDANCE_SCALES = (1.0, 3.0)
SHOWN = ("astronaut", "chelsea", "coffee", "coins", "motorcycle", "rocket", "china", "flower")
"""The photographs of the columns: those that show more than texture at 64 pixels."""
SIDE, GAP, MARGIN, LETTERS = 128, 4, 96, 14
"""Pixels of a picture in the sheet (enlarged 2 x, Lanczos), between pictures, of the column of labels, of letters."""
REAL = "real"
NUM_VIEWS = 512


def export_views(folder: str | Path) -> Path:
    """Writes crops that are not in the training set, reconstructed by the autoencoder: the best that a model can reach.

    They come from the training regions, with captions, in random order, so that the first ones cover all photographs.

    Raises:
        UserError: the folder holds something else under these names.
    """
    from lpl.demo.weights import load_pipeline
    from lpl.evaluation.reference import reconstruct

    crops = random_crops(NUM_VIEWS, random.Random("views"))
    vae, views = load_pipeline().vae, {}
    for number, crop in enumerate(crops):
        pixels = torch.from_numpy(np.array(crop.image)).permute(2, 0, 1)[None]
        made = reconstruct(pixels, vae)[0].permute(1, 2, 0).contiguous().numpy()
        views[f"{number:03d}.png"] = crop._replace(image=Image.fromarray(made))
    return export_crops(views, folder, "--output_dir")


def draw_sheet(models: Mapping[str, Path]) -> tuple[Image.Image, list[Cell]]:
    """The picture, and the cells in it.

    Each column is a photograph, with its first caption. Rows: a real crop, then for each guidance a sample of each
    model. All samples of a column start from the same noise.

    Args:
        models: pipeline folders by the names of their rows.
    """
    from diffusers import StableDiffusionXLPipeline

    first = {crop.photograph: crop for crop in reversed(training_crops())}
    crops = [first[name] for name in SHOWN]
    captions = [crop.caption for crop in crops]
    rows: list[tuple[str, str, Sequence[Image.Image]]] = [(REAL, "", [crop.image for crop in crops])]
    for guidance in GUIDANCE_SCALES:
        for name, folder in models.items():
            pipeline = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, add_watermarker=False)
            pipeline.set_progress_bar_config(desc=f"samples {name}")
            images = pipeline(
                captions,
                num_inference_steps=SAMPLING_STEPS,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(SEED + column) for column in range(len(captions))],
            ).images
            rows.append((name, f"guidance {guidance:g}", images))
    return put_together(rows, captions)


def put_together(
    rows: Sequence[tuple[str, str, Sequence[Image.Image]]], captions: Sequence[str]
) -> tuple[Image.Image, list[Cell]]:
    """A sheet of labelled rows of images, and its cells.

    Cells have the caption with the row's setting, so that a report shows samples of one setting side by side; real
    images are noted for every setting.

    Args:
        rows: name, setting, and an image for each caption.
        captions: captions of the columns.
    """
    settings = list(dict.fromkeys(setting for _, setting, _ in rows if setting))
    step = SIDE + GAP
    sheet = Image.new("RGB", (MARGIN + len(captions) * step - GAP, len(rows) * step - GAP), "white")
    pen, cells = ImageDraw.Draw(sheet), []
    for row, (name, setting, images) in enumerate(rows):
        for line, text in enumerate(filter(None, (name, setting))):
            write(pen, (GAP, row * step + SIDE // 2 + (line - 1) * (LETTERS + GAP)), text, "black", LETTERS)
        for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x, y = MARGIN + column * step, row * step
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
            for told in [setting] if setting else settings:
                cells.append(Cell(name, f"{caption}, {told}", SEED + column, (x, y, x + SIDE, y + SIDE)))
    return sheet, cells
