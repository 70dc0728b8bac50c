"""From paired metrics to verdicts, at equal steps and at equal training time, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from lpl.base.terminal import columns, with_names
from lpl.comparison.measures import RunMetrics
from lpl.evaluation.guidance import DIFFERENCES, kind_of
from lpl.evaluation.intervals import bootstrap_interval, noise_floor, root_mean_square, t_interval
from lpl.report.findings import ABSCISSAE, NOISE, best_scales, chance_line
from lpl.report.runs import Curve, interpolate

NO_DIFFERENCE = "no measurable difference"
HIGHER_IS_BETTER = {"precision", "recall", "density", "coverage", "clip_score"}
CLOSE = 0.1
"""Largest distance between two validations, as a share of the run's steps, for a value between them."""
TOO_RARELY = f"validated too rarely (more than {100 * CLOSE:g} % of the run apart; lower --validation_steps)"


class Pair(NamedTuple):
    """A metric of one seed."""

    baseline: float
    arm: float


class Noise(NamedTuple):
    """How much a metric changes although nothing should change it."""

    value: float
    source: str
    """"repeat": the root mean square of the paired differences of arms that repeat the baseline. "seeds": of the
    differences between baseline runs of two seeds."""


MetricKey = tuple[str, str]
"""Metric and abscissa."""
Redefined = Mapping[str, Sequence[str]]
"""Arm.redefined."""


