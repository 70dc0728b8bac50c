"""The table that `lpl compare` ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lpl.comparison.points import DIFFERENCES
from lpl.evaluation.points import plain

AT = {"steps": "equal steps", "seconds": "equal time"}
NOISE = {"repeat": "of the repeat", "seeds": "between seeds"}


def result_table(content: dict[str, Any]) -> str:
    """Every metric by arm as text: differences to the baseline, intervals, noise and verdicts.

    Args:
        content: of compare.json.
    """
    lines = []
    for arm in content["arms"]:
        runs = arm["runs"]
        what = ", ".join(f"{name} {value}" for name, value in arm["overrides"].items()) or "as given"
        told = " (baseline)" if arm["baseline"] else ""
        timed = f"{sum(run['seconds'] for run in runs) / len(runs):.1f} s of training each" if runs else "none finished"
        lines.append(f"{arm['name']}{told}: {what}; {len(runs)} runs, {timed}")
    unpaired = {arm["name"]: arm["unpaired"] for arm in content["arms"]}
    for arm_name in dict.fromkeys(entry["arm"] for entry in content["paired"]):
        paired = "paired by seed" if unpaired[arm_name] is None else f"not paired ({unpaired[arm_name]})"
        lines += ["", f"{arm_name} against the baseline, {paired}:"]
        header = ["metric", "at", "baseline", "difference", "95 % (t)", "95 % (bootstrap)", "noise", "verdict"]
        lines += _columns([header, *(_row(e) for e in content["paired"] if e["arm"] == arm_name)])
    for arm_name in dict.fromkeys(entry["arm"] for entry in content["at_best"]):
        own = [entry for entry in content["at_best"] if entry["arm"] == arm_name]
        several = any(len(entry["scales"]) > 1 for entry in own)
        chosen = f", each at its own best guidance, chosen on the {_chosen_on(own[0])}" if several else ""
        lines += ["", f"samples of {arm_name} against the baseline's{chosen}:"]
        header = ["steps", "guidance", "Fréchet, ratio", "95 % (t)", "precision", "recall", "high-band error"]
        lines += _columns([header, *map(_best_row, own)])
    if content["notes"]:
        lines += ["", "to be known:", *(f"  {line}" for line in content["notes"])]
    if content["refused"]:
        lines += ["", "left out:", *(f"  {line}" for line in content["refused"])]
    if by_chance := chance_line(content["paired"]):
        lines += ["", by_chance]
    return "\n".join(lines)


def chance_line(paired: Sequence[dict[str, Any]]) -> str:
    """How many verdicts would find a difference where there is none: one in 20, as intervals are of 95 %.

    Args:
        paired: of compare.json; nothing is said where none has a verdict.
    """
    compared = sum(entry.get("outcome", "unknown") != "unknown" for entry in paired)
    told = "1 verdict" if compared == 1 else f"{compared} verdicts"
    return f"of {told}, about {compared / 20:.3g} would find a difference by chance alone" if compared else ""


def _row(entry: dict[str, Any]) -> list[str]:
    ends = [
        "-" if interval is None else f"[{interval[0]:+.3g}, {interval[1]:+.3g}]"
        for interval in (entry["interval"], entry["bootstrap"])
    ]
    noise = "-" if entry["noise"] is None else f"{entry['noise']:.3g} {NOISE[entry['noise_from']]}"
    first = [entry["metric"], AT[entry["abscissa"]], f"{entry['baseline']:.5g}", f"{entry['difference']:+.3g}"]
    return [*first, *ends, noise, entry["verdict"]]


def _chosen_on(entry: dict[str, Any]) -> str:
    return "other seeds" if entry["chosen_on"] == "other seeds" else "only seed itself"


def _best_row(entry: dict[str, Any]) -> list[str]:
    frechet = entry.get("frechet")
    ends = None if frechet is None else frechet["interval"]
    shown = [
        "-" if frechet is None else f"{frechet['ratio']:.3f}",
        "-" if ends is None else f"[{ends[0]:.3f}, {ends[1]:.3f}]",
        *(f"{entry[name]['difference']:+.3g}" if name in entry else "-" for name in DIFFERENCES),
    ]
    return [str(entry["sampling_steps"]), best_scales(entry), *shown]


def best_scales(entry: dict[str, Any]) -> str:
    """The guidance of an entry of "at_best", of the baseline and of the arm."""
    sides = [sorted(set(entry[side]) - {None}) for side in ("baseline_guidance", "guidance")]
    return " → ".join("/".join(map(plain, side)) or "its own" for side in sides)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join(row).rstrip() for row in padded]
