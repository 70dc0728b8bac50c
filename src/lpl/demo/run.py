"""`lpl demo`: the whole of `lpl train` on a small SDXL and photographs, with sample grids before and after."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from lpl.base.locks import alone_in
from lpl.base.output_folder import Names, OutputFolder, check_real
from lpl.config_io import CONFIG_FILE, is_config_of_run
from lpl.data.picture_cells import Cell, cells_note
from lpl.errors import UserError

SEED = 7
SAMPLING_STEPS = 25
GUIDANCE_SCALE = 4.0
PICTURE = "samples.png"
ENLARGED, GAP = 2, 2
"""Of the grid of samples: pixels a pixel, and pixels between pictures before that."""


def run_demo(output_dir: str, export_model: str | None, export_data: str | None, max_train_steps: int | None) -> None:
    """Exports model or data, or runs the demo: export both, train by the preset, show samples before and after.

    Args:
        output_dir: gets model/, data/, run/ (the result), samples.png and report.html.
        export_model: only write the model here.
        export_data: only write the data here.
        max_train_steps: instead of the preset's.

    Raises:
        UserError: the folder is in the way, or the photographs' packages are missing.
    """
    if export_model is not None or export_data is not None:
        _export(export_model, export_data)
        return
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: a file is in the way")
    for part in ("model", "data", "run"):
        check_real(folder, folder / part, "--output_dir")
    output, names = OutputFolder(folder, "lpl demo"), Names({PICTURE: None})
    is_old = lambda _: is_config_of_run(folder / "run" / CONFIG_FILE)  # noqa: E731
    output.check(names, is_old)
    with alone_in(folder):
        output.claim(names, is_old)
        _train_and_show(folder, max_train_steps)


def _train_and_show(folder: Path, max_train_steps: int | None) -> None:
    started = time.perf_counter()
    model, data, run = folder / "model", folder / "data", folder / "run"
    _export(str(model), str(data))

    from lpl.cli import run_train
    from lpl.parsing import parse_train
    from lpl.report.options import ReportConfig
    from lpl.report.page import write_report

    length = [] if max_train_steps is None else [f"--max_train_steps={max_train_steps}"]
    run_train(
        parse_train(
            [
                "--config=demo",
                f"--pretrained_model_name_or_path={model}",
                f"--train_data_dir={data}",
                f"--output_dir={run}",
                f"--latent_cache_dir={folder / 'cache'}",
                *length,
            ]
        )
    )
    picture = show_samples(model, run, folder / PICTURE)
    (run / "samples").mkdir(exist_ok=True)
    shutil.copy(picture, run / "samples" / "before-after.png")  # where the report looks
    page = write_report(ReportConfig((str(run),), str(folder / "report.html")), announce=False)
    minutes = (time.perf_counter() - started) / 60
    print(
        f"lpl demo: done in {minutes:.1f} minutes. Model: {run}; samples before and after: {picture}; "
        f"report: {page}; logs: tensorboard --logdir {run / 'logs'}"
    )


def _export(model: str | None, data: str | None) -> None:
    from lpl.demo.photographs import export_data
    from lpl.demo.weights import export_model

    try:
        if model is not None:
            print(f"the small SDXL is in {export_model(model)}")
        if data is not None:
            print(f"its photographs are in {export_data(data)}")
    except RuntimeError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{model or data}: cannot be written ({error.strerror})") from error


def show_samples(before: Path, after: Path, picture: Path) -> Path:
    """Writes a grid: a column a photograph, by its first caption; rows: real crop, before, after, from the same noise.

    Args:
        before, after: pipeline folders.
        picture: the PNG to write.
    """
    import torch
    from diffusers import StableDiffusionXLPipeline
    from PIL import Image

    from lpl.demo.photographs import training_crops
    from lpl.training.validation_images import image_grid

    shown = list({crop.photograph: crop for crop in reversed(training_crops())}.values())[::-1]
    captions, rows = [crop.caption for crop in shown], [crop.image for crop in shown]
    for folder in (before, after):
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, add_watermarker=False)
        pipeline.set_progress_bar_config(desc=f"samples {folder.name}")
        rows += pipeline(
            captions,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(SEED + i) for i in range(len(captions))],
        ).images
    grid = image_grid(rows, len(captions), GAP)
    grid = grid.resize((grid.width * ENLARGED, grid.height * ENLARGED), Image.Resampling.NEAREST)
    grid.save(picture, pnginfo=cells_note(_cells(captions, *rows[0].size)))
    return picture


def _cells(captions: list[str], width: int, height: int) -> list[Cell]:
    """Where each picture of show_samples is, for the report."""
    cells = []
    for row, kind in enumerate(("real", "before", "after")):
        for column, caption in enumerate(captions):
            x, y = ENLARGED * column * (width + GAP), ENLARGED * row * (height + GAP)
            box = (x, y, x + ENLARGED * width, y + ENLARGED * height)
            cells.append(Cell(kind, caption, SEED + column, box))
    return cells
