"""The verdict's cards: what arms of a comparison change at equal steps and in equal time, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lpl.report.findings import ABSCISSAE, NOISE_FROM, metric_name, signed
from lpl.report.sources import Group

OUTCOMES = ("better", "worse", "below", "none", "unknown")
"""Of a figure; "below": a difference smaller than the noise."""

TONES = {"helps": "good", "harms": "bad", "mixed": "mixed"}
"""How an arm is coloured, by the outcome of its sentence."""


def shown_entries(content: dict[str, Any], final: str | None) -> list[dict[str, Any]]:
    """The paired figures that the page draws: of validation, those of the weights that the results are made of.

    Args:
        content: of compare.json.
        final: "raw" or "ema"; None: not known, all are shown.
    """
    paired: list[dict[str, Any]] = content.get("paired", [])
    kept = [e for e in paired if not e["metric"].startswith("validation/") or e["metric"].split("/")[1] == final]
    return paired if final is None else kept


def verdicts(
    content: dict[str, Any], paired: Sequence[dict[str, Any]], arms: Mapping[str, Group]
) -> list[dict[str, Any]]:
    """For each arm against the baseline: a headline, the figures behind it and the options.

    Args:
        content: of compare.json.
        paired: its figures that count.
        arms: by their names in compare.json.
    """
    found, told = [], {entry["arm"]: entry["outcome"] for entry in content.get("verdicts", [])}
    for arm in content.get("arms", []):
        own = [entry for entry in paired if entry["arm"] == arm["name"]]
        if arm.get("baseline") or not own:
            continue
        repeats = bool(arm.get("repeats"))
        overrides = ", ".join(f"{name} {value}" for name, value in arm.get("overrides", {}).items())
        group = arms[arm["name"]]
        headlines, details = [], []
        for abscissa, at in ABSCISSAE.items():
            entries = [entry for entry in own if entry["abscissa"] == abscissa]
            if entries:
                alone = all(entry["metric"].startswith("validation/") for entry in entries)
                where = f"Validation {at}" if alone else f"{at[0].upper()}{at[1:]}"
                headlines.append(f"{where}: {headline(entries, repeats)}")
                details += _details(entries, at, repeats)
        found.append(
            {
                "arm": group.name,
                "slot": group.slot,
                "unpaired": arm.get("unpaired"),
                "overrides": "nothing is changed: a repeat of the baseline" if repeats else overrides,
                "tone": "" if repeats else TONES.get(told[arm["name"]], "") if arm["name"] in told else tone(own),
                "headlines": headlines,
                "details": details,
            }
        )
    return found


def outcome_of(entry: dict[str, Any]) -> str:
    """One of OUTCOMES."""
    outcome, noise = str(entry.get("outcome")), entry.get("noise")
    within = noise is not None and abs(entry["difference"]) < noise
    return "below" if outcome in ("better", "worse") and within else outcome


def tone(entries: Sequence[dict[str, Any]]) -> str:
    """ "good", "bad", "mixed" or nothing, from all outcomes of an arm that are beyond the noise."""
    found = {outcome_of(entry) for entry in entries}
    if {"better", "worse"} <= found:
        return "mixed"
    return "good" if "better" in found else "bad" if "worse" in found else ""


def headline(entries: Sequence[dict[str, Any]], repeats: bool = False) -> str:
    """The outcomes of an arm's figures at one abscissa, counted.

    Args:
        entries: of compare.json's "paired".
        repeats: the arm has the options of the baseline.
    """
    outcomes = [outcome_of(entry) for entry in entries]
    number = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
    if number["unknown"] == len(entries):
        one = all(entry.get("seeds", 1) == 1 for entry in entries)
        return "one seed, so no interval and no verdict" if one else "no interval is known, so no verdict"
    if number["none"] == len(entries):
        return "no measurable difference"
    of = f"of {len(entries)} figure{'s' if len(entries) > 1 else ''}"
    if repeats:
        other = number["better"] + number["worse"] + number["below"]
        parts = [f"another in {other} {of}, by rounding alone"] if other else []
    else:
        parts = [f"{key} in {number[key]} {of}" for key in ("better", "worse") if number[key]]
        if number["below"]:
            parts.append(f"{number['below']} {of} differ{'s' * (number['below'] == 1)} by less than {_noise(entries)}")
    if number["none"]:
        parts.append(f"no measurable difference in {number['none']}")
    if number["unknown"]:
        parts.append(f"no verdict in {number['unknown']}")
    return ", ".join(parts)


def _noise(entries: Sequence[dict[str, Any]]) -> str:
    """What differences are below, in words."""
    sources = dict.fromkeys(e.get("noise_from") or "seeds" for e in entries if outcome_of(e) == "below")
    return " or ".join(NOISE_FROM[source] for source in sources)


def _details(entries: Sequence[dict[str, Any]], at: str, repeats: bool) -> list[str]:
    """The figures that differ, a line for each outcome."""
    told: dict[tuple[str, ...], str] = {("better",): "Better", ("worse",): "Worse", ("below",): "Within the noise"}
    if repeats:
        told = {("better", "worse", "below"): "Another"}
    return [f"{words} {at}: {text}" for outcomes, words in told.items() if (text := _listed(entries, outcomes))]


def _listed(entries: Sequence[dict[str, Any]], outcomes: Sequence[str]) -> str:
    told = []
    for e in entries:
        if outcome_of(e) in outcomes:
            size = 100 * e["difference"] / abs(e["baseline"]) if e.get("baseline") else None
            told.append(metric_name(e["metric"]) + ("" if size is None else f" {signed(size, 2)} %"))
    return "; ".join(told)
