"""results.json as tables in Markdown, for docs/results.md, and the verdict.

    python -m benchmarks.quality.summary [results.json]

Statistics are those of `lpl compare` (lpl/evaluation/guidance.py): a figure of a seed is that at the guidance which
is best on the arm's *other* seeds; ratios are paired by seed; recall is compared by its difference.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.quality.measure import FIGURES
from lpl.config import TrainConfig
from lpl.evaluation.guidance import chosen_guidance
from lpl.evaluation.intervals import Interval, mean_interval, paired_ratio

FILE = Path(__file__).parent / "results.json"
Row = dict[str, Any]
FLOW = "flow-"
"""In front of the names of arms trained by flow matching: another model, which has tables of its own."""
MANY, FEW = 20, 4
SHOWN = ("frechet_second", "recall", "high_band_log_error")
BARS = {MANY: 0.95, FEW: 0.90}
RECALL_BAR, HEADROOM_BAR, CONVERGENCE_BAR, DEFAULT_BAR = -0.01, 2.0, 0.03, 0.02


def reported(rows: list[Row], arm: str, steps: int) -> dict[float, dict[int, Row]]:
    """The reported rows of an arm at so many sampling steps, by guidance and seed; of several lengths or numbers of
    samples those of the last row."""
    found = [r for r in rows if r["arm"] == arm and r["reported"] and r["sampling_steps"] == steps]
    curve: dict[float, dict[int, Row]] = {}
    for row in found:
        if _kind(row) == _kind(found[-1]):
            curve.setdefault(row["guidance"], {})[row["seed"]] = row
    return dict(sorted(curve.items()))


def _kind(row: Row) -> tuple[int, int]:
    """What paired rows have in common: steps, those of the arm whose time it was given, and samples."""
    return row.get("base_steps") or row["steps"], row["samples"]


def finished(rows: list[Row], arm: str, steps: int) -> dict[float, dict[int, Row]]:
    """The reported rows without seeds of which the best guidance so far is an end, where other seeds went further."""
    curve = reported(rows, arm, steps)
    whole = set()
    for seed in {seed for of in curve.values() for seed in of}:
        own = {guidance: of[seed]["frechet"] for guidance, of in curve.items() if seed in of}
        best = min(own, key=lambda guidance: own[guidance])
        if (best > min(own) or best == min(curve)) and (best < max(own) or best == max(curve)):
            whole.add(seed)
    kept = {guidance: {s: row for s, row in of.items() if s in whole} for guidance, of in curve.items()}
    return {guidance: of for guidance, of in kept.items() if of}


def at_best(rows: list[Row], arm: str, steps: int) -> dict[int, Row]:
    """An arm's rows at its best guidance, by seed."""
    curve = finished(rows, arm, steps)
    return {seed: curve[guidance][seed] for seed, guidance in chosen_guidance(curve).items()}


def is_at_edge(rows: list[Row], arm: str, steps: int) -> bool:
    """Whether the best guidance of any seed is an end of what was measured."""
    curve = finished(rows, arm, steps)
    return bool({min(curve), max(curve)} & set(chosen_guidance(curve).values())) if curve else False


def _pairs(first: dict[int, Row], second: dict[int, Row]) -> list[tuple[Row, Row]]:
    shared = sorted(first.keys() & second.keys())
    return [(first[s], second[s]) for s in shared if _kind(first[s]) == _kind(second[s])]


def ratio_of(rows: list[Row], arm: str, other: str, steps: int, figure: str = "frechet") -> Interval | None:
    """Each at its own best guidance, of the seeds that both have; None: there are none."""
    pairs = _pairs(at_best(rows, arm, steps), at_best(rows, other, steps))
    return paired_ratio([a[figure] for a, _ in pairs], [b[figure] for _, b in pairs]) if pairs else None


def difference_of(rows: list[Row], arm: str, other: str, steps: int, figure: str) -> Interval | None:
    """The same of differences."""
    pairs = _pairs(at_best(rows, arm, steps), at_best(rows, other, steps))
    return mean_interval([a[figure] - b[figure] for a, b in pairs]) if pairs else None


def name_at(rows: list[Row], arm: str, steps: int) -> str:
    """The arm that stands for one at so many sampling steps: at few, the one that was best there in the search."""
    few = f"{arm}-few"
    return few if steps == FEW and reported(rows, few, steps) else arm


