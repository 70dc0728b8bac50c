"""`lpl report`: puts the page together and writes it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lpl import __version__
from lpl.base.errors import UserError
from lpl.base.files import write_atomically, writing
from lpl.base.terminal import printable
from lpl.config import TrainConfig
from lpl.config.commands import ReportConfig
from lpl.perceptual.defaults import WALK_TOLERANCE
from lpl.report.charts import Table
from lpl.report.curves import LOSSES, final_kind, loss_charts, share_charts, validation_rows
from lpl.report.evaluations import (
    evaluation_table,
    metric_charts,
    point_charts,
    point_tables,
    refused_metrics,
    spectrum_charts,
)
from lpl.report.export import check_export, export
from lpl.report.findings import (
    ABSCISSAE,
    NOISE,
    TONES,
    chance_line,
    check_charts,
    metric_name,
    paired_charts,
    shown_entries,
    verdicts,
)
from lpl.report.numbers import short, signed
from lpl.report.pictures import build_gallery
from lpl.report.runs import training_clock
from lpl.report.sources import Group, Inputs, Result, read_inputs

GENERATOR, HEAD = b'<meta name="generator" content="lpl ', 4096
"""The mark that identifies a page, and within how many bytes it must be."""
TEXT_SHARE = 0.2
"""Part of the page's size that is kept for text and plots."""
PLACES = {"output_dir", "logging_dir", "seed", "latent_cache_dir"}
"""Options for paths or draws, whose differences are not shown."""
FINITE = {True: "finite", False: "NOT FINITE", None: "not on this device"}


def write_report(options: ReportConfig, announce: bool = True) -> Path:
    """Writes the page; returns its path.

    Args:
        options: the options of `lpl report`.
        announce: print the page's path.

    Raises:
        UserError: a folder without anything to report on, a file in the way, or a page that cannot be written.
    """
    path = options.page
    if path.is_symlink() or (path.exists() and not is_page(path)):
        raise UserError(f"--output {path}: what is there was not written by lpl report: move it away, or name another")
    folder = None if options.export is None else Path(options.export)
    if folder is not None:
        check_export(folder)
    inputs = read_inputs(options.runs)
    found = gather(inputs, options.most_bytes)
    page = encoded(as_html(found))
    with writing(f"--output {path}:", "; name another file"):
        write_atomically(path, page)
    if announce:
        print(f"the report is in {path} ({len(page) / 1e6:.1f} MB): open it in a browser")
    if folder is not None:
        number = export(inputs, found, folder)
        print(f"{number} files of figures (SVG, PDF), tables (CSV, LaTeX) and samples (PNG) are in {folder}")
    return path


def is_page(path: Path) -> bool:
    """Whether a file is a page of lpl report."""
    try:
        with open(path, "rb") as file:
            return GENERATOR in file.read(HEAD)
    except OSError:
        return False


def as_html(found: dict[str, Any], live: str | None = None) -> str:
    """The page.

    Args:
        found: the result of `gather`.
        live: for `lpl report --serve`, the state of the folders: the page polls it and reloads itself when it changes.
        None: no polling.
    """
    return _environment().get_template("page.html.j2").render(found, live=live)


def encoded(page: str) -> bytes:
    """The page's bytes; characters that cannot be encoded, as in odd file names, become escapes."""
    return page.encode("utf-8", "backslashreplace")


def gather(inputs: Inputs, most_bytes: int = 7_500_000) -> dict[str, Any]:
    """The content of the page, at most most_bytes as long as text and plots stay within their share."""
    groups = inputs.groups
    gallery = build_gallery(inputs, int(most_bytes * (1 - TEXT_SHARE)))
    shares = share_charts(groups)
    sections = [
        ("points", "Guidance and steps", point_charts(inputs)),
        ("losses", "Losses", loss_charts(groups)),
        ("share", "LPL at work", shares),
        ("spectrum", "Spectrum", spectrum_charts(groups)),
        ("metrics", "Metrics", metric_charts(groups)),
    ]
    finals = {run.final_weights for run in inputs.runs if run.final_weights}
    final = finals.pop() if len(finals) == 1 else None
    evaluations, tables = evaluation_table(groups), point_tables(inputs)
    kept = {"metrics": evaluations.rows, "points": tables}
    return {
        "title": title(inputs),
        "version": __version__,
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "tiles": tiles(inputs),
        "comparisons": [_comparison(result, inputs.arms(result), final) for result in inputs.comparisons],
        "gallery": gallery,
        "sections": [section for section in sections if section[2] or kept.get(section[0])],
        "point_tables": tables,
        "evaluations": evaluations,
        "checks": [_check(result) for result in inputs.checks],
        "overview": overview(inputs),
        "configuration": configuration(groups),
        "versions": versions(inputs),
        "skipped": [*inputs.skipped, *refused_metrics(groups), *gallery.notes],
    }


def _comparison(result: Result, arms: dict[str, Group], final: str | None) -> dict[str, Any]:
    content = result.content
    shown = shown_entries(content, final)
    unpaired = {arm["name"]: arm.get("unpaired") for arm in content.get("arms", [])}
    return {
        "name": result.file.parent.resolve().name,
        "sentences": [(TONES.get(v["outcome"], ""), v["sentence"]) for v in content.get("verdicts", [])],
        "verdicts": verdicts(content, shown, arms),
        "chance": chance_line(shown),
        "charts": paired_charts(shown, arms, unpaired),
        "paired": content.get("paired", []),
        "notes": content.get("notes", []),
    }


def _check(result: Result) -> dict[str, Any]:
    content = result.content
    rows = [
        [part, dtype, FINITE[f["finite"]], short(f.get("max_abs")), short(f.get("relative_error"))]
        for part, by_dtype in (content.get("components") or {}).items()
        for dtype, f in by_dtype.items()
    ]
    table = Table(["Component", "Precision", "Values", "Largest", "Error against float32"], rows)
    return {"name": result.file.parent.name, "content": content, "table": table, "charts": check_charts(result)}


def _environment() -> Environment:
    loader = PackageLoader("lpl.report", "template")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"short": short, "signed": signed, "metric_name": metric_name, "svg": Markup}
    environment.globals |= {
        "walk_tolerance": WALK_TOLERANCE,
        "style": Markup(loader.get_source(environment, "style.css")[0]),
        "script": Markup(loader.get_source(environment, "page.js")[0]),
        "live_script": Markup(loader.get_source(environment, "live.js")[0]),
        "abscissae": ABSCISSAE,
        "noises": {source: words.in_table for source, words in NOISE.items()},
    }
    return environment


def _shown(value: Any) -> Any:
    """Users' text without characters that change the direction of the text around it; markup as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


class Tile(NamedTuple):
    """A number at the top of the page."""

    label: str
    value: str
    detail: str
    tone: str = ""
    """"good", "bad" or nothing."""


def title(inputs: Inputs) -> str:
    """The page's title."""
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
    """Key numbers of a single run; none for several, whose verdicts and charts show them."""
    runs = inputs.runs
    if len(runs) != 1:
        return []
    run = runs[0]
    clock = training_clock(run)
    total = run.options.get("max_train_steps")
    state = "finished" if run.finished_step is not None else f"not finished{f', of {total}' if total else ''}"
    timed = f"{state}, {duration(clock[-1][1])} of training" if len(clock) > 1 else state
    found = [Tile("Optimizer steps", f"{run.last_step:,}", timed)]
    rows = validation_rows(run, final_kind(run))
    for name, told in LOSSES.items():
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
    """Tables of options: those that differ between runs, those that are not the default, and all."""
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
    """The versions of packages of every run and result; equal columns are shown once."""
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
