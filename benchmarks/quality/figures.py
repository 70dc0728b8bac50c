"""Draws results.json and what the kept networks make: docs/results_{guidance,recall,search,samples,vae}.png.

python -m benchmarks.quality.figures [lpl-quality]    # with the data: held-out views and their reconstructions, too
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageDraw

from benchmarks.quality.kept import FOLDER, kept_pipeline, read_kept
from benchmarks.quality.summary import FEW, FILE, MANY, Row, floor_of, reported, tried
from lpl.evaluation.intervals import mean_interval

DOCS = Path(__file__).parents[2] / "docs"
COLORS = {
    "baseline": "0.35",
    "lpl": "tab:blue",
    "lpl-default": "tab:green",
    "lpl-few": "tab:purple",
    "baseline-few": "0.7",
}
LABELS = {
    "frechet": "Fréchet, to reconstructions",
    "frechet_same": "Fréchet, to views of the training pictures",
    "frechet_second": "Fréchet, second feature space",
    "recall": "recall",
    "high_band_log_error": "high-band log error",
}
COLUMNS, SCALE = 8, 2
SHOWN_GUIDANCE = 3.0


def draw_guidance(content: dict[str, Any]) -> None:
    """Every figure over guidance, both step counts: the mean of the seeds with its interval."""
    rows: list[Row] = content["rows"]
    figure, axes = plt.subplots(2, len(LABELS), figsize=(3.2 * len(LABELS), 6), sharex=True, squeeze=False)
    for line, steps in zip(axes, (MANY, FEW), strict=True):
        for axis, (name, label) in zip(line, LABELS.items(), strict=True):
            for arm, color in COLORS.items():
                curve = reported(rows, arm, steps)
                if not curve:
                    continue
                found = [mean_interval([row[name] for row in of.values()]) for of in curve.values()]
                axis.plot(list(curve), [f.value for f in found], "o-", color=color, markersize=3, label=arm)
                low = [f.value if f.low is None else f.low for f in found]
                high = [f.value if f.high is None else f.high for f in found]
                axis.fill_between(list(curve), low, high, color=color, alpha=0.2, linewidth=0)
                floor = floor_of(content, next(iter(next(iter(curve.values())).values()))["samples"])
                if floor is not None and name in floor and arm == "baseline":
                    axis.axhline(floor[name], color="0.8", linewidth=1, linestyle=":")
            axis.set_title(f"{label}, {steps} steps", fontsize=8)
            axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7)
    for axis in axes[1]:
        axis.set_xlabel("guidance", fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "results_guidance.png", dpi=90)


def draw_recall(rows: list[Row]) -> None:
    """Precision against recall along guidance."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    for axis, steps in zip(axes, (MANY, FEW), strict=True):
        for arm, color in COLORS.items():
            curve = reported(rows, arm, steps)
            means = [
                [mean_interval([r[f] for r in of.values()]).value for f in ("recall", "precision")]
                for of in curve.values()
            ]
            if means:
                axis.plot(*zip(*means, strict=True), "o-", color=color, markersize=3, label=arm)
                for guidance, place in zip(curve, means, strict=True):
                    axis.annotate(f"{guidance:g}", place, fontsize=6, color=color)
        axis.set_xlabel(f"recall, {steps} steps", fontsize=8)
        axis.set_ylabel("precision", fontsize=8)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(DOCS / "results_recall.png", dpi=90)


def draw_search(content: dict[str, Any]) -> None:
    """Every run of the search at its best guidance, named by what differs from what was chosen."""
    lines = [
        (arm, entry) for arm in ("baseline", "lpl")
        for entry in tried(content["rows"], arm, content.get("best", {}).get(arm))
    ]  # fmt: skip
    figure, axis = plt.subplots(figsize=(12, 0.8 + 0.2 * len(lines)))
    for place, (arm, entry) in enumerate(lines):
        color = COLORS[arm]
        axis.plot([entry.many["frechet"]], [place], "o", color=color)
        if entry.few is not None:
            axis.plot([entry.few["frechet"]], [place], "o", color=color, fillstyle="none")
    axis.set_yticks(range(len(lines)), [f"{arm}: {entry.said}" for arm, entry in lines], fontsize=7)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    axis.set_xlabel(f"Fréchet distance at the best guidance: {MANY} steps full, {FEW} steps open", fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "results_search.png", dpi=90)


def draw_samples() -> None:
    """Both arms' samples of the same noise under each other: at 20 steps, below them at 4."""
    from benchmarks.quality.measure import draw, open_sampler_of

    kept = read_kept()
    assert kept is not None
    prompts = kept["captions"][:: max(1, len(kept["captions"]) // COLUMNS)][:COLUMNS]
    strips = []
    for steps in (MANY, FEW):
        for arm in ("baseline", "lpl"):
            sampler = open_sampler_of(kept_pipeline(FOLDER, arm))
            strips.append((f"{arm}, {steps}", draw(sampler, prompts, COLUMNS, 1, SHOWN_GUIDANCE, steps)))
    side = 64 * SCALE
    sheet = Image.new("RGB", (90 + COLUMNS * side, math.ceil(len(strips)) * side), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (label, images) in enumerate(strips):
        pen.text((4, line * side + side // 2), label, fill="black")
        for column, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (90 + column * side, line * side))
    sheet.save(DOCS / "results_samples.png")


def draw_vae(data: Path) -> None:
    """Held-out views, and below each its reconstruction."""
    from benchmarks.quality.kept import kept_vae
    from benchmarks.quality.measure import spread_rows
    from lpl.evaluation.images import read_picture
    from lpl.evaluation.reference import reconstruct

    rows = spread_rows(data / "held-out")[: 2 * COLUMNS]
    images = torch.stack([read_picture(data / "held-out" / row["file_name"], 64, "data") for row in rows])
    both = torch.stack([images, reconstruct(images, kept_vae(FOLDER))])
    lines = [torch.cat(list(line), 2) for half in both.split(COLUMNS, 1) for line in half]
    sheet = Image.fromarray(torch.cat(lines, 1).permute(1, 2, 0).contiguous().numpy())
    size = (sheet.width * SCALE, sheet.height * SCALE)
    sheet.resize(size, Image.Resampling.NEAREST).save(DOCS / "results_vae.png")


def main() -> None:
    """Draws all that there are rows and weights for."""
    torch.set_num_threads(1)
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    draw_guidance(content)
    draw_recall(content["rows"])
    draw_search(content)
    if all((FOLDER / f"arm_{arm}.safetensors").is_file() for arm in ("baseline", "lpl")):
        draw_samples()
    if len(sys.argv) > 1:
        draw_vae(Path(sys.argv[1]) / "data")


if __name__ == "__main__":
    main()
