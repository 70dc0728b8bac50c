"""Finds the runs, comparisons, evaluations and checks in the named folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from lpl.base.errors import UserError
from lpl.config import run_folder
from lpl.config.run_folder import CHECK_FILE, EVAL_FILE, EVAL_FOLDER, RESULT_FILES
from lpl.report.runs import RunFolder, inside, is_run, read_run

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
    """Unique on the page."""
    slot: str
    runs: list[RunFolder] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    """Seeds of an arm's runs."""
    evals: list[Result] = field(default_factory=list)
    """At most one per run."""
    baseline: bool = False
    folder: Path | None = None
    arm: str | None = None
    """For an arm, its name in its comparison."""
    comparison: Path | None = None
    """For an arm, its compare.json."""
    further: bool = False
    """Further evaluations of runs that are in another group."""
    redefined: tuple[str, ...] = ()
    """Kinds of metric that are defined otherwise than the baseline's, since options that define them differ."""


@dataclass
class Inputs:
    """Everything that the page shows."""

    groups: list[Group] = field(default_factory=list)
    comparisons: list[Result] = field(default_factory=list)
    checks: list[Result] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[RunFolder]:
        """All runs."""
        return [run for group in self.groups for run in group.runs]

    def arms(self, comparison: Result) -> dict[str, Group]:
        """The arms of a comparison, by their names in it."""
        return {g.arm: g for g in self.groups if g.arm is not None and g.comparison == comparison.file}

    @property
    def evals(self) -> list[Result]:
        """All evaluations."""
        return [result for group in self.groups for result in group.evals]


def read_inputs(names: Sequence[str]) -> Inputs:
    """Reads every named folder (or JSON file); results in a run's folder are read with it.

    Raises:
        UserError: a folder does not exist, or holds nothing to report on.
    """
    inputs = Inputs()
    folders = [_folder(name) for name in names]
    labels = shortest_ends([folder for folder, _ in folders])
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
    if path.is_file() and path.name in RESULT_FILES.values():
        return path.parent, path
    if not path.is_dir():
        raise UserError(f"{name}: no such folder; name one that lpl train, compare, eval or check wrote")
    return path, None


def _read(inputs: Inputs, folder: Path, file: Path | None, label: str) -> None:
    files = {kind: folder / name for kind, name in RESULT_FILES.items() if (folder / name).is_file()}
    if file is not None:
        files = {kind: path for kind, path in files.items() if path == file}
    run = file is None and is_run(folder)
    beside = file is None and any(folder.glob(f"*/{CHECK_FILE}"))
    if not files and not run and not beside:
        raise UserError(f"{folder}: no config.yaml of a run in it, no {', '.join(RESULT_FILES.values())}")
    if beside and not run:
        inputs.checks += [read_result(found, "check") for found in sorted(folder.glob(f"*/{CHECK_FILE}"))]
    if "compare" in files:
        _read_comparison(inputs, read_result(files["compare"], "compare"))
    if "check" in files:
        inputs.checks.append(read_result(files["check"], "check"))
    if run or "eval" in files:
        above = folder.resolve().parents[label.count("/")]
        group = Group(_free_name(inputs, [label], above)[0], _slot(inputs), folder=folder)
        inputs.groups.append(group)
        if run:
            group.runs.append(read_run(folder))
        if "eval" in files:
            group.evals.append(read_result(files["eval"], "eval"))
        if run:
            _read_beside(inputs, group, [folder])


def _read_comparison(inputs: Inputs, comparison: Result) -> None:
    if any(known.file.resolve() == comparison.file.resolve() for known in inputs.comparisons):
        return
    inputs.comparisons.append(comparison)
    home, arms = comparison.file.parent, comparison.content.get("arms", [])
    names = _free_name(inputs, [str(arm["name"]) for arm in arms], home)
    for arm, name in zip(arms, names, strict=True):
        group = Group(
            name,
            _slot(inputs),
            baseline=bool(arm.get("baseline")),
            folder=home / arm["name"],
            arm=str(arm["name"]),
            comparison=comparison.file,
            redefined=tuple(arm.get("yardsticks", ())),
        )
        inputs.groups.append(group)
        folders = []
        for run in arm.get("runs", []):
            folder = inside(home, run["folder"])
            if folder is None or not is_run(folder):
                told = f"{home / run['folder']}: the run's folder is gone"
                inputs.skipped.append(f"{told}; its figures are those of {comparison.file}")
                continue
            group.runs.append(read_run(folder))
            group.seeds.append(int(run["seed"]))
            folders.append(folder)
        _read_beside(inputs, group, folders)


def _read_beside(inputs: Inputs, group: Group, folders: Sequence[Path]) -> None:
    """Reads results in subfolders of a group's runs.

    The group gets one evaluation per run, the one in EVAL_FOLDER if there are several; the others become groups of
    their own, named by their folders: different evaluations of one run do not show what another seed changes.
    """
    found: dict[str, list[Result]] = {}
    for folder in folders:
        for file in sorted(folder.glob(f"*/{EVAL_FILE}")):
            found.setdefault(file.parent.name, []).append(read_result(file, "eval"))
        inputs.checks += [read_result(file, "check") for file in sorted(folder.glob(f"*/{CHECK_FILE}"))]
    own = EVAL_FOLDER if EVAL_FOLDER in found or len(found) != 1 else next(iter(found))
    if not group.evals:
        group.evals = found.pop(own, [])
    for name, evals in sorted(found.items()):
        [told] = _free_name(inputs, [f"{group.name}/{name}"], folders[0].resolve().parent)
        folder = evals[0].file.parent
        other = Group(told, _slot(inputs), evals=evals, folder=folder, further=True, redefined=group.redefined)
        inputs.groups.append(other)


def _free_name(inputs: Inputs, names: Sequence[str], folder: Path) -> list[str]:
    """The names, all prefixed with as much of the folder's path as is needed to differ from other groups' names.

    Args:
        inputs: read so far.
        names: names of groups.
        folder: the folder above the named ones.
    """
    taken, parts = {group.name for group in inputs.groups}, folder.resolve().parts[1:]
    for length in range(len(parts) + 1):
        found = ["/".join([*parts[len(parts) - length :], name]) for name in names]
        if not taken & set(found):
            return found
    number = next(n for n in count(2) if not taken & {f"{name} ({n})" for name in names})
    return [f"{name} ({number})" for name in names]


def read_result(file: Path, kind: str) -> Result:
    """Reads a JSON file of lpl eval, check or compare.

    Raises:
        UserError: it cannot be read, or is of another kind.
    """
    return Result(file, run_folder.read_result(file, kind))


def _slot(inputs: Inputs) -> str:
    return str(len(inputs.groups) % SLOTS + 1)


def shortest_ends(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that distinguish them."""
    whole = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, whole)) + 1):
        labels = ["/".join(parts[-length:]) for parts in whole]
        if len(set(labels)) == len(set(whole)):
            break
    return labels
