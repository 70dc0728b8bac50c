"""One plain sentence on each arm: helps, harms, no measurable difference, or too little to tell.

It goes by the samples where they were measured: the Fréchet distance's ratio to the baseline's, each arm at its own
best guidance, at each number of sampling steps. Without samples it goes by validation's diffusion loss at equal steps.
For an arm that changes an option of LPL, this shows neither help nor harm: the loss may rise a little with LPL while
samples get better.

An arm whose ratio has a 95 % interval without 1 helps or harms. If the interval contains 1, and nothing further from it
than the metric's `matters`, there is no measurable difference; if it is wider, it is too little to tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from statistics import fmean
from typing import Any, NamedTuple

from lpl.config import LPLConfig
from lpl.config.points import plain
from lpl.evaluation.intervals import LEVEL, deviation, t_interval, t_quantile

SAMPLES_MATTER, LOSS_MATTERS = 0.05, 0.01
"""The least change of the Fréchet distance, and of a loss, that a user would act on."""
POWER = 0.8
MOST_SEEDS = 1000
"""Above this, no number of seeds is given."""
OUTCOMES = {
    "helps": "helps",
    "harms": "harms",
    "none": "makes no measurable difference",
    "unknown": "too little to tell",
}


class Change(NamedTuple):
    """A metric, lower being better, as a share of the baseline's."""

    value: float
    """-0.05: 5 % lower."""
    interval: tuple[float, float] | None
    spread: float | None
    """Standard deviation over seeds, of the same unit; None: one seed."""
    seeds: int
    matters: float

    @property
    def outcome(self) -> str:
        """One of OUTCOMES."""
        if self.interval is None:
            return "unknown"
        low, high = self.interval
        if low <= 0 <= high:
            return "none" if max(-low, high) <= self.matters else "unknown"
        return "helps" if self.value < 0 else "harms"


def seeds_needed(spread: float, difference: float, power: float = POWER, level: float = LEVEL) -> int | None:
    """Seeds with which a paired difference would be found: the least n, 2 at least, for which

        (t_{(1 + level) / 2, n - 1} + t_{power, n - 1}) · spread / sqrt(n) <= |difference|

    Assumes that differences of further seeds are normally distributed around this difference, with the spread that was
    measured. From few seeds the spread is itself uncertain (of two, easily by a factor of three), and so is n. Close to
    the exact number of the noncentral t distribution, which it exceeds by one at most for n above 4.

    Args:
        spread: standard deviation of the paired differences, over seeds.
        difference: the one that is to be found.
        power: the chance of finding it, above 0.5.
        level: of the interval that is to leave 0 out.

    Returns:
        None: more than MOST_SEEDS, or the difference is 0.
    """

    def enough(n: int) -> bool:
        quantiles = t_quantile(level, n - 1) + t_quantile(2 * power - 1, n - 1)
        return quantiles * spread / math.sqrt(n) <= abs(difference)

    if not difference or not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def verdict_on(
    arm: Mapping[str, Any],
    baseline: Mapping[str, Any],
    best: Sequence[Mapping[str, Any]],
    paired: Sequence[Mapping[str, Any]],
    final: str | None,
    samples: int,
) -> dict[str, Any]:
    """The sentence on an arm.

    Args:
        arm, baseline: entries of compare.json's "arms".
        best: the arm's entries of "at_best".
        paired: the arm's entries of "paired".
        final: the weights whose validation counts, raw or ema.
        samples: of each point.

    Returns:
        arm, outcome ("helps", "harms", "mixed", "none", "unknown"), by ("samples", "validation", None) and sentence.
    """
    name, found = arm["name"], [entry for entry in best if "frechet" in entry]
    if found:
        outcome, text = _by_samples(arm, found, samples)
        return {"arm": name, "outcome": outcome, "by": "samples", "sentence": f"{name}{text}."}
    loss = f"validation/{final}/diffusion_loss"
    entry = next((e for e in paired if e["metric"] == loss and e["abscissa"] == "steps" and e["baseline"]), None)
    if entry is None:
        text = f"{name}: {OUTCOMES['unknown']}: nothing was measured in it and in the baseline that can be compared."
        return {"arm": name, "outcome": "unknown", "by": None, "sentence": text}
    changed = {f.name for f in fields(LPLConfig)} & (arm["overrides"].keys() | baseline["overrides"].keys())
    outcome, text = _by_validation(arm, entry, bool(changed))
    return {"arm": name, "outcome": outcome, "by": "validation", "sentence": f"{name}{text}."}


def change_of(entry: Mapping[str, Any]) -> Change:
    """The change of the Fréchet distance in an entry of "at_best"; spread is that of the ratio's logarithm."""
    told = entry["frechet"]
    logs = [math.log(ratio) for ratio in told["ratios"]]
    spread = deviation(logs) if len(logs) > 1 else None
    ends = None if told["interval"] is None else (told["interval"][0] - 1, told["interval"][1] - 1)
    return Change(told["ratio"] - 1, ends, spread, len(logs), SAMPLES_MATTER)


