"""`lpl report`: puts the page together and writes it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lpl import __version__
from lpl.base.errors import UserError
from lpl.base.files import write_atomically
from lpl.base.terminal import printable
from lpl.config.commands import ReportConfig
from lpl.report.curves import loss_charts, share_charts
from lpl.report.evaluations import evaluation_table, metric_charts, refused_figures, spectrum_charts
from lpl.report.findings import NOISE, TONES, chance_line, paired_charts, shown_entries, verdicts
from lpl.report.pictures import build_gallery
from lpl.report.points import point_charts, point_tables
from lpl.report.sources import Group, Inputs, Result, read_inputs
from lpl.report.words import checks, configuration, overview, tiles, title, versions

GENERATOR, HEAD = b'<meta name="generator" content="lpl ', 4096
"""How a page says what it is, and within how many bytes."""
TEXT_SHARE = 0.2
"""Part of the page's size that is kept for text and plots."""


def write_report(options: ReportConfig, announce: bool = True) -> Path:
    """Writes the page; returns its path.

    Args:
        options: of `lpl report`.
        announce: print where it is.

    Raises:
        UserError: a folder without anything to report on, a file in the way, or a page that cannot be written.
    """
    check_page(options.page)
    inputs = read_inputs(options.runs)
    page = render(inputs, int(options.max_megabytes * 10**6)).encode("utf-8", "backslashreplace")
    try:
        write_atomically(options.page, page)
    except OSError as error:
        raise UserError(f"--output {options.page}: cannot be written ({error.strerror}); name another file") from error
    if announce:
        print(f"the report is in {options.page} ({len(page) / 1e6:.1f} MB): open it in a browser")
    return options.page


def check_page(path: Path) -> None:
    """Refuses to write a page over something else.

    Raises:
        UserError: what is there is no page of lpl report.
    """
    if path.is_symlink() or (path.exists() and not is_page(path)):
        raise UserError(f"--output {path}: what is there was not written by lpl report: move it away, or name another")


def is_page(path: Path) -> bool:
    """Whether a file is a page of lpl report."""
    try:
        with open(path, "rb") as file:
            return GENERATOR in file.read(HEAD)
    except OSError:
        return False


def render(inputs: Inputs, most_bytes: int = 7_500_000) -> str:
    """The page as HTML, of that many bytes at most as long as text and plots stay within their share."""
    groups = inputs.groups
    gallery = build_gallery(inputs, int(most_bytes * (1 - TEXT_SHARE)))
    shares = share_charts(groups)
    skipped = [*inputs.skipped, *refused_figures(groups), *gallery.notes]
    sections = [
        ("points", "Guidance and steps", point_charts(inputs)),
        ("losses", "Losses", loss_charts(groups)),
        ("share", "LPL at work", shares),
        ("spectrum", "Spectrum", spectrum_charts(groups)),
        ("metrics", "Metrics", metric_charts(groups)),
    ]
    finals = {run.final_weights for run in inputs.runs if run.final_weights}
    final = finals.pop() if len(finals) == 1 else None
    comparisons = [_comparison(result, inputs.arms(result), final) for result in inputs.comparisons]
    evaluations, tables = evaluation_table(groups), point_tables(inputs)
    kept = {"metrics": evaluations.rows, "points": tables}
    found = {
        "title": title(inputs),
        "version": __version__,
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "tiles": tiles(inputs),
        "comparisons": comparisons,
        "gallery": gallery,
        "sections": [section for section in sections if section[2] or kept.get(section[0])],
        "point_tables": tables,
        "evaluations": evaluations,
        "checks": checks(inputs),
        "overview": overview(inputs),
        "configuration": configuration(groups),
        "versions": versions(inputs),
        "skipped": skipped,
    }
    return _environment().get_template("page.html.j2").render(found)


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


def _shown(value: Any) -> Any:
    """Text of users without characters that turn the direction of what stands around it; markup as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _environment() -> Environment:
    from lpl.config.commands import WALK_TOLERANCE
    from lpl.report.findings import ABSCISSAE, metric_name, signed
    from lpl.report.scales import short

    environment = Environment(
        loader=PackageLoader("lpl.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loader = environment.loader
    assert loader is not None
    environment.filters |= {"short": short, "signed": signed, "metric_name": metric_name, "svg": Markup}
    environment.globals |= {
        "walk_tolerance": WALK_TOLERANCE,
        "style": Markup(loader.get_source(environment, "style.css")[0]),
        "script": Markup(loader.get_source(environment, "page.js")[0]),
        "abscissae": ABSCISSAE,
        "noises": NOISE,
    }
    return environment