def table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def floor_of(content: dict[str, Any], samples: int) -> Row | None:
    """The floor of a number of samples."""
    return next((floor for floor in content["floors"] if floor["samples"] == samples), None)


def headroom(content: dict[str, Any]) -> float | None:
    """The baseline's distance at its best guidance, in floors."""
    found = list(at_best(content["rows"], "baseline", MANY).values())
    floor = floor_of(content, found[0]["samples"]) if found else None
    return None if floor is None else fmean(row["frechet"] for row in found) / floor["frechet"]


def pretraining(rows: list[Row], steps: int) -> dict[int, Row]:
    """The pretrained pipeline's rows at its best guidance, by steps of its training."""
    found: dict[int, Row] = {}
    for row in rows:
        if row["arm"] == "pretrained" and row["sampling_steps"] == steps:
            other = found.get(row["steps"])
            if other is None or row["frechet"] < other["frechet"]:
                found[row["steps"]] = row
    return dict(sorted(found.items()))


def convergence(rows: list[Row]) -> float | None:
    """The share by which the last fifth of the pretraining changes the distance; None where it was not measured."""
    found = pretraining(rows, MANY)
    if not found:
        return None
    last = max(found)
    begin = found.get(round(0.8 * last))
    return None if begin is None else abs(1 - found[last]["frechet"] / begin["frechet"])


def verdict(content: dict[str, Any]) -> str:
    """Every bar, what was found, and whether it is met."""
    rows, lines = content["rows"], []

    def say(what: str, bar: str, found: object, met: bool | None) -> None:
        lines.append([what, bar, "not yet" if found is None else found, {True: "yes", False: "no", None: "-"}[met]])

    for steps, bar in BARS.items():
        ours, base = name_at(rows, "lpl", steps), name_at(rows, "baseline", steps)
        ratio = ratio_of(rows, ours, base, steps)
        edge = " at the grid's edge" if any(is_at_edge(rows, arm, steps) for arm in (ours, base)) else ""
        found = None if ratio is None else f"{ratio}, {ratio.seeds} seeds{edge}"
        met = ratio is not None and ratio.value <= bar and ratio.high is not None and ratio.high < 1 and not edge
        said = f"at most {bar}, upper end below 1"
        say(f"Fréchet, {ours} / {base}, own best guidance, {steps} steps", said, found, met if ratio else None)
        recall = difference_of(rows, ours, base, steps, "recall")
        bar_ = f"not below {RECALL_BAR}"
        say(f"recall, {ours} - {base}, {steps} steps", bar_, recall, recall.value >= RECALL_BAR if recall else None)
        pairs = _pairs(at_best(rows, ours, steps), at_best(rows, base, steps))
        smaller = sum(a["high_band_log_error"] < b["high_band_log_error"] for a, b in pairs)
        said = f"{smaller} of {len(pairs)}" if pairs else None
        say(f"high-band log error smaller, {steps} steps", "every seed", said, smaller == len(pairs) if pairs else None)
    best, default = (ratio_of(rows, arm, "baseline", MANY) for arm in ("lpl", "lpl-default"))
    met = bool(best and default and default.value < 1 and default.value - best.value <= DEFAULT_BAR)
    said = f"below 1, within {DEFAULT_BAR} of the best"
    say("Fréchet, default / baseline, 20 steps", said, default, met if default else None)
    room, change = headroom(content), convergence(rows)
    said = None if room is None else f"{room:.2f}"
    say(
        "baseline at its best guidance, in floors",
        f"at least {HEADROOM_BAR:g}",
        said,
        room >= HEADROOM_BAR if room else None,
    )
    said = None if change is None else f"{100 * change:.1f} %"
    bar_ = f"under {100 * CONVERGENCE_BAR:.0f} %"
    say("last fifth of the pretraining", bar_, said, change < CONVERGENCE_BAR if change is not None else None)
    return table(["figure", "bar", "found", "met"], lines)


def arms_of(rows: list[Row]) -> list[str]:
    """Names of the reported arms."""
    return list(dict.fromkeys(row["arm"] for row in rows if row["reported"]))


