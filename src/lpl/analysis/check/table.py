"""A check as text for the terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

INDENT, WIDTH = 13, 118


def table(found: dict[str, Any]) -> str:
    """check.json in tables and lines."""
    lines = _labelled("verdict", [found["verdict"]])
    lines += _labelled("images", [f"{found['num_images']} on {found['device']}, {found['seconds']:.0f} s"])
    lines += _components(found["components"])
    lines += _labelled("walk", [f"{found['walk_equals_decode']:.2g} at most between LPL's decoder and vae.decode"])
    if "reconstruction" in found:
        own = found["reconstruction"]
        lines += _labelled("VAE", [f"PSNR {own['psnr_mean']:.1f} dB, worst {own['psnr_min']:.1f} dB: {own['file']}"])
        lines += _levels(found)
        lines += _step(found["step"])
        suggested = found["suggestion"]
        lines += _labelled("suggestion", suggested["why"])
    for label, key in (("warnings", "warnings"), ("faults", "faults"), ("left out", "refused")):
        lines += _labelled(label, found[key])
    return "\n".join(line.rstrip() for line in lines)


def _components(components: dict[str, Any]) -> list[str]:
    dtypes = list(next(iter(components.values())))
    rows = [["precision", "", *dtypes]]
    for name, by_dtype in components.items():
        cells = []
        for dtype in dtypes:
            entry = by_dtype[dtype]
            if entry["finite"] is None:
                cells.append("not here")
            elif not entry["finite"]:
                cells.append("NOT FINITE")
            else:
                known = dtype != "float32" and entry["relative_error"] is not None
                cells.append((f"{entry['relative_error']:.1e}, " if known else "") + f"to {entry['max_abs']:.3g}")
        rows.append(["", name, *cells])
    notes = ["relative error against float32, and the largest activation"]
    return _table(rows) + _labelled("", notes)


def _levels(found: dict[str, Any]) -> list[str]:
    taps = [layer["tap"] for layer in found["layers"]]
    masked = [layer["tap"] for layer in found["layers"] if any(b["outlier_fraction"] for b in layer["bins"])]
    rows = [["by timestep", "t", *taps, "LPL", *(f"out {tap}" for tap in masked), "ratio", "cosine"]]
    for k, row in enumerate(found["gradients"]):
        by_tap = {layer["tap"]: layer["bins"][k] for layer in found["layers"]}
        rows.append(
            [
                "",
                f"{row['t_low']}..{row['t_high'] - 1}",
                *(_number(by_tap[tap]["distance"]) for tap in taps),
                _number(row["lpl"]),
                *(_percent(by_tap[tap]["outlier_fraction"]) for tap in masked),
                _number(row["ratio"]),
                f"{row['cosine']:.2f} +- {row['cosine_error']:.2f}",
            ]
        )
    notes = [
        "distance by layer, their weighted mean, share of outliers; LPL's gradient against the diffusion loss's: "
        "ratio of lengths at weight 1, cosine with its standard error",
        f"this run's gate is {found['gate']}; {found['p_gate']:.3g} of the samples pass it",
    ]
    return _table(rows) + _labelled("", notes)


def _step(step: dict[str, Any]) -> list[str]:
    size = step["peak_bytes"]
    memory = f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
    lines = [
        f"{step['samples']} samples: about {memory} at its peak ({step['phase']}), {step['flops'] / 1e12:.3g} TFLOP"
    ]
    if step["seconds"] is not None:
        plain = step["seconds_without_lpl"]
        lines.append(
            f"{step['seconds']:.3g} s forward and backward, {plain:.3g} s of them without LPL, which takes "
            f"{step['lpl_seconds_per_sample']:.3g} s for each of {step['lpl_samples']:.3g} samples on average"
        )
    return _labelled("step", lines)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "-"


def _labelled(label: str, texts: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for text in texts:
        lines += textwrap.wrap(
            text, WIDTH - INDENT, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    return [f"{'' if number else label:{INDENT}}{line}" for number, line in enumerate(lines)]


def _table(rows: list[list[str]]) -> list[str]:
    """The first column is the label, the second to the left, the others to the right."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[1:]]
    return [
        f"{row[0]:{INDENT}}" + "  ".join([row[1].ljust(widths[0]), *map(str.rjust, row[2:], widths[1:])])
        for row in rows
    ]
