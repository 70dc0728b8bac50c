"""Folders for the page's tests: a comparison of four arms with evaluations and a check, as the commands write them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lpl.base.text import Prompt
from lpl.comparison.arms import Arm
from lpl.comparison.measures import EvalMetrics, measure_run
from lpl.comparison.run import result
from lpl.config import DataConfig, LoggingConfig, LPLConfig, OptimConfig, RunConfig, TrainConfig
from lpl.config.commands import CompareConfig
from lpl.config.files import write_config
from lpl.data.sheets import KEY, cells_note
from lpl.training.validation_images import label_grid

ARMS = {"baseline": 0.0, "lpl": -0.03, "lpl-strong": 0.05, "same": 0.0}
SEEDS = (0, 1, 2)
PROMPTS = [
    "a portrait of an old sailor, film grain, window light",
    "a bowl of ramen on a wooden table, steam, close-up, shallow depth of field, 50 mm, natural light, highly detailed",
    "<b>a & b</b> 'quoted' \"twice\"",
]
EDGES = list(range(0, 1001, 100))


def four_arms(home: Path, side: int = 512, images: int = 12) -> Path:
    """A comparison of four arms and three seeds, with pictures of this side, and home/check.

    Args:
        home: to fill.
        side: of evaluation's images, in pixels.
        images: of each arm.
    """
    random = np.random.default_rng(0)
    arms, measured = [], {}
    for name, effect in ARMS.items():
        arms.append(Arm(name, {"lpl_weight": "auto" if name != "baseline" else "0"}, name == "baseline", {}))
        for seed in SEEDS:
            figures = _run(home / name / f"seed-{seed}", seed, effect, random, side, images if seed == 0 else 0)
            measured.setdefault(name, []).append(measure_run(home, f"{name}/seed-{seed}", seed, figures))
    options = CompareConfig(TrainConfig(data=DataConfig(validation_samples=8)), "arms.yaml", SEEDS, "reference", 1000)
    (home / "compare.json").write_text(json.dumps(result(options, arms, measured, ["fid: no weights of Inception"])))
    _check(home / "check", random)
    return home


def _run(folder: Path, seed: int, effect: float, random: Any, side: int, images: int) -> EvalMetrics:
    folder.mkdir(parents=True)
    config = TrainConfig(
        lpl=LPLConfig(lpl_weight=0.0 if effect == 0 else "auto"),
        run=RunConfig(seed=seed, output_dir=str(folder), max_train_steps=500, train_batch_size=4),
        data=DataConfig(validation_samples=8, resolution=64),
        optim=OptimConfig(use_ema=True),
        logging=LoggingConfig(validation_prompt="x"),
    )
    write_config(config, folder)
    (folder / "finished.json").write_text('{"step": 500, "weights": "ema"}')
    rows = []
    for step in range(0, 501, 50):
        for kind in ("raw", "ema"):
            factor = (1 + effect * step / 500 + 0.002 * random.normal()) * (1 + 0.05 * seed)
            bins = [factor * 0.3 * math.exp(-t / 250) for t in EDGES[1:]]
            row = {"step": step, "weights": kind, "samples": 8, "edges": EDGES, "diffusion_loss": sum(bins) / 10}
            row |= {"diffusion_loss_bins": bins, "lpl": 0.01 * factor}
            rows.append(row | {"lpl_bins": [0.001 * factor * (k + 1) if k < 7 else None for k in range(10)]})
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with SummaryWriter(str(folder / "logs" / "lpl")) as log:
        for step in range(10, 501, 10):
            share = 0.0 if effect == 0 else 0.2 + 0.05 * random.normal()
            values = {
                "train_loss": 0.1 + 0.01 * random.normal(),
                "lpl/gradient_share": share,
                "lpl/loss_share": share / 2,
            }
            values |= {"samples_per_second": 40.0 if effect == 0 else 32.0, "lpl/weight": share}
            for tag, value in values.items():
                log.add_scalar(tag, value, step)
    (folder / "samples").mkdir()
    for step in (0, 500):
        drawn = {kind: [picture(64, i, effect * step) for i in range(len(PROMPTS))] for kind in ("raw", "ema")}
        grid = label_grid(drawn, [Prompt(text) for text in PROMPTS], f"step {step}", [11, 12, 2**60])
        grid.save(folder / "samples" / f"step-{step:07}.png", pnginfo=cells_note(grid.info[KEY]))
    return _evaluation(folder / "eval", effect, random, side, images)


def picture(side: int, number: int, effect: float) -> Image.Image:
    """Something with edges and gradients, another for each number."""
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(2 * np.pi * ((number + c + 1) * x * y + x * (c + 1) + effect)) for c in range(3)]
    noise = np.random.default_rng(number).normal(0, 0.05, (side, side, 3))
    return Image.fromarray(np.uint8(255 * np.clip(0.5 + 0.45 * np.stack(waves, -1) + noise, 0, 1)))


def _evaluation(folder: Path, effect: float, random: Any, side: int, images: int) -> EvalMetrics:
    folder.mkdir()
    shown = []
    for i in range(images):
        picture(side, i, effect).save(folder / f"{i}.png")
        shown.append({"prompt": f"{PROMPTS[i % 3]}, number {i}", "seed": 0, "index": i, "file": f"{i}.png"})
    frequency = [(k + 0.5) / 128 for k in range(64)]
    reference = [(f / 0.01) ** -2.0 for f in frequency]

    def metric(value: float, lower: bool, floor: float) -> dict[str, Any]:
        value *= 1 + (effect if lower else -effect) * 2 + 0.005 * random.normal()
        return {"value": value, "interval": [0.97 * value, 1.03 * value], "floor": floor, "lower_is_better": lower,
                "note": "rough: only 64 images"}  # fmt: skip

    metrics = {
        "frechet_efficientnet-lite0": metric(41.0, True, 6.0), "precision": metric(0.6, False, 0.95),
        "spectrum_log_error_high": metric(0.3, True, 0.1),
    }  # fmt: skip
    content = {
        "lpl": "0.1.0", "kind": "eval", "environment": {"torch": torch.__version__}, "options": {}, "refused": [],
        "model": str(folder.parent), "reference": "reference", "num_samples": 1000, "num_reference": 500,
        "features": "efficientnet-lite0", "metrics": metrics, "images": shown,
        "spectrum": {"frequency": frequency, "reference": reference, "floor": [0.9 * p for p in reference],
                     "samples": [(0.8 - effect) * p for p in reference]},
    }  # fmt: skip
    (folder / "eval.json").write_text(json.dumps(content))
    notes = {name: m["note"] for name, m in metrics.items()}
    return EvalMetrics({name: m["value"] for name, m in metrics.items()}, notes, ())


def _check(folder: Path, random: Any) -> None:
    folder.mkdir()
    for name in ("reconstruction", "map"):
        picture(200, 3, 0.1).save(folder / f"{name}.png")
    bins = [{"t_low": a, "t_high": a + 100} for a in EDGES[:-1]]
    one = {"finite": True, "max_abs": 3.0, "relative_error": 0.0}
    layers = [
        {"tap": tap, "channels": 64, "stride": 8 >> k,
         "bins": [b | {"distance": 0.001 * (k + 1), "outlier_fraction": 0.002} for b in bins]}
        for k, tap in enumerate(("mid", "up_0", "up_1"))
    ]  # fmt: skip
    content = {
        "lpl": "0.1.0", "kind": "check", "environment": {"torch": torch.__version__}, "options": {},
        "refused": ["float16 was not measured: no GPU"], "walk_equals_decode": 0.0,
        "components": {"vae": {"float32": one, "float16": one | {"finite": False, "relative_error": None}}},
        "reconstruction": {"psnr_mean": 27.0, "psnr_min": 21.0, "file": "reconstruction.png"}, "layers": layers,
        "gradients": [b | {"ratio": 0.1 + b["t_low"] / 500, "cosine": 0.5 - b["t_low"] / 1500} for b in bins],
        "suggestion": {"lpl_t_threshold": 600, "lpl_weight": 1.5, "why": ["above t = 600 the cosine is below 0.1"]},
        "step": {"peak_bytes": 2**30, "flops": 3e12, "seconds": None},
        "maps": [{"tap": "up_0", "t": 100, "file": "map.png"}],
    }  # fmt: skip
    (folder / "check.json").write_text(json.dumps(content))