def compare_arm(
    arm: str,
    runs: Sequence[RunMetrics],
    baseline: Sequence[RunMetrics],
    repeats: bool = False,
    redefined: Redefined | None = None,
    repeated: Mapping[MetricKey, Noise] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every metric of an arm against the baseline, paired by seed.

    Args:
        arm: its name.
        runs, baseline: finished runs.
        repeats: the arm has the options of the baseline.
        redefined: of the arm: metrics that are not compared, as they have another definition than the baseline's.
        repeated: of repeated_noise; where a metric is not in it, the noise is that between the baseline's seeds.

    Returns:
        Entries of compare.json's "paired", and lines on what could not be compared.
    """
    found, refused = paired_metrics(arm, runs, baseline, redefined)
    known = repeated or {}
    entries = [
        entry(arm, name, abscissa, pairs, known.get((name, abscissa)) or noise_of(name, baseline), repeats)
        for (name, abscissa), pairs in found.items()
    ]
    return entries, refused


def paired_metrics(
    arm: str, runs: Sequence[RunMetrics], baseline: Sequence[RunMetrics], redefined: Redefined | None = None
) -> tuple[dict[MetricKey, list[Pair]], list[str]]:
    """The metrics that can be compared, by metric and abscissa, and lines on the others; arguments of compare_arm."""
    partners = {run.seed: run for run in baseline}
    both = [(partners[run.seed], run) for run in runs if run.seed in partners]
    if not both:
        return {}, [f"{arm}: no seed is finished in it and in the baseline"]
    found: dict[MetricKey, list[Pair]] = {}
    refused: list[tuple[str, str]] = []
    for name in dict.fromkeys(name for base, run in both for name in (*base.metrics, *run.metrics)):
        known = [pair for pair in both if all(name in run.metrics for run in pair)]
        changed = (redefined or {}).get(kind_of(name))
        if len(known) < len(both):
            lacking = [pair for pair in both if pair not in known]
            where = _where(arm, [any(name not in pair[place].metrics for pair in lacking) for place in (0, 1)])
            seeds = f", seed {', '.join(str(base.seed) for base, _ in lacking)}" if known else ""
            refused.append((name, f"not measured in {where}{seeds}"))
        if not known:
            continue
        if changed:
            refused.append((name, f"another yardstick than the baseline's: --{', --'.join(changed)}"))
            continue
        for abscissa, pairs in (("steps", at_equal_steps(name, known)), ("seconds", at_equal_time(name, known))):
            if not isinstance(pairs, str):
                wild = [not all(map(math.isfinite, values)) for values in zip(*pairs, strict=True)]
                if not any(wild):
                    found[name, abscissa] = pairs
                    continue
                pairs = f"not finite in {_where(arm, wild)}"
            refused.append((name, f"not compared {ABSCISSAE[abscissa]}: {pairs}"))
    return found, [f"{arm}: {line}" for line in with_names(refused)]


def _where(arm: str, concerned: Sequence[bool]) -> str:
    """Which of the baseline and the arm are concerned, in words."""
    return " and ".join(who for who, is_it in zip(("the baseline", arm), concerned, strict=True) if is_it)


def repeated_noise(
    repeats: Mapping[str, tuple[Sequence[RunMetrics], Redefined]], baseline: Sequence[RunMetrics]
) -> dict[MetricKey, Noise]:
    """How much metrics change although no option is changed: the root mean square of all paired differences.

    Args:
        repeats: finished runs and redefined metrics of the arms that have the options of the baseline, by name.
        baseline: finished runs.
    """
    differences: dict[MetricKey, list[float]] = {}
    for name, (runs, redefined) in repeats.items():
        for key, pairs in paired_metrics(name, runs, baseline, redefined)[0].items():
            differences.setdefault(key, []).extend(pair.arm - pair.baseline for pair in pairs)
    found = {key: root_mean_square(values) for key, values in differences.items()}
    return {key: Noise(value, "repeat") for key, value in found.items() if value is not None}


def at_equal_steps(name: str, both: Sequence[tuple[RunMetrics, RunMetrics]]) -> list[Pair] | str:
    """The metric after as many steps as all runs have, or why there is none.

    For a run that was not validated there, it is interpolated between two validations that are CLOSE.
    """
    curved = all(name in run.curves for pair in both for run in pair)
    if not curved:
        if len({run.steps for pair in both for run in pair}) > 1:
            return "measured at the ends of runs of different length"
        return [Pair(base.metrics[name], run.metrics[name]) for base, run in both]
    step = min(run.curves[name][-1][0] for pair in both for run in pair)
    found = [tuple(_near(one.curves[name], one.curves[name], step) for one in pair) for pair in both]
    return _whole(found, f"{TOO_RARELY} around step {step:g}")


def at_equal_time(name: str, both: Sequence[tuple[RunMetrics, RunMetrics]]) -> list[Pair] | str:
    """The metric after as many seconds of training as both runs of a pair took, or why there is none.

    For the slower run it is interpolated between two validations, if they are CLOSE: a straight line lies above a loss
    that falls ever more slowly, which would make this run look worse than it is.
    """
    if not all(name in run.curves for pair in both for run in pair):
        return "measured at the end only"
    found = []
    for base, run in both:
        timed = [over_seconds(one.curves[name], one.clock) for one in (base, run)]
        if not all(timed):
            return "the time of its steps is not known"
        until = min(curve[-1][0] for curve in timed)
        found.append(tuple(_near(own, one.curves[name], until) for own, one in zip(timed, (base, run), strict=True)))
    return _whole(found, TOO_RARELY)


def _near(placed: Curve, curve: Curve, place: float) -> float | None:
    """The value of `placed` at a place of its abscissa, where it was measured or the validations around it are CLOSE.

    How far apart these are counts in steps: `curve` is the same over steps, point by point.
    """
    value = interpolate(placed, place)
    if value is None or any(x == place for x, _ in placed):
        return value
    after = sum(x < place for x, _ in placed)
    return value if curve[after][0] - curve[after - 1][0] <= CLOSE * curve[-1][0] else None


def _whole(found: Sequence[tuple[float | None, ...]], otherwise: str) -> list[Pair] | str:
    pairs = [Pair(base, arm) for base, arm in found if base is not None and arm is not None]
    return pairs if len(pairs) == len(found) else otherwise


def over_seconds(curve: Curve, clock: Curve) -> Curve:
    """A curve over steps as one over seconds of training; steps beyond the clock are left out."""
    timed = [(interpolate(clock, step), value) for step, value in curve]
    return [(seconds, value) for seconds, value in timed if seconds is not None]


def noise_of(name: str, baseline: Sequence[RunMetrics]) -> Noise | None:
    """How much baseline runs of different seeds differ at their ends, in pairs.

    The value before the first step is subtracted: the model is the same there, and only validation's own draws, which
    depend on the seed, differ.
    """
    known = [run for run in baseline if name in run.metrics and math.isfinite(run.metrics[name])]
    starts = [run.curves[name][0] if name in run.curves else (1.0, 0.0) for run in known]
    taken_off = [start if all(step == 0 for step, _ in starts) else 0.0 for _, start in starts]
    value = noise_floor([run.metrics[name] - start for run, start in zip(known, taken_off, strict=True)])
    return Noise(value, "seeds") if value is not None and math.isfinite(value) else None


def entry(
    arm: str, metric: str, abscissa: str, pairs: Sequence[Pair], noise: Noise | None, repeats: bool = False
) -> dict[str, Any]:
    """One row of compare.json's "paired": the mean difference, its intervals, and a verdict."""
    differences = [pair.arm - pair.baseline for pair in pairs]
    base, value, difference = fmean([p.baseline for p in pairs]), fmean([p.arm for p in pairs]), fmean(differences)
    interval, lower = t_interval(differences), metric not in HIGHER_IS_BETTER
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
        "noise": None if noise is None else noise.value,
        "noise_from": None if noise is None else noise.source,
        "lower_is_better": lower,
        "outcome": outcome,
        "verdict": words(difference, base, interval, noise, outcome, repeats, len(pairs)),
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
    noise: Noise | None,
    outcome: str,
    repeats: bool,
    seeds: int,
) -> str:
    """The verdict in words."""
    if outcome == "unknown":
        why = "one seed" if seeds == 1 else f"the same difference in all {seeds} seeds ({_sized(difference, baseline)})"
        return f"{why}: no interval, so no verdict"
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
    if noise is not None and abs(difference) < noise.value:
        return f"{told}; less than {NOISE[noise.source].cause} changes"
    return told


