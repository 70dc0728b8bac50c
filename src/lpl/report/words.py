"""What the page says in words and tables: figures at the top, configuration, versions and checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lpl.config import TrainConfig
from lpl.report.curves import NAMES, final_kind, rows_of
from lpl.report.findings import signed
from lpl.report.plots import Table
from lpl.report.run_folder import training_clock
from lpl.report.scales import short
from lpl.report.sources import Group, Inputs

PLACES = {"output_dir", "logging_dir", "seed", "latent_cache_dir"}
"""Options that name places or draws: no difference worth a row."""


FINITE = {True: "finite", False: "NOT FINITE", None: "not on this device"}


class Tile(NamedTuple):
    """A figure at the top of the page."""

    label: str
    value: str
    detail: str
    tone: str = ""
    """"good", "bad" or nothing."""


def title(inputs: Inputs) -> str:
    """What the page is about."""
    if len(inputs.comparisons) > 1:
        return "Comparisons: " + " · ".join(result.file.parent.resolve().name for result in inputs.comparisons)
    if inputs.comparisons:
        arms = inputs.comparisons[0].content.get("arms", [])
        seeds = max((len(arm.get("runs", [])) for arm in arms), default=0)
        return f"Comparison of {len(arms)} arms over {seeds} {'seed' if seeds == 1 else 'seeds'}"
    groups = [group for group in inputs.groups if not group.further]
    if len(groups) == 1 and groups[0].folder is not None:
        return "/".join(groups[0].folder.resolve().parts[-2:])
    names = [group.name for group in groups] or [
        "/".join(check.file.parent.resolve().parts[-2:]) for check in inputs.checks
    ]
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

    default = {name: written(defaults.get(name, "–")) for name in names}
    changed = [name for name in names if any(written(run.options.get(name)) != default[name] for _, run in shown)]
    if len(shown) == 1:
        found = {"Set by the user": Table(["Option", "Value", "Default"], [[*row(n), default[n]] for n in changed])}
    else:
        same = [[*row(name)[:2], default[name]] for name in changed if not differs(name)]
        different = [[*row(name), default[name]] for name in names if name not in PLACES and differs(name)]
        found = {
            "What differs": Table([*header, "Default"], different),
            "Set alike in all": Table(["Option", "Value", "Default"], same),
        }
    return found | {"All options": Table(header, [row(name) for name in names])}


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
        for result in group.evals[:1]:
            found[f"eval of {group.name}"] = result.content.get("environment", {})
    for result in (*inputs.comparisons, *inputs.checks):
        found[f"{result.content['kind']} in {result.file.parent.name}"] = result.content.get("environment", {})
    columns: dict[str, dict[str, Any]] = {}
    for name, environment in found.items():
        same = [old for old, known in columns.items() if all(known.get(k, v) == v for k, v in environment.items())]
        if same:
            columns[same[0]] = environment | columns[same[0]]
        else:
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
                FINITE[f["finite"]],
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
