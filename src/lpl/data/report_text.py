"""The numbers of `lpl data` as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SHOWN = 20
"""Folders that are listed; of more, the largest, and the others are summed up."""
REASONS = 10
INDENT = 13


def text(found: dict[str, Any], files: Sequence[Path], bad_files: Path) -> str:
    """What `lpl data` prints.

    Args:
        found: report_numbers.numbers.
        files: those that were written.
        bad_files: the list of what cannot be used.
    """
    lines: list[str] = []
    for part in found["parts"]:
        lines += _part(part)
    if "epoch" in found:
        lines += _length(found)
        lines += _buckets(found)
    if "left_out" in found:
        lines += _labelled("held out", [f"{found['left_out']:,} for validation, copies included: not trained on"])
    copies = found["duplicates"]
    if copies["images"]:
        pairs = [f"{names[1]} = {names[0]}" for names in copies["sets"][:3]]
        lines += _labelled("duplicates", [f"{copies['images']:,} with the bytes of another:", *pairs])
    if found["bad_files"]:
        lines += _labelled("bad files", [f"{found['bad_files']:,}, listed in {bad_files}", *_reasons(found["parts"])])
    lines += _labelled("warnings", found["warnings"])
    lines += _labelled("written", list(map(str, files)))
    return "\n".join(line.rstrip() for line in lines)


def _part(part: dict[str, Any]) -> list[str]:
    label = "reg images" if part["regularisation"] else "images"
    of = "" if part["images"] == part["seen"] else f" of {part['seen']:,}"
    lines = _labelled(label, [f"{part['images']:,}{of} in {part['source']}"])
    if not part["images"]:
        return lines
    groups = part["groups"]
    if len(groups) > 1 or groups[0]["repeats"] != 1:
        lines += _groups(groups)
    captions = part["captions"]
    facts = [f"{captions['captions']:,}, {captions['different']:,} different"]
    if captions["several"]:
        facts.append(f"{captions['several']:,} images with several")
    if "instance_prompt" in captions:
        facts.append(f"{captions['instance_prompt']:,} by --instance_prompt")
    if captions["empty"]:
        facts.append(f"{captions['empty']:,} empty")
    lines += _labelled("captions", [", ".join(facts)])
    lines += _labelled("", [f"longest {captions['longest']:,} characters: {captions['longest_of']}"])
    if "masks" in part:
        lines += _labelled("masks", [f"{part['masks']:,} of {part['images']:,} images have one"])
    scaled = part["scaled_up"]
    if scaled["images"]:
        worst = [f"{entry['factor']:.2f} x  {entry['name']}" for entry in scaled["worst"]]
        lines += _labelled("scaled up", [f"{scaled['images']:,} images ({scaled['share']:.1%}), most:", *worst])
    lost = part["cropped_away"]
    if lost["worst"] and lost["worst"][0]["share"] >= 0.001:
        worst = [f"{entry['share']:6.1%}  {entry['name']}" for entry in lost["worst"]]
        lines += _labelled("cropped away", [f"{lost['mean']:.1%} of the area on average, most:", *worst])
    return lines


def _groups(groups: list[dict[str, Any]]) -> list[str]:
    if len(groups) > SHOWN:
        groups = sorted(groups, key=lambda g: -g["images"])
    rows = [["folder", "images", "repeats", "draws an epoch"]]
    rows += [
        [g["group"] or "(the root)", f"{g['images']:,}", _short(g["repeats"]), _short(g["draws"])]
        for g in groups[:SHOWN]
    ]
    rest = groups[SHOWN:]
    if rest:
        images, draws = (sum(g[key] for g in rest) for key in ("images", "draws"))
        rows.append([f"{len(rest):,} more", f"{images:,}", "", _short(draws)])
    return _table(rows)


def _length(found: dict[str, Any]) -> list[str]:
    epoch, run = found["epoch"], found["run"]
    return [
        *_labelled("epoch", [f"{epoch['draws']:,} draws, {_short(epoch['steps'])} steps of {found['batch_size']}"]),
        *_labelled("run", [f"{run['steps']:,} steps, {_short(run['epochs'])} epochs"]),
    ]


def _buckets(found: dict[str, Any]) -> list[str]:
    rows = [["width x height", "images", "share", "draws an epoch", "steps an epoch"]]
    rows += [
        [
            f"{b['width']:5} x {b['height']}",
            f"{b['images']:,}",
            f"{b['share']:.1%}",
            f"{b['draws']:,}",
            f"{b['steps']:,.1f}",
        ]
        for b in found["buckets"]
    ]
    if len(rows) == 2:
        size = found["buckets"][0]
        return _labelled("crops", [f"{size['width']} x {size['height']}"])
    return [*_labelled("buckets", [f"{len(rows) - 1}"]), *_table(rows)]


def _reasons(parts: list[dict[str, Any]]) -> Iterator[str]:
    every = [entry for part in parts for entry in part["bad_files"]]
    for entry in every[:REASONS]:
        yield f"{entry['images']:,} x {entry['reason']}: {entry['first']}"
    if len(every) > REASONS:
        yield f"{len(every) - REASONS:,} more reasons"


def _labelled(label: str, lines: Sequence[str]) -> list[str]:
    return [f"{label if n == 0 else '':{INDENT}}{line}" for n, line in enumerate(lines)]


def _table(rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [" " * INDENT + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _short(number: float) -> str:
    """With two digits after the point where they say something."""
    return f"{number:,.2f}".rstrip("0").rstrip(".")
