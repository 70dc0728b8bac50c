"""`lpl report --export DIR`: every chart of the page as SVG and PDF, every table as CSV and LaTeX, pictures as PNG."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lpl import __version__
from lpl.base.errors import UserError, require
from lpl.base.files import alone_in, writing
from lpl.base.output_folder import Names, OutputFolder
from lpl.data.bad_files import BadImageError
from lpl.report.charts import Chart, LinePlot, Table
from lpl.report.findings import metric_name
from lpl.report.numbers import bracketed, short, signed
from lpl.report.pictures import check_pictures, gather_pictures
from lpl.report.sources import Inputs

INDEX = "export.json"
FOLDERS = ("figures", "tables", "samples")
STAGED = ".tmp-export"
LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "→": r"$\to$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "σ": r"$\sigma$",
}
PAIRED = ["Arm", "Figure", "Compared", "Baseline", "Difference", "95 % (t)", "95 % (bootstrap)", "Noise", "Verdict"]


def check_export(folder: Path) -> None:
    """Refuses, before anything is read, where matplotlib is missing or other files are in the way of the output.

    Raises:
        UserError: says what to do.
    """
    require(
        importlib.util.find_spec("matplotlib") is not None,
        "--export needs matplotlib: pip install 'latent-perceptual-loss[figures]'",
    )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--export {folder}: is a file; name a folder")
    _output(folder).check(Names({}, (*(f"{name}/" for name in FOLDERS), INDEX)))


def _output(folder: Path) -> OutputFolder:
    return OutputFolder(folder, "lpl report", flag="--export")


def export(inputs: Inputs, page: dict[str, Any], folder: Path) -> int:
    """Writes the files, replacing an earlier export; returns how many.

    figures/NAME.svg, .pdf and .csv (the numbers drawn, in full), tables/NAME.csv and .tex (booktabs),
    samples/ROW-PROMPT/COLUMN.png in full size, and export.json with titles, notes and versions of packages.

    Raises:
        UserError: the files cannot be written.
    """
    from lpl.report.figures import draw

    made: dict[str, bytes] = {}
    index: dict[str, Any] = {"lpl": __version__, "kind": "export", "figures": [], "tables": [], "samples": []}
    for chart in charts_of(page):
        name = _free(made, "figures", chart.title, ".csv")
        made |= {f"{name}.{kind}": content for kind, content in draw(chart).items()}
        made[f"{name}.csv"] = _csv(*_numbers_of(chart))
        index["figures"].append({"file": name, "title": chart.title, "note": chart.note})
    for caption, table, raw in tables_of(page):
        name = _free(made, "tables", caption, ".csv")
        made |= {f"{name}.csv": _csv(raw.header, raw.rows), f"{name}.tex": latex(table, caption).encode()}
        index["tables"].append({"file": name, "title": caption})
    index |= {"environment": _by_column(page["versions"]), "left_out": list(page["skipped"])}
    for name, told, content in _samples(inputs, made, index["left_out"]):
        made[name] = content
        index["samples"].append({"file": name} | told)
    made[INDEX] = json.dumps(index, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
    with writing(f"--export {folder}:", "; name another folder"), alone_in(folder, "--export"):
        staged = folder / STAGED
        shutil.rmtree(staged, ignore_errors=True)
        for name in FOLDERS:  # empty ones, too, so that they replace earlier ones
            (staged / name).mkdir(parents=True)
        for name, content in made.items():
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_bytes(content)
        _output(folder).put({name: staged / name for name in (*FOLDERS, INDEX)})
    return len(made)


def charts_of(page: dict[str, Any]) -> Iterator[Chart]:
    """Every chart, in the page's order."""
    for comparison in page["comparisons"]:
        yield from comparison["charts"]
    for _, _, charts in page["sections"]:
        yield from charts
    for check in page["checks"]:
        yield from check["charts"]


