"""results.json as tables in Markdown, for docs/results.md.

    python -m benchmarks.quality.summary [results.json]

Ratios are paired by seed: of each seed the arm's distance over the other arm's, with Student's 95 % interval of their
mean logarithm.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy.stats import t as student

from lpl.config import TrainConfig

FILE = Path(__file__).parent / "results.json"
Row = dict[str, Any]
BAR = 0.94
BANDS = ("low_band_log_error", "middle_band_log_error", "high_band_log_error")


class Ratio(NamedTuple):
    """A paired ratio; the ends are None with fewer than two seeds."""

    value: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        ends = "" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.3f}{ends}"


def paired_ratio(values: Sequence[float], others: Sequence[float]) -> Ratio:
    """Geometric mean of values / others and exp(mean ± t s / sqrt(n)) of their logarithms."""
    logs = [math.log(a / b) for a, b in zip(values, others, strict=True)]
    mean, count = fmean(logs), len(logs)
    if count < 2:
        return Ratio(math.exp(mean), None, None, count)
    half = float(student.ppf(0.975, count - 1)) * stdev(logs) / math.sqrt(count)
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), count)


def reported(rows: list[Row], arm: str) -> dict[int, Row]:
    """The reported rows of an arm by seed; of several lengths or numbers of samples those of the last row."""
    found = [row for row in rows if row["arm"] == arm and row["reported"]]
    return {row["seed"]: row for row in found if _kind(row) == _kind(found[-1])}


def _kind(row: Row) -> tuple[int, int]:
    """What paired rows have in common: steps, those of the arm whose time it was given, and samples."""
    return row.get("base_steps") or row["steps"], row["samples"]


def ratio_of(rows: list[Row], arm: str, other: str, figure: str = "frechet") -> Ratio | None:
    """Of the seeds that both arms have; None: there are none."""
    first, second = reported(rows, arm), reported(rows, other)
    seeds = sorted(seed for seed in first.keys() & second.keys() if _kind(first[seed]) == _kind(second[seed]))
    if not seeds:
        return None
    return paired_ratio([first[s][figure] for s in seeds], [second[s][figure] for s in seeds])


def table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def arms_table(rows: list[Row]) -> str:
    """Means of every reported arm."""
    figures = ("frechet", "frechet_images", "frechet_train", "kernel", *BANDS)
    names = dict.fromkeys(row["arm"] for row in rows if row["reported"])
    lines = []
    for name in names:
        found = list(reported(rows, name).values())
        means = [f"{fmean(row[figure] for row in found):.4g}" for figure in figures]
        seconds = fmean(row["seconds"] for row in found)
        lines.append([name, len(found), found[0]["steps"], f"{seconds:.0f}", *means])
    return table(["arm", "seeds", "steps", "seconds", *figures], lines)


def ratios_table(rows: list[Row]) -> str:
    """LPL against every other arm of its setting."""
    lines = []
    for name in dict.fromkeys(row["arm"] for row in rows if row["reported"]):
        base, _, setting = name.partition("@")
        ours = f"lpl@{setting}" if setting else "lpl"
        if base == "lpl" or (found := ratio_of(rows, ours, name)) is None:
            continue
        others = [ratio_of(rows, ours, name, figure) for figure in ("frechet_images", *BANDS)]
        lines.append([f"{ours} / {name}", found.seeds, found, *others])
    return table(["arms", "seeds", "frechet", "frechet_images", *BANDS], lines)


def seeds_table(rows: list[Row]) -> str:
    """The searched setting, seed by seed."""
    ours, base = reported(rows, "lpl"), reported(rows, "baseline")
    lines = []
    for seed in sorted(ours.keys() & base.keys()):
        a, b = ours[seed], base[seed]
        smaller = "yes" if a["high_band_log_error"] < b["high_band_log_error"] else "no"
        pairs = [f"{b[name]:.4g} → {a[name]:.4g}" for name in ("frechet", "frechet_images", "high_band_log_error")]
        lines.append([seed, *pairs, smaller])
    heads = ["seed", "frechet", "frechet_images", "high_band_log_error", "high band smaller"]
    return table(heads, lines)


def differences(rows: list[Row], arm: str, chosen: dict[str, Any] | None) -> list[tuple[str, Row]]:
    """An arm's search, best first: what differs from the chosen options (None: the best row's), and the row."""
    found = sorted((row for row in rows if row["arm"] == arm and not row["reported"]), key=lambda r: r["frechet"])
    named, unset = [], TrainConfig().flat()
    chosen = chosen or (found[0]["options"] if found else {})
    for row in found:
        best, options = (unset | entry for entry in (chosen, row["options"]))
        names = sorted(chosen.keys() | row["options"].keys())
        other = [f"{n} {options.get(n, 'unset')}" for n in names if options.get(n) != best.get(n)]
        named.append((", ".join(other) or "chosen", row))
    return named


def search_table(content: dict[str, Any]) -> str:
    """What the search tried, best first, as what differs from what was chosen."""
    parts = []
    for arm in ("baseline", "lpl"):
        options = content.get("best", {}).get(arm)
        found = differences(content["rows"], arm, options)
        if found:
            lines = [[said, f"{row['frechet']:.4g}", f"{row['high_band_log_error']:.4g}"] for said, row in found]
            chosen = ", ".join(f"{name} {value}" for name, value in (options or found[0][1]["options"]).items())
            parts.append(f"{arm}, chosen: {chosen}\n\n{table(['differs in', 'frechet', 'high_band_log_error'], lines)}")
    return "\n\n".join(parts)


def verdict(rows: list[Row]) -> str:
    """Both bars in words."""
    ratio = ratio_of(rows, "lpl", "baseline")
    if ratio is None:
        return "no pairs yet"
    met = ratio.value <= BAR and ratio.high is not None and ratio.high < 1
    ours, base = reported(rows, "lpl"), reported(rows, "baseline")
    seeds = ours.keys() & base.keys()
    smaller = sum(ours[s]["high_band_log_error"] < base[s]["high_band_log_error"] for s in seeds)
    return (
        f"Fréchet distance LPL / baseline {ratio} over {ratio.seeds} seeds: the bar ({BAR}, upper end below 1) is "
        f"{'met' if met else 'not met'}. High-band log error smaller with LPL in {smaller} of {len(seeds)} seeds."
    )


def summary(content: dict[str, Any]) -> str:
    """All of it."""
    rows: list[Row] = content["rows"]
    floors = [
        [name, *(f"{value:.4g}" for value in entry["floor"].values()), entry["curve"][-1]["steps"],
         f"{entry['curve'][-1]['frechet']:.4g}", "yes" if entry.get("reached") else "no"]
        for name, entry in content["baselines"].items() if entry["curve"]
    ]  # fmt: skip
    first = next(iter(content["baselines"].values()), {"floor": {}})["floor"]
    names = [name.removeprefix("frechet_").replace("_", " ") for name in first]
    heads = ["setting", *names, "steps", "baseline", "flat"]
    parts = [verdict(rows), seeds_table(rows), ratios_table(rows), arms_table(rows), table(heads, floors)]
    guided = content.get("guided", [])
    if guided:
        parts.append(f"With guidance {guided[0]['guidance']:g}, {guided[0]['samples']} samples:")
        parts += [ratios_table(guided), arms_table(guided)]
    return "\n\n".join([*parts, search_table(content)])


if __name__ == "__main__":
    print(summary(json.loads((Path(sys.argv[1]) if len(sys.argv) > 1 else FILE).read_text(encoding="utf-8"))))
