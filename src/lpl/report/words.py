"""What the page says in words and tables: figures at the top, verdicts, configuration, versions and checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lpl.config import TrainConfig
from lpl.report.curves import NAMES, final_kind, rows_of
from lpl.report.findings import metric_name, signed
from lpl.report.run_folder import training_clock
from lpl.report.scales import short
from lpl.report.sources import Group, Inputs

PLACES = {"output_dir", "logging_dir", "seed", "latent_cache_dir"}
"""Options that name places or draws: no difference worth a row."""


class Tile(NamedTuple):
    """A figure at the top of the page."""

    label: str
    value: str
    detail: str
    tone: str = ""
    """"good", "bad" or nothing."""


class Table(NamedTuple):
    """A table of text."""

    header: list[str]
    rows: list[list[str]]


def title(inputs: Inputs) -> str:
    """What the page is about."""
    if inputs.comparisons:
        arms = inputs.comparisons[0].content.get("arms", [])
        seeds = max((len(arm.get("runs", [])) for arm in arms), default=0)
        return f"Comparison of {len(arms)} arms over {seeds} {'seed' if seeds == 1 else 'seeds'}"
    names = [group.name for group in inputs.groups] or [check.file.parent.name for check in inputs.checks]
    return names[0] if len(names) == 1 else f"{' · '.join(names[:4])}{' …' if len(names) > 4 else ''}"


def tiles(inputs: Inputs) -> list[Tile]:
    """Figures of a single run at a glance; nothing for more, whose verdicts or charts say it."""
    runs = inputs.runs
    if len(runs) != 1:
        return []
    run = runs[0]
    clock = training_clock(run)
    total = run.options.get("max_train_steps")
    state = "finished" if run.finished_step is not None else f"not finished{f', of {total}' if total else ''}"
    timed = f"{state}, {duration(clock[-1][1])} of training" if len(clock) > 1 else state
    found = [Tile("Optimizer steps", f"{run.last_step:,}", timed)]
    rows = rows_of(run, final_kind(run))
    for name, told in NAMES.items():
        known = [row[name] for row in rows if row.get(name) is not None]
        if len(known) > 1:
            change = 100 * (known[-1] / known[0] - 1)
            tone = "good" if change < -0.5 else "bad" if change > 0.5 else ""
            detail = f"{short(known[0])} → {short(known[-1])} on {rows[-1].get('samples', '?')} held-out images"
            found.append(Tile(f"{told}, validation", f"{signed(change)} %", detail, tone))
    shares = [value for _, value in run.scalars.get("lpl/gradient_share", [])]
    if shares and any(shares):
        half = shares[len(shares) // 2 :]
        found.append(
            Tile("LPL's share of the gradient", f"{short(100 * sum(half) / len(half))} %", "second half of the run")
        )
    return found


def verdicts(content: dict[str, Any], slots: dict[str, str]) -> list[dict[str, Any]]:
    """For each arm against the baseline and each abscissa: what is better, worse, or makes no measurable difference."""
    found = []
    paired = content.get("paired", [])
    for arm in content.get("arms", []):
        own = [entry for entry in paired if entry["arm"] == arm["name"]]
        if arm.get("baseline") or not own:
            continue
        overrides = ", ".join(f"{name} {value}" for name, value in arm.get("overrides", {}).items())
        found.append(
            {
                "arm": arm["name"],
                "slot": slots.get(arm["name"], "1"),
                "overrides": overrides or "no option changed: a repeat of the baseline",
                "headline": headline([entry for entry in own if entry["abscissa"] == "steps"] or own),
                "entries": own,
            }
        )
    return found


def headline(entries: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """(tone, words) for an arm, from its outcomes at equal steps."""
    better = [metric_name(e["metric"]) for e in entries if e.get("outcome") == "better"]
    worse = [metric_name(e["metric"]) for e in entries if e.get("outcome") == "worse"]
    open_ = [e for e in entries if e.get("outcome") == "unknown"]
    if open_ and len(open_) == len(entries):
        return "", "One seed: no interval, so no verdict"
    if not better and not worse:
        return "", "No measurable difference"
    parts = [f"better: {', '.join(better)}"] * bool(better) + [f"worse: {', '.join(worse)}"] * bool(worse)
    same = len(entries) - len(better) - len(worse) - len(open_)
    parts += [f"no measurable difference in {same} other {'figure' if same == 1 else 'figures'}"] * bool(same)
    text = "; ".join(parts)
    return ("mixed" if better and worse else "good" if better else "bad"), text[0].upper() + text[1:]


def overview(inputs: Inputs) -> Table:
    """The runs, a row each."""
    rows = []
    for group in inputs.groups:
        for run in group.runs:
            clock = training_clock(run)
            state = "finished" if run.finished_step is not None else "not finished"
            time = duration(clock[-1][1]) if len(clock) > 1 else "–"
            rows.append([group.name, str(run.options.get("seed")), f"{run.last_step:,}", time, state, str(run.path)])
    return Table(["Run", "Seed", "Steps", "Training time", "State", "Folder"], rows)


def duration(seconds: float) -> str:
    """Seconds for readers."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def configuration(groups: Sequence[Group]) -> dict[str, Table]:
    """The options: which differ between runs, which are no defaults, and all of them."""
    shown = [(group.name, group.runs[0]) for group in groups if group.runs]
    if not shown:
        return {}
    defaults = TrainConfig().flat()
    names = list(dict.fromkeys(name for _, run in shown for name in run.options))
    header = ["Option", *(name for name, _ in shown)]

    def row(name: str) -> list[str]:
        return [name, *(written(run.options.get(name, "–")) for _, run in shown)]

    def differs(name: str) -> bool:
        return len({written(run.options.get(name)) for _, run in shown}) > 1

    different = [row(name) for name in names if name not in PLACES and differs(name)]
    changed = [
        row(name)
        for name in names
        if any(written(run.options.get(name)) != written(defaults.get(name)) for _, run in shown)
    ]
    found = {}
    if len(shown) > 1:
        found["What differs"] = Table(header, different)
    found["Set by the user"] = Table([*header, "Default"], [[*r, written(defaults.get(r[0], "–"))] for r in changed])
    found["All options"] = Table(header, [row(name) for name in names])
    return found


