"""results.json: rows that are appended one by one, each time the whole file at once."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.quality.arms import Options, Run, Setting
from lpl import __version__
from lpl.config_io import environment
from lpl.data.files import write_atomically
from lpl.errors import UserError

Row = dict[str, Any]


class Results:
    """The file and its rows.

    Args:
        file: read where it is there.
        primary: the setting whose arms have no suffix.
        fixed: what all rows have in common and no row says.

    Raises:
        UserError: a file that is no results.json, or one whose rows have something else in common.
    """

    def __init__(self, file: Path, primary: Setting, fixed: Options) -> None:
        self.file, self.primary = file, primary
        self._lock = threading.Lock()
        self.content: dict[str, Any] = {"lpl": __version__, "kind": "quality", "rows": [], "baselines": {}}
        if file.is_file():
            try:
                self.content = json.loads(file.read_text(encoding="utf-8"))
                self.rows.extend([])
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{file}: is no results.json of this benchmark ({error})") from error
        before = self.content.setdefault("fixed", fixed)
        other = sorted(name for name in before.keys() | fixed.keys() if before.get(name) != fixed.get(name))
        if other:
            raise UserError(
                f"{file}: its rows were made with {other[0]} {before.get(other[0])}, not {fixed.get(other[0])}: choose "
                "another --output_dir"
            )

    @property
    def rows(self) -> list[Row]:
        """One a run."""
        found: list[Row] = self.content["rows"]
        return found

    def arm_of(self, run: Run) -> str:
        """The arm's name in a row: of another setting than the searched one with its name behind an @."""
        return run.arm if run.setting == self.primary else f"{run.arm}@{run.setting.name}"

    def key(self, run: Run) -> Row:
        """What a row and a run must have in common to be the same."""
        own = {"base_steps": run.base_steps, "sampling_steps": run.setting.sampling_steps}
        return {
            "arm": self.arm_of(run),
            "setting": run.setting.name,
            "seed": run.seed,
            "reported": run.reported,
            "steps": run.steps,
            "samples": run.samples,
            "options": run.options,
        } | {name: value for name, value in own.items() if value is not None}

    def find(self, run: Run, among: str = "rows") -> Row | None:
        """The run's row, or None."""
        key = self.key(run)
        return next((r for r in self.content.get(among, []) if all(r.get(n) == v for n, v in key.items())), None)

    def add(self, run: Run, measured: Row, among: str = "rows") -> None:
        """Appends a row, unless it is there."""
        with self._lock:
            if self.find(run, among) is None:
                self.content.setdefault(among, []).append(self.key(run) | measured)
                self._write()

    def note(self, name: str, value: Any) -> None:
        """Keeps something beside the rows."""
        with self._lock:
            self.content[name] = value
            self._write()

    def seconds_per_step(self, arm: str) -> float:
        """Median over the reported rows of an arm."""
        return median(row["seconds"] / row["steps"] for row in self.rows if row["arm"] == arm and row["reported"])

    def baseline(self, setting: Setting) -> Row:
        """What is kept of a setting's pretraining: its curve, floor and whether it reached its target."""
        found: Row = self.content["baselines"].get(setting.name, {})
        return {"curve": []} | found

    def keep_baseline(self, setting: Setting, values: Row) -> None:
        """Adds to that."""
        with self._lock:
            self.content["baselines"][setting.name] = self.baseline(setting) | values
            self._write()

    def _write(self) -> None:
        self.content |= {"lpl": __version__, "environment": environment()}
        text = json.dumps(self.content, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(self.file, (text + "\n").encode())
