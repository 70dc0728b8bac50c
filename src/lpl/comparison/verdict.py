"""From paired figures to a verdict: differences to the baseline at equal steps and at equal training time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lpl.comparison.measures import Measured, at, by_seconds, lower_is_better
from lpl.comparison.statistics import bootstrap_interval, mean, noise_floor, t_interval

NO_DIFFERENCE = "no measurable difference"


class Pair(NamedTuple):
    """A figure of one seed."""

    baseline: float
    arm: float


def compare_arm(
    arm: str, runs: Sequence[Measured], baseline: Sequence[Measured], repeats: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every metric of an arm against the baseline, paired by seed.

    Args:
        arm: its name.
        runs, baseline: finished runs.
        repeats: the arm has the options of the baseline.

    Returns:
        Entries of compare.json's "paired", and lines on what could not be compared.
    """
    partners = {run.seed: run for run in baseline}
    both = [(partners[run.seed], run) for run in runs if run.seed in partners]
    if not both:
        return [], [f"{arm}: no seed is finished in it and in the baseline"]
    entries: list[dict[str, Any]] = []
    refused: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for base, run in both for name in (*base.metrics, *run.metrics)):
        measured = [all(name in pair[place].metrics for pair in both) for place in (0, 1)]
        if not all(measured):
            where = " and ".join(
                who for who, is_there in zip(("the baseline", arm), measured, strict=True) if not is_there
            )
            refused.setdefault(f"not measured in {where}", []).append(name)
            continue
        for abscissa, pairs in (("steps", at_equal_steps(name, both)), ("seconds", at_equal_time(name, both))):
            if isinstance(pairs, str):
                told = "equal steps" if abscissa == "steps" else "equal training time"
                refused.setdefault(f"not compared at {told}: {pairs}", []).append(name)
            else:
                entries.append(entry(arm, name, abscissa, pairs, noise_of(name, baseline), repeats))
    return entries, [f"{arm}: {', '.join(names)}: {why}" for why, names in refused.items()]


def at_equal_steps(name: str, both: Sequence[tuple[Measured, Measured]]) -> list[Pair] | str:
    """The figure after as many steps as all runs have, or why there is none."""
    curved = all(name in run.curves for pair in both for run in pair)
    if not curved:
        if len({run.steps for pair in both for run in pair}) > 1:
            return "measured at the ends of runs of different length"
        return [Pair(base.metrics[name], run.metrics[name]) for base, run in both]
    step = min(run.curves[name][-1][0] for pair in both for run in pair)
    found = [(at(base.curves[name], step), at(run.curves[name], step)) for base, run in both]
    return _whole(found, f"no value at step {step:g}")


def at_equal_time(name: str, both: Sequence[tuple[Measured, Measured]]) -> list[Pair] | str:
    """The figure after as many seconds of training as both runs of a pair took, or why there is none."""
    if not all(name in run.curves for pair in both for run in pair):
        return "measured at the end only"
    found = []
    for base, run in both:
        timed = [by_seconds(one.curves[name], one.clock) for one in (base, run)]
        if not all(timed):
            return "the time of its steps is not known"
        until = min(curve[-1][0] for curve in timed)
        found.append((at(timed[0], until), at(timed[1], until)))
    return _whole(found, "validated too rarely")


def _whole(found: Sequence[tuple[float | None, float | None]], otherwise: str) -> list[Pair] | str:
    pairs = [Pair(base, arm) for base, arm in found if base is not None and arm is not None]
    return pairs if len(pairs) == len(found) else otherwise


def noise_of(name: str, baseline: Sequence[Measured]) -> float | None:
    """How much baseline runs of different seeds differ at their ends, in pairs.

    What is validated before the first step is taken off, as the model is the same there: validation's own draws go with
    the seed too.
    """
    known = [run for run in baseline if name in run.metrics]
    starts = [run.curves[name][0] if name in run.curves else (1.0, 0.0) for run in known]
    if all(step == 0 for step, _ in starts):
        return noise_floor([run.metrics[name] - start for run, (_, start) in zip(known, starts, strict=True)])
    return noise_floor([run.metrics[name] for run in known])


def entry(
    arm: str, metric: str, abscissa: str, pairs: Sequence[Pair], noise: float | None, repeats: bool = False
) -> dict[str, Any]:
    """One row of compare.json's "paired": the mean difference, what it is sure of, and a verdict."""
    differences = [pair.arm - pair.baseline for pair in pairs]
    base, value, difference = mean([p.baseline for p in pairs]), mean([p.arm for p in pairs]), mean(differences)
    interval, lower = t_interval(differences), lower_is_better(metric)
    outcome = judge(difference, interval, lower)
    return {
        "arm": arm,
        "metric": metric,
        "abscissa": abscissa,
        "seeds": len(pairs),
        "baseline": base,
        "value": value,
        "difference": difference,
        "differences": differences,
        "interval": interval,
        "bootstrap": bootstrap_interval(differences),
        "noise": noise,
        "lower_is_better": lower,
        "outcome": outcome,
        "verdict": words(difference, base, interval, noise, outcome, repeats),
    }


def judge(difference: float, interval: tuple[float, float] | None, lower: bool) -> str:
    """better, worse, none (the interval holds 0) or unknown (no interval)."""
    if interval is None:
        return "unknown"
    if interval[0] <= 0 <= interval[1]:
        return "none"
    return "better" if (difference < 0) == lower else "worse"


def _sized(difference: float, baseline: float) -> str:
    """In per cent of the baseline, with its sign."""
    if not baseline:
        return f"{difference:+.3g}"
    share = 100 * difference / abs(baseline)
    return f"{share:+.0f} %" if abs(share) >= 100 else f"{share:+.2g} %"


def words(
    difference: float,
    baseline: float,
    interval: tuple[float, float] | None,
    noise: float | None,
    outcome: str,
    repeats: bool,
) -> str:
    """The verdict in words."""
    if outcome == "unknown":
        return "one seed: no interval, so no verdict"
    assert interval is not None
    if difference == 0 and interval == (0.0, 0.0):
        return f"{NO_DIFFERENCE}: equal to the last digit"
    size = _sized(difference, baseline)
    if outcome == "none":
        beyond = _sized(max(interval, key=abs), baseline).lstrip("+-")
        return f"{NO_DIFFERENCE} ({size}; beyond {beyond} ruled out)"
    told = f"{outcome} by {size.lstrip('+-')}"
    if repeats:
        return f"{told}, though the options are the baseline's: rounding alone does that here"
    if noise is not None and abs(difference) < noise:
        return f"{told}; less than another seed changes"
    return told
