"""The report of `lpl data`: its numbers as plain text, and the files that it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lpl.base.errors import UserError
from lpl.base.files import ELSEWHERE, alone_in, write_atomically, writing
from lpl.base.json_files import as_json, object_in
from lpl.base.output_folder import Names, OutputFolder
from lpl.base.terminal import columns, labelled
from lpl.config import TrainConfig
from lpl.config.length import count
from lpl.config.run import processes
from lpl.config.run_folder import BAD_FILES, CROPPED, DATA_FILE, DRAWS
from lpl.data.bad_files import is_list
from lpl.data.contact_sheet import crop_sheet, draw_sheet
from lpl.data.report_numbers import draw_numbers, most_cropped, numbers
from lpl.data.sheets import png_of
from lpl.data.sources import Source
from lpl.data.survey import first_draws, read_through

SHOWN = 20
"""Most folders that are listed, the largest ones; the others are summed up."""
REASONS = 10


def text(found: dict[str, Any], files: Sequence[Path], bad_files: Path) -> str:
    """What `lpl data` prints: report_numbers.numbers, the files written, and where bad files are listed."""
    lines = labelled("verdict", [_verdict(found)])
    for part in found["parts"]:
        lines += _part(part)
    if "epoch" in found:
        epoch, run = found["epoch"], found["run"]
        length = f"{epoch['draws']:,} draws, {_short(epoch['steps'])} steps of {found['batch_size']}"
        lines += labelled("epoch", [length])
        lines += labelled("run", [run["length"]])
        for label in ("saves", "validates", "mirrors"):
            lines += labelled(label, [run[label]])
        lines += _buckets(found["buckets"])
    if "left_out" in found:
        lines += labelled("held out", [f"{found['left_out']:,} for validation, copies included: not trained on"])
    copies = found["duplicates"]
    if copies["images"]:
        pairs = [f"{names[1]} = {names[0]}" for names in copies["sets"][:3]]
        lines += labelled("duplicates", [f"{copies['images']:,} with the bytes of another:", *pairs])
    if found["bad_files"]:
        lines += labelled("bad files", [f"{found['bad_files']:,}, listed in {bad_files}", *_reasons(found["parts"])])
    lines += labelled("warnings", found["warnings"])
    lines += labelled("written", list(map(str, files)))
    return "\n".join(line.rstrip() for line in lines)


def _verdict(found: dict[str, Any]) -> str:
    if found["fault"] is not None:
        return f"no run would start: {found['fault']}"
    warnings = len(found["warnings"])
    if warnings:
        return f"ready to train, after a look at {count(warnings, 'warning')} below"
    return "ready to train"


def _part(part: dict[str, Any]) -> list[str]:
    label = "reg images" if part["regularisation"] else "images"
    of = "" if part["images"] == part["seen"] else f" of {part['seen']:,}"
    lines = labelled(label, [f"{part['images']:,}{of} in {part['source']}"])
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
    lines += labelled("captions", [", ".join(facts)])
    lines += labelled("", [f"longest {captions['longest']:,} characters: {captions['longest_of']}"])
    if "masks" in part:
        lines += labelled("masks", [f"{part['masks']:,} of {part['images']:,} images have one"])
    scaled = part["scaled_up"]
    if scaled["images"]:
        worst = [f"{entry['factor']:.2f} x  {entry['name']}" for entry in scaled["worst"]]
        lines += labelled("scaled up", [f"{scaled['images']:,} images ({scaled['share']:.1%}), most:", *worst])
    lost = part["cropped_away"]
    if lost["worst"] and lost["worst"][0]["share"] >= 0.001:
        worst = [f"{entry['share']:6.1%}  {entry['name']}" for entry in lost["worst"]]
        lines += labelled("cropped away", [f"{lost['mean']:.1%} of the area on average, most:", *worst])
    return lines


def _groups(groups: list[dict[str, Any]]) -> list[str]:
    if len(groups) > SHOWN:
        groups = sorted(groups, key=lambda g: -g["images"])
    rows = [["folder", "images", "repeats", "draws an epoch"]]
    for group in groups[:SHOWN]:
        told = f"{group['images']:,}", _short(group["repeats"]), _short(group["draws"])
        rows.append([group["group"] or "(the root)", *told])
    if rest := groups[SHOWN:]:
        images, draws = (sum(g[key] for g in rest) for key in ("images", "draws"))
        rows.append([f"{len(rest):,} more", f"{images:,}", "", _short(draws)])
    return labelled("", columns(rows, right=True))


def _buckets(buckets: list[dict[str, Any]]) -> list[str]:
    if len(buckets) == 1:
        return labelled("crops", [f"{buckets[0]['width']} x {buckets[0]['height']}"])
    rows = [["width x height", "images", "share", "draws an epoch", "steps an epoch"]]
    for bucket in buckets:
        size, share = f"{bucket['width']:5} x {bucket['height']}", f"{bucket['share']:.1%}"
        rows.append([size, f"{bucket['images']:,}", share, f"{bucket['draws']:,}", f"{bucket['steps']:,.1f}"])
    return [*labelled("buckets", [f"{len(buckets)}"]), *labelled("", columns(rows, right=True))]


def _reasons(parts: list[dict[str, Any]]) -> Iterator[str]:
    every = [entry for part in parts for entry in part["bad_files"]]
    for entry in every[:REASONS]:
        yield f"{entry['images']:,} x {entry['reason']}: {entry['first']}"
    if len(every) > REASONS:
        yield f"{len(every) - REASONS:,} more reasons"


def _short(number: float) -> str:
    """A number with up to two digits after the point."""
    return f"{number:,.2f}".rstrip("0").rstrip(".")


CROPPED_SHOWN = 6


def make_report(
    config: TrainConfig, source: Source, regularisation: Source | None, folder: Path, num_shown: int
) -> tuple[str, UserError | None]:
    """Reads every image once and writes data.json, draws.png, cropped.png and bad_files.jsonl.

    Files of an earlier report are replaced, or removed where there is nothing to say or show.

    Args:
        config: the options, with a resolution.
        num_shown: draws on the contact sheet; 0: no pictures.

    Returns:
        The report as text, and why a run on these data would not start, if it would not.

    Raises:
        UserError: a folder that cannot be written, a source that cannot be read, options that do not go with it.
    """
    output = OutputFolder(folder.parent, "lpl data", folder.name)
    names = Names({**dict.fromkeys((DATA_FILE, DRAWS, CROPPED)), BAD_FILES: is_list})

    def is_old(_path: Path) -> bool:
        return {"resolution", "bad_files", "parts", "warnings"} <= object_in(folder / DATA_FILE).keys()

    output.check(names, is_old)
    with alone_in(folder):
        output.check(names, is_old)
        output.claim(names, is_old)
        return _write_report(config, source, regularisation, folder, num_shown)


def _write_report(
    config: TrainConfig, source: Source, regularisation: Source | None, folder: Path, num_shown: int
) -> tuple[str, UserError | None]:
    with writing(f"--output_dir {config.run.output_dir}: {folder}", ELSEWHERE):
        for name in (DATA_FILE, DRAWS, CROPPED):
            (folder / name).unlink(missing_ok=True)
        survey = read_through(config, source, regularisation, folder / BAD_FILES, processes())
        found, pictures = numbers(survey), {}
        if survey.order is not None and num_shown:
            draws, cropped = first_draws(survey, num_shown), most_cropped(survey, CROPPED_SHOWN)
            found["shown"] = draw_numbers(draws)
            pictures[DRAWS] = draw_sheet(survey, draws)
            if cropped:
                pictures[CROPPED] = crop_sheet(survey, cropped)
        for name, picture in pictures.items():
            write_atomically(folder / name, png_of(picture))
        write_atomically(folder / DATA_FILE, as_json(found))
    files = [folder / name for name in (DATA_FILE, *pictures)]
    return text(found, files, folder / BAD_FILES), survey.fault