def arms_table(rows: list[Row], steps: int) -> str:
    """Means of every reported arm at its own best guidance."""
    lines = []
    for name in arms_of(rows):
        found = list(at_best(rows, name, steps).values())
        if found:
            scales = "/".join(f"{g:g}" for g in sorted({row["guidance"] for row in found}))
            edge = " (edge)" if is_at_edge(rows, name, steps) else ""
            seconds = [row["seconds"] for row in found if "seconds" in row]
            means = [f"{fmean(row[figure] for row in found):.4g}" for figure in FIGURES]
            shown = f"{fmean(seconds):.0f}" if seconds else "-"
            lines.append([name, len(found), found[0]["steps"], shown, scales + edge, *means])
    return table(["arm", "seeds", "steps", "seconds", "guidance", *FIGURES], lines)


def ratios_table(rows: list[Row], steps: int) -> str:
    """Every LPL arm against every other one, each at its own best guidance."""
    lines = []
    ours = [name for name in arms_of(rows) if name.startswith("lpl")]
    for name in ours:
        for other in arms_of(rows):
            if other not in ours and (found := ratio_of(rows, name, other, steps)) is not None:
                more = [
                    ratio_of(rows, name, other, steps, f)
                    for f in ("frechet_same", "frechet_second", "high_band_log_error")
                ]
                shares = [difference_of(rows, name, other, steps, f) for f in ("precision", "recall")]
                lines.append([f"{name} / {other}", found.seeds, found, *more, *shares])
    heads = ["arms", "seeds", "frechet", "frechet_same", "frechet_second", "high_band_log_error"]
    return table([*heads, "precision (difference)", "recall (difference)"], lines)


def guidance_table(rows: list[Row], steps: int, arm: str, other: str = "baseline") -> str:
    """Both arms at the same guidance, scale by scale."""
    ours, base = reported(rows, arm, steps), reported(rows, other, steps)
    lines = []
    for guidance in sorted(ours.keys() & base.keys()):
        pairs = _pairs(ours[guidance], base[guidance])
        if pairs:
            both = [f"{fmean(b[f] for _, b in pairs):.4g} → {fmean(a[f] for a, _ in pairs):.4g}"
                    for f in ("frechet", "frechet_second", "precision", "recall", "high_band_log_error")]  # fmt: skip
            ratio = paired_ratio([a["frechet"] for a, _ in pairs], [b["frechet"] for _, b in pairs])
            lines.append([f"{guidance:g}", len(pairs), ratio, *both])
    heads = ["guidance", "seeds", f"frechet {arm} / {other}", "frechet", "frechet_second", "precision", "recall"]
    return table([*heads, "high_band_log_error"], lines)


def seeds_table(rows: list[Row], steps: int) -> str:
    """Both arms at their own best guidance, seed by seed."""
    ours, base = (at_best(rows, name_at(rows, arm, steps), steps) for arm in ("lpl", "baseline"))
    lines = []
    for a, b in _pairs(ours, base):
        pairs = [f"{b[name]:.4g} → {a[name]:.4g}" for name in ("frechet", "recall", "high_band_log_error")]
        lines.append(
            [a["seed"], f"{b['guidance']:g} → {a['guidance']:g}", *pairs, f"{a['frechet'] / b['frechet']:.3f}"]
        )
    return table(["seed", "guidance", "frechet", "recall", "high_band_log_error", "ratio"], lines)


def pretraining_table(content: dict[str, Any]) -> str:
    """The pretraining's curve at its best guidance, and the floors."""
    lines = []
    for steps in (MANY, FEW):
        for trained, row in pretraining(content["rows"], steps).items():
            floor = floor_of(content, row["samples"])
            floors = "" if floor is None else f"{row['frechet'] / floor['frechet']:.2f}"
            values = [f"{row[f]:.4g}" for f in ("frechet", "frechet_second", "recall", "high_band_log_error")]
            lines.append([trained, steps, f"{row['guidance']:g}", *values, floors])
    heads = ["steps", "sampling steps", "best guidance", "frechet", "frechet_second", "recall", "high_band_log_error"]
    names = list(dict.fromkeys(name for floor in content["floors"] for name in floor))
    floors = [[f"{floor[name]:.4g}" for name in names] for floor in content["floors"]]
    return (
        table([*heads, "floors"], lines)
        + "\n\nReal pictures in the place of samples (floors):\n\n"
        + table(names, floors)
    )


class Tried(NamedTuple):
    """A run of the search at its best guidance."""

    said: str
    """What differs from the chosen options."""
    many: Row
    few: Row | None


