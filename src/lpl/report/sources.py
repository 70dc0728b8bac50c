"""Finds what the named folders hold: runs, comparisons, evaluations and checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lpl.errors import UserError
from lpl.report.run_folder import RunFolder, is_run, read_run

KINDS = {"eval": "eval.json", "check": "check.json", "compare": "compare.json"}
SLOTS = 8


@dataclass(frozen=True)
class Result:
    """A JSON file of lpl eval, check or compare."""

    file: Path
    content: dict[str, Any]


@dataclass
class Group:
    """Runs and evaluations that are drawn in one colour: an arm with all its seeds, or a single folder."""

    name: str
    slot: str
    runs: list[RunFolder] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    """Of the runs of an arm."""
    evals: list[Result] = field(default_factory=list)
    baseline: bool = False
    folder: Path | None = None
    yardsticks: tuple[str, ...] = ()
    """Validation losses that mean something else than the baseline's, as options that define them differ."""


@dataclass
class Inputs:
    """Everything that the page is about."""

    groups: list[Group] = field(default_factory=list)
    comparisons: list[Result] = field(default_factory=list)
    checks: list[Result] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[RunFolder]:
        """All runs."""
        return [run for group in self.groups for run in group.runs]

    @property
    def evals(self) -> list[Result]:
        """All evaluations."""
        return [result for group in self.groups for result in group.evals]


def read_inputs(names: Sequence[str]) -> Inputs:
    """Reads every named folder (or JSON file); results in a folder of a run are taken with it.

    Raises:
        UserError: one that is not there, or that holds nothing to report on.
    """
    inputs = Inputs()
    folders = [_folder(name) for name in names]
    labels = _labels([folder for folder, _ in folders])
    for (folder, file), label in zip(folders, labels, strict=True):
        _read(inputs, folder, file, label)
    for run in inputs.runs:
        inputs.skipped += run.skipped
    for result in (*inputs.comparisons, *inputs.evals, *inputs.checks):
        inputs.skipped += [str(line) for line in result.content.get("refused", [])]
    inputs.skipped = list(dict.fromkeys(inputs.skipped))
    return inputs


def _folder(name: str) -> tuple[Path, Path | None]:
    path = Path(name)
    if path.is_file() and path.name in KINDS.values():
        return path.parent, path
    if not path.is_dir():
        raise UserError(f"{name}: no such folder; name one that lpl train, compare, eval or check wrote")
    return path, None


def _read(inputs: Inputs, folder: Path, file: Path | None, label: str) -> None:
    files = {kind: folder / name for kind, name in KINDS.items() if (folder / name).is_file()}
    if file is not None:
        files = {kind: path for kind, path in files.items() if path == file}
    run = file is None and is_run(folder)
    beside = file is None and any(folder.glob("*/check.json"))
    if not files and not run and not beside:
        raise UserError(f"{folder}: no config.yaml of a run in it, no {', '.join(KINDS.values())}")
    if beside and not run:
        inputs.checks += [read_result(found, "check") for found in sorted(folder.glob("*/check.json"))]
    if "compare" in files:
        _read_comparison(inputs, read_result(files["compare"], "compare"))
    if "check" in files:
        inputs.checks.append(read_result(files["check"], "check"))
    if run or "eval" in files:
        group = Group(label, _slot(inputs), folder=folder)
        if run:
            group.runs.append(read_run(folder))
        if "eval" in files:
            group.evals.append(read_result(files["eval"], "eval"))
        if run:
            _read_beside(inputs, group, folder)
        inputs.groups.append(group)


def _read_comparison(inputs: Inputs, comparison: Result) -> None:
    inputs.comparisons.append(comparison)
    for arm in comparison.content.get("arms", []):
        home = comparison.file.parent
        group = Group(str(arm["name"]), _slot(inputs), baseline=bool(arm.get("baseline")), folder=home / arm["name"])
        group.yardsticks = tuple(arm.get("yardsticks", ()))
        for run in arm.get("runs", []):
            folder = home / run["folder"]
            if not is_run(folder):
                inputs.skipped.append(f"{folder}: the run's folder is gone; its figures are those of {comparison.file}")
                continue
            group.runs.append(read_run(folder))
            group.seeds.append(int(run["seed"]))
            _read_beside(inputs, group, folder)
        inputs.groups.append(group)


def _read_beside(inputs: Inputs, group: Group, folder: Path) -> None:
    """Results in folders within a run's folder."""
    group.evals += [read_result(file, "eval") for file in sorted(folder.glob("*/eval.json"))]
    inputs.checks += [read_result(file, "check") for file in sorted(folder.glob("*/check.json"))]


def read_result(file: Path, kind: str) -> Result:
    """Reads a JSON file of lpl eval, check or compare.

    Raises:
        UserError: it cannot be read, or is of another kind.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); run lpl {kind} again") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UserError(f"{file}: was not written by lpl {kind}")
    return Result(file, content)


def _slot(inputs: Inputs) -> str:
    return str(len(inputs.groups) % SLOTS + 1)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    whole = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, whole)) + 1):
        labels = ["/".join(parts[-length:]) for parts in whole]
        if len(set(labels)) == len(set(whole)):
            break
    return labels
