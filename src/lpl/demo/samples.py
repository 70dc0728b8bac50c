"""What the demo measures samples against, and its picture: real crops, samples without and with LPL from one noise."""

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
"""Photographs that a column is of: those that are more than texture at 64 pixels."""
SIDE, GAP, MARGIN, LETTERS = 128, 4, 96, 14
"""Pixels of a picture in the sheet (enlarged twice, Lanczos), between pictures, of the labels' column, of letters."""
REAL = "real"
NUM_VIEWS = 512


def export_views(folder: str | Path) -> Path:
    """Writes other crops than those of the training, as the autoencoder reconstructs them: what a model can reach.

    They are of the regions that are trained on, with their captions, in random order, so that the first are of all
    photographs.

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
    """The picture and where everything is in it.

    A column a photograph, by its first caption. Rows: a real crop, then for each guidance a sample of each model.
    Column n of all of them is from the same noise.

    Args:
        models: pipeline folders by what their rows are called.
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
    """Rows of images under each other, labelled, and where each is.

    Cells have the caption with the row's setting, so that a report shows what was drawn alike side by side; the real
    ones are noted for every setting.

    Args:
        rows: what made them, under which setting, and an image for each caption.
        captions: of the columns.
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