def tables_of(page: dict[str, Any]) -> Iterator[tuple[str, Table, Table]]:
    """Caption, the table for readers, and the same for programs: all rows, with full digits where known."""
    for comparison in page["comparisons"]:
        if paired := comparison["paired"]:
            names = list(dict.fromkeys(name for entry in paired for name in entry))
            raw = Table(names, [[_raw(entry.get(name)) for name in names] for entry in paired])
            yield f"Paired differences in {comparison['name']}", Table(PAIRED, [_paired(e) for e in paired]), raw
    found = [*page["point_tables"], ("Evaluations", page["evaluations"]), ("Runs", page["overview"])]
    found += [*page["configuration"].items(), ("Versions", page["versions"])]
    found += [(f"Components of {check['name']}", check["table"]) for check in page["checks"]]
    for caption, table in found:
        if table.rows:
            yield caption, table, Table(table.header, [[cell.replace("−", "-") for cell in row] for row in table.rows])


def latex(table: Table, caption: str) -> str:
    """A table for LaTeX with the package booktabs."""
    rows = [" & ".join(map(_escaped, row)) + r" \\" for row in (table.header, *table.rows)]
    head = f"% {caption}: needs \\usepackage{{booktabs}}"
    begin = f"\\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}\n\\toprule"
    return "\n".join([head, begin, rows[0], r"\midrule", *rows[1:], "\\bottomrule\n\\end{tabular}\n"])


def _escaped(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))


def _paired(entry: dict[str, Any]) -> list[str]:
    return [
        entry["arm"],
        metric_name(entry["metric"]),
        str(entry["abscissa"]),
        short(entry.get("baseline")),
        signed(entry["difference"]),
        bracketed(entry.get("interval")),
        bracketed(entry.get("bootstrap")),
        short(entry.get("noise")),
        str(entry["verdict"]),
    ]


def _numbers_of(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """The numbers of a chart, a row for each point or value."""
    drawn = chart.drawn
    if isinstance(drawn, LinePlot):
        rows = []
        for line in drawn.lines:
            nothing = [None] * len(line.x)
            points = zip(line.x, line.y, line.low or nothing, line.high or nothing, strict=True)
            rows += [[line.label, *map(_raw, point)] for point in points]
        return ["line", drawn.x_label, drawn.y_label, "low", "high"], rows
    header = ["row", drawn.x_label, "low", "high", "noise", "floor"]
    return header, [[row.label, *map(_raw, (row.value, row.low, row.high, row.noise, row.mark))] for row in drawn.rows]


def _raw(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode("utf-8", "backslashreplace")


def _samples(
    inputs: Inputs, taken: dict[str, bytes], left_out: list[str]
) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """File name, description and bytes of every picture of the page."""
    table = gather_pictures(inputs)
    parts: list[tuple[str, str, dict[str, Any], Any]] = []
    for number, (key, row) in enumerate(table.rows.items(), 1):
        for column, part in row.items():
            told = {"prompt": key.prompt, "seed": key.seed, "column": column}
            parts.append((f"samples/{number:02}-{_slug(key.prompt)}", column, told, part))
    for caption, part in check_pictures(inputs)[0]:
        parts.append(("samples/check", caption, {"title": caption}, part))
    for folder, name, told, part in parts:
        content = io.BytesIO()
        try:
            part.read().save(content, "PNG")
        except (OSError, BadImageError) as error:
            left_out.append(f"{part.file}: cannot be shown ({error})")
            continue
        yield _free(taken, folder, name, ".png") + ".png", told, content.getvalue()


def _by_column(versions: Table) -> dict[str, dict[str, str]]:
    return {name: {row[0]: row[i] for row in versions.rows} for i, name in enumerate(versions.header[1:], 1)}


def _free(taken: dict[str, bytes], folder: str, title: str, ending: str) -> str:
    """A file name that is not taken yet."""
    name, number = f"{folder}/{_slug(title)}", 2
    while f"{name}{ending}" in taken:
        name, number = f"{folder}/{_slug(title)}-{number}", number + 1
    return name


def _slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or "untitled"
