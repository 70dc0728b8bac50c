"""`lpl demo`: `lpl compare` on a small SDXL and photographs, without LPL and with it, and a picture of samples."""

from __future__ import annotations

import time
from pathlib import Path

from lpl.base.errors import UserError
from lpl.base.files import alone_in, write_atomically
from lpl.base.output_folder import Names, OutputFolder, check_real
from lpl.config.commands import DemoConfig, ReportConfig
from lpl.data.sheets import cells_note

WITHOUT, WITH = "without-lpl", "with-lpl"
ARMS = f"{WITHOUT}: {{use_lpl: false}}\n{WITH}: {{}}\n"
LABELS = {WITHOUT: "without LPL", WITH: "with LPL"}
"""Labels in the picture."""
SEEDS = ("0", "1", "2")
GUIDANCE_SCALES = (1.0, 3.0)
SAMPLING_STEPS = 12
NUM_SAMPLES = 256
"""Samples of each run at each guidance."""
PICTURE, ARMS_FILE = "samples.png", "arms.yaml"
PARTS = ("model", "data", "views", "cache", "compared")
"""Folders in --output_dir."""


def run_demo(options: DemoConfig) -> None:
    """Exports model or data, or runs the demo: export both, compare without and with LPL by the preset, show samples.

    --output_dir gets the folders of PARTS, samples.png and, in compared/, the runs and report.html.

    Raises:
        UserError: the folder is in the way, or the photographs' packages are missing.
    """
    if options.export_model is not None or options.export_data is not None:
        _export(options.export_model, options.export_data)
        return
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: a file is in the way")
    for part in PARTS:
        check_real(folder, folder / part, "--output_dir")
    output, names = OutputFolder(folder, "lpl demo"), Names({PICTURE: None, ARMS_FILE: None})
    output.check(names)
    with alone_in(folder):
        output.claim(names)
        _compare_and_show(folder, options.max_train_steps)


def _compare_and_show(folder: Path, max_train_steps: int | None) -> None:
    started = time.perf_counter()
    model, data, views, cache, compared = (folder / part for part in PARTS)
    _export(str(model), str(data))

    from lpl.comparison.run import run_compare
    from lpl.config.command_line import parse_compare
    from lpl.demo.samples import export_views
    from lpl.report.page import write_report

    export_views(views)
    write_atomically(folder / ARMS_FILE, ARMS.encode())
    length = [] if max_train_steps is None else [f"--max_train_steps={max_train_steps}"]
    options = parse_compare(
        [
            "--config=demo",
            f"--arms={folder / ARMS_FILE}",
            f"--pretrained_model_name_or_path={model}",
            f"--train_data_dir={data}",
            f"--output_dir={compared}",
            f"--latent_cache_dir={cache}",
            f"--reference_dir={views}",
            f"--num_samples={NUM_SAMPLES}",
            f"--num_inference_steps={SAMPLING_STEPS}",
            *("--guidance_scale", *map(str, GUIDANCE_SCALES)),
            *("--seeds", *SEEDS),
            *length,
        ]
    )
    run_compare(options)
    models = {arm: compared / arm / f"seed-{SEEDS[0]}" for arm in (WITHOUT, WITH)}
    _show(models, folder / PICTURE)
    page = write_report(ReportConfig((str(compared),)), announce=False)
    minutes = (time.perf_counter() - started) / 60
    print(
        f"lpl demo: done in {minutes:.1f} minutes. Page: {page}; samples without and with LPL: {folder / PICTURE}; the "
        f"model with LPL: {models[WITH]}; logs: tensorboard --logdir {compared}"
    )


def _show(models: dict[str, Path], picture: Path) -> None:
    """Draws the picture, and saves it where the report looks, with notes on which parts belong to each run."""
    from lpl.demo.samples import REAL, draw_sheet

    sheet, cells = draw_sheet({LABELS[arm]: run for arm, run in models.items()})
    sheet.save(picture)
    for arm, run in models.items():
        folder = run / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / "step-1.png", pnginfo=cells_note([cell for cell in cells if cell.kind == LABELS[arm]]))
        sheet.save(folder / "real.png", pnginfo=cells_note([cell for cell in cells if cell.kind == REAL]))


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