def written(value: Any) -> str:
    """An option's value as it would be given."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def versions(inputs: Inputs) -> Table:
    """What every run and result stands on; columns that are equal are shown once."""
    found: dict[str, dict[str, Any]] = {}
    for group in inputs.groups:
        for run in group.runs[:1]:
            found[group.name] = run.environment
    for result in (*inputs.comparisons, *inputs.evals, *inputs.checks):
        found[f"{result.content['kind']}: {result.file.parent.name}"] = result.content.get("environment", {})
    columns: dict[str, dict[str, Any]] = {}
    for name, environment in found.items():
        same = next((old for old, known in columns.items() if known == environment), None)
        if same is None:
            columns[name] = environment
    names = list(dict.fromkeys(key for environment in columns.values() for key in environment))
    header = ["Package", "all"] if len(columns) == 1 else ["Package", *columns]
    return Table(header, [[key, *(written(e.get(key, "–")) for e in columns.values())] for key in names])


def checks(inputs: Inputs) -> list[dict[str, Any]]:
    """What lpl check found, ready for the template."""
    from lpl.report.findings import check_charts

    found = []
    for check in inputs.checks:
        content = check.content
        rows = [
            [
                part,
                dtype,
                "finite" if f["finite"] else "NOT FINITE",
                short(f.get("max_abs")),
                short(f.get("relative_error")),
            ]
            for part, by_dtype in (content.get("components") or {}).items()
            for dtype, f in by_dtype.items()
        ]
        table = Table(["Component", "Precision", "Values", "Largest", "Error against float32"], rows)
        found.append(
            {"name": check.file.parent.name, "content": content, "table": table, "charts": check_charts(check)}
        )
    return found