AT = {"steps": "equal steps", "seconds": "equal time"}


def result_table(content: dict[str, Any]) -> str:
    """Every metric by arm, of a compare.json, as text: differences to the baseline, intervals, noise and verdicts."""
    lines = []
    for arm in content["arms"]:
        runs = arm["runs"]
        what = ", ".join(f"{name} {value}" for name, value in arm["overrides"].items()) or "as given"
        told = " (baseline)" if arm["baseline"] else ""
        timed = f"{sum(run['seconds'] for run in runs) / len(runs):.1f} s of training each" if runs else "none finished"
        lines.append(f"{arm['name']}{told}: {what}; {len(runs)} runs, {timed}")
    for arm in content["arms"]:
        own = [entry for entry in content["paired"] if entry["arm"] == arm["name"]]
        if own:
            paired = "paired by seed" if arm["unpaired"] is None else f"not paired ({arm['unpaired']})"
            lines += ["", f"{arm['name']} against the baseline, {paired}:"]
            header = ["metric", "at", "baseline", "difference", "95 % (t)", "95 % (bootstrap)", "noise", "verdict"]
            lines += [f"  {line}" for line in columns([header, *map(_paired_row, own)])]
    for arm in content["arms"]:
        own = [entry for entry in content["at_best"] if entry["arm"] == arm["name"]]
        if own:
            several = any(len(entry["scales"]) > 1 for entry in own)
            chosen = "other seeds" if own[0]["chosen_on"] == "other seeds" else "only seed itself"
            how = f", each at its own best guidance, chosen on the {chosen}" if several else ""
            lines += ["", f"samples of {arm['name']} against the baseline's{how}:"]
            header = ["steps", "guidance", "Fréchet, ratio", "95 % (t)", "precision", "recall", "high-band error"]
            lines += [f"  {line}" for line in columns([header, *map(_best_row, own)])]
    for title, told_lines in (("to be known:", content["notes"]), ("left out:", content["refused"])):
        if told_lines:
            lines += ["", title, *(f"  {line}" for line in told_lines)]
    if by_chance := chance_line(content["paired"]):
        lines += ["", by_chance]
    return "\n".join(lines)


def _paired_row(entry: dict[str, Any]) -> list[str]:
    noise = "-" if entry["noise"] is None else f"{entry['noise']:.3g} {NOISE[entry['noise_from']].in_table}"
    ends = [_ends(entry[kind], "+.3g") for kind in ("interval", "bootstrap")]
    first = [entry["metric"], AT[entry["abscissa"]], f"{entry['baseline']:.5g}", f"{entry['difference']:+.3g}"]
    return [*first, *ends, noise, entry["verdict"]]


def _best_row(entry: dict[str, Any]) -> list[str]:
    frechet = entry.get("frechet")
    ratio = ["-", "-"] if frechet is None else [f"{frechet['ratio']:.3f}", _ends(frechet["interval"], ".3f")]
    others = [f"{entry[name]['difference']:+.3g}" if name in entry else "-" for name in DIFFERENCES]
    return [str(entry["sampling_steps"]), best_scales(entry), *ratio, *others]


def _ends(interval: Sequence[float] | None, form: str) -> str:
    return "-" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"