def tried(rows: list[Row], arm: str, chosen: dict[str, Any] | None) -> list[Tried]:
    """An arm's search, best first; chosen None: what differs from the best run's options."""
    runs: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["arm"] == arm and not row["reported"]:
            of = runs.setdefault(
                json.dumps([row["options"], row["seed"], row["steps"], row["samples"]], sort_keys=True), {}
            )
            best = of.get(row["sampling_steps"])
            if best is None or row["frechet"] < best["frechet"]:
                of[row["sampling_steps"]] = row
    whole = sorted((of for of in runs.values() if MANY in of), key=lambda of: of[MANY]["frechet"])
    unset = TrainConfig().flat()
    chosen = chosen or (whole[0][MANY]["options"] if whole else {})
    found = []
    for of in whole:
        row = of[MANY]
        best, options = (unset | entry for entry in (chosen, row["options"]))
        names = sorted(chosen.keys() | row["options"].keys())
        other = [f"{n} {options.get(n, 'unset')}" for n in names if options.get(n) != best.get(n)]
        found.append(Tried(", ".join(other) or "chosen", row, of.get(FEW)))
    return found


def search_table(content: dict[str, Any]) -> str:
    """What the search tried, best first, as what differs from what was chosen."""
    parts = []
    for arm in ("baseline", "lpl"):
        options = content.get("best", {}).get(arm)
        found = tried(content["rows"], arm, options)
        if found:
            lines = []
            for entry in found:
                few = ["-", "-"] if entry.few is None else [f"{entry.few['frechet']:.4g}", f"{entry.few['guidance']:g}"]
                row = entry.many
                shown = [
                    f"{row['frechet']:.4g}",
                    f"{row['guidance']:g}",
                    f"{row['frechet_second']:.4g}",
                    f"{row['recall']:.3f}",
                ]
                lines.append([entry.said, *shown, f"{row['high_band_log_error']:.3g}", *few])
            chosen = ", ".join(f"{name} {value}" for name, value in (options or found[0].many["options"]).items())
            heads = [
                "differs in",
                f"frechet, {MANY} steps",
                "guidance",
                "frechet_second",
                "recall",
                "high_band_log_error",
            ]
            text = table([*heads, f"frechet, {FEW} steps", "guidance"], lines)
            parts.append(f"{arm}, {len(found)} runs, chosen: {chosen}\n\n{text}")
    return "\n\n".join(parts)


def part(content: dict[str, Any], of_flow: bool) -> dict[str, Any]:
    """What there is of the arms of flow matching, without FLOW in their names, or of the others."""
    rows = [row for row in content["rows"] if row["arm"].startswith(FLOW) == of_flow]
    if not of_flow:
        return content | {"rows": rows}
    named = [row | {"arm": row["arm"].removeprefix(FLOW)} for row in rows]
    return content | {"rows": named, "best": content.get("flow_best", {})}


def points_tables(rows: list[Row], title: str) -> list[str]:
    """Every table of the reported rows, by number of sampling steps."""
    parts = []
    for steps in sorted({row["sampling_steps"] for row in rows if row["reported"]}, reverse=True):
        parts += [f"## {title}{steps} sampling steps", ratios_table(rows, steps), seeds_table(rows, steps)]
        pairs = [(arm, "baseline") for arm in arms_of(rows) if arm != "baseline"]
        pairs += [("lpl-budget", "lpl-default"), ("lpl-budget", "lpl-default-same-cost")]
        parts += [guidance_table(rows, steps, *pair) for pair in pairs if all(reported(rows, a, steps) for a in pair)]
        parts += [arms_table(rows, steps)]
    return parts


def summary(content: dict[str, Any]) -> str:
    """All of it."""
    main, flow = part(content, False), part(content, True)
    parts = ["## Verdict", verdict(main), *points_tables(main["rows"], "")]
    parts += ["## Pretraining", pretraining_table(main), "## Search", search_table(main)]
    if flow["rows"]:
        parts += points_tables(flow["rows"], "Flow matching, ")
        parts += ["## Flow matching, pretraining", pretraining_table(flow)]
        parts += ["## Flow matching, search", search_table(flow)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(summary(json.loads((Path(sys.argv[1]) if len(sys.argv) > 1 else FILE).read_text(encoding="utf-8"))))
