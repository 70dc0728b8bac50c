"""Draws results.json and the kept UNets' samples for docs/results.md: docs/results_{ratios,search,samples}.png.

python -m benchmarks.quality.figures
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageDraw

from benchmarks.quality.kept import kept_pipeline
from benchmarks.quality.summary import BAR, FILE, Row, differences, ratio_of, reported

DOCS = Path(__file__).parents[2] / "docs"
LABELS = {
    "frechet": "Fréchet, to reconstructions",
    "frechet_images": "Fréchet, to images",
    "low_band_log_error": "low-band log error",
    "middle_band_log_error": "middle-band log error",
    "high_band_log_error": "high-band log error",
}
COLUMNS, SCALE = 8, 2


def draw_ratios(rows: list[Row], guided: list[Row]) -> None:
    """LPL over every other arm: each seed a dot, the mean with its interval."""
    arms = [name for name in dict.fromkeys(row["arm"] for row in rows if row["reported"]) if name[:3] != "lpl"]
    lines = [(f"LPL / {arm}", rows, "lpl" + arm[arm.index("@") :] if "@" in arm else "lpl", arm) for arm in arms]
    if guided:
        lines.insert(1, (f"LPL / baseline, guidance {guided[0]['guidance']:g}", guided, "lpl", "baseline"))
    figure, axes = plt.subplots(1, len(LABELS), figsize=(14, 0.6 + 0.45 * len(lines)), sharey=True)
    for axis, (name, label) in zip(axes, LABELS.items(), strict=True):
        axis.axvline(1.0, color="0.6", linewidth=1)
        if name == "frechet":
            axis.axvline(BAR, color="tab:red", linewidth=1, linestyle=":")
        for place, (_, among, ours, arm) in enumerate(lines):
            ratio = ratio_of(among, ours, arm, name)
            if ratio is None:
                continue
            first, second = reported(among, ours), reported(among, arm)
            points = [first[s][name] / second[s][name] for s in first.keys() & second.keys()]
            axis.plot(points, [place] * len(points), "o", color="tab:blue", alpha=0.35, markersize=4)
            if ratio.low is not None and ratio.high is not None:
                axis.plot([ratio.low, ratio.high], [place, place], color="tab:blue", linewidth=2)
            axis.plot([ratio.value], [place], "D", color="tab:blue", markersize=6)
        axis.set_title(label, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_yticks(range(len(lines)), [label for label, *_ in lines])
        axis.set_ylim(len(lines) - 0.5, -0.5)
    figure.tight_layout()
    figure.savefig(DOCS / "results_ratios.png", dpi=90)


def draw_search(rows: list[Row], chosen: dict[str, Any]) -> None:
    """Every run of the search, best first, named by what differs from what was chosen."""
    arms = [arm for arm in ("baseline", "lpl") if any(r["arm"] == arm and not r["reported"] for r in rows)]
    found = {arm: differences(rows, arm, chosen.get(arm)) for arm in arms}
    lines = [(arm, *entry) for arm in arms for entry in found[arm]]
    figure, axis = plt.subplots(figsize=(12, 0.8 + 0.22 * len(lines)))
    for place, (arm, _, row) in enumerate(lines):
        axis.plot([row["frechet"]], [place], "o", color="0.4" if arm == "baseline" else "tab:blue")
    axis.set_yticks(range(len(lines)), [f"{arm}: {said}" for arm, said, _ in lines], fontsize=8)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    axis.set_xlabel("Fréchet distance to reconstructions", fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "results_search.png", dpi=90)


def draw_samples(prompts: list[str]) -> None:
    """Both arms' samples of the same noise, row by row under each other: baseline above, LPL below."""
    drawn = {}
    for arm in ("baseline", "lpl"):
        pipeline = kept_pipeline(arm)
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
        drawn[arm] = pipeline(
            prompts, num_inference_steps=50, guidance_scale=1.0, generator=generators, width=64, height=64
        ).images
    side, gap = 64 * SCALE, 6
    blocks = math.ceil(len(prompts) / COLUMNS)
    sheet = Image.new("RGB", (60 + COLUMNS * side, blocks * (2 * side + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, arm in enumerate(drawn):
        for number, image in enumerate(drawn[arm]):
            column, block = number % COLUMNS, number // COLUMNS
            top = block * (2 * side + gap) + place * side
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (60 + column * side, top))
            if column == 0:
                pen.text((4, top + side // 2), arm, fill="black")
    sheet.save(DOCS / "results_samples.png")


def main() -> None:
    """Draws all three."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    draw_ratios(content["rows"], content.get("guided", []))
    draw_search(content["rows"], content.get("best", {}))
    draw_samples(content["prompts"][: 2 * COLUMNS])


if __name__ == "__main__":
    main()