def _by_samples(arm: Mapping[str, Any], best: Sequence[Mapping[str, Any]], samples: int) -> tuple[str, str]:
    changes = [change_of(entry) for entry in best]
    if arm["repeats"]:
        parts = [
            f"{_sized(change)} at {entry['sampling_steps']} sampling steps"
            for entry, change in zip(best, changes, strict=True)
        ]
        told = f"a Fréchet distance {', '.join(parts)} is what chance alone does"
        return "none", f" has the baseline's options: {told}"
    clauses = []
    for place, (entry, change) in enumerate(zip(best, changes, strict=True)):
        what = "Fréchet distance " if place == 0 else ""
        at = f"at {entry['sampling_steps']} sampling steps"
        clauses.append(f"{_begin(change, place == 0)} {at}: {what}{_sized(change)}{_then(change, samples)}")
        recall = entry.get("recall", {})
        if change.outcome == "helps" and recall.get("interval") and recall["interval"][1] < 0:
            clauses[-1] += f", though recall is {-recall['difference']:.2g} lower"
    told = _guidance(best[0])
    outcomes = {change.outcome for change in changes}
    if {"helps", "harms"} <= outcomes:
        outcome = "mixed"
    else:
        outcome = next(one for one in ("helps", "harms", "unknown", "none") if one in outcomes)
    return outcome, f"{'; '.join(clauses)}{told}"


def _guidance(entry: Mapping[str, Any]) -> str:
    """At which guidance the arms are compared, and by what it was chosen."""
    if None in entry["scales"]:
        return ""
    if len(entry["scales"]) == 1:
        return f"; both at guidance {plain(entry['scales'][0])}"
    ours, base = (
        "/".join(plain(scale) for scale in sorted(set(entry[side]))) for side in ("guidance", "baseline_guidance")
    )
    chosen = "the other seeds" if entry["chosen_on"] == "other seeds" else "this one seed itself"
    scales = f"at {entry['sampling_steps']} steps {ours} against {base}"
    return f"; each at its own best guidance ({scales}), chosen on {chosen}"


def _by_validation(arm: Mapping[str, Any], entry: Mapping[str, Any], of_lpl: bool) -> tuple[str, str]:
    shares = [difference / entry["baseline"] for difference in entry["differences"]]
    spread = deviation(shares) if len(shares) > 1 else None
    change = Change(fmean(shares), t_interval(shares), spread, len(shares), LOSS_MATTERS)
    told = f"validation's diffusion loss {_sized(change)} at equal steps"
    if arm["repeats"]:
        return "none", f" has the baseline's options: a {told.replace(' loss', ' loss that is', 1)} is what chance does"
    if of_lpl:
        return "unknown", (
            f": {OUTCOMES['unknown']}: no samples were measured, and {told} is by itself neither help nor harm of "
            "LPL's; --reference_dir measures samples, in 3 seeds or more"
        )
    noise = entry.get("noise") if entry.get("noise_from") == "repeat" else None
    if change.outcome in ("helps", "harms") and noise is not None and abs(entry["difference"]) < noise:
        return "none", f" {OUTCOMES['none']}: {told}, which is less than a repeat of the baseline changes"
    return change.outcome, f"{_begin(change, True)}: {told}{_then(change, None)}"


def _begin(change: Change, first: bool) -> str:
    text = OUTCOMES[change.outcome]
    return f"{':' if first and change.outcome == 'unknown' else ''} {text}" if first else text


def _then(change: Change, samples: int | None) -> str:
    """How many seeds would show a difference, if these do not."""
    if change.outcome in ("helps", "harms") or change.value == 0 == change.spread:
        return ""
    if change.spread is None:
        return ", of one seed, which has no interval: 3 --seeds or more would tell"
    size = abs(change.value) if change.outcome == "none" else change.matters
    if change.interval is None:
        return f", the same in all {change.seeds} seeds, so that no interval is known: more seeds would tell"
    needed = seeds_needed(change.spread, size)
    number = f"more than {MOST_SEEDS}" if needed is None else f"about {max(needed, change.seeds + 1)}"
    of = "" if samples is None else f" of {samples} samples"
    return f", and it would take {number} seeds{of} to show a difference of {_percent(size)}"


def _percent(share: float) -> str:
    return f"{100 * abs(share):.2g} %" if abs(share) < 1 else f"{100 * abs(share):.0f} %"


def _way(share: float) -> str:
    return f"{_percent(share)} {'higher' if share > 0 else 'lower'}" if share else "equal"


def _sized(change: Change) -> str:
    """A change in per cent, with its interval."""
    if change.interval is None:
        return _way(change.value)
    low, high = change.interval
    if low == high == 0:
        return "equal to the last digit"
    same = low * high > 0
    near, far = sorted(change.interval, key=abs)
    told = f"{_percent(near)} to {_way(far)}" if same else f"{_way(low)} to {_way(high)}"
    return f"{_way(change.value)} (95 %: {told})"
