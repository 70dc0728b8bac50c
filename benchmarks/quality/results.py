"""results.json: a row for each point of each run, appended as they come, each time the whole file at once."""

from __future__ import annotations

import json
import subprocess
import threading
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.quality.arms import Run
from lpl import __version__
from lpl.base.errors import UserError
from lpl.base.files import write_atomically
from lpl.config.environment import environment

Row = dict[str, Any]


@cache
def commit() -> str:
    """Of the code that runs; with a + where files differ from it."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Results:
    """The file and its rows.

    Args:
        file: read where it is there.

    Raises:
        UserError: a file that is no results.json of this benchmark.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self.content: dict[str, Any] = {"lpl": __version__, "kind": "quality", "fixed": {}, "rows": [], "floors": []}
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                self.content = self.content | found
                known = found["kind"] == "quality" and {"fixed", "floors"} <= found.keys()
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}: is no results.json of this benchmark ({error})") from error
            if not known:
                raise UserError(f"{file}: is no results.json of this benchmark")

    @property
    def rows(self) -> list[Row]:
        """One a point."""
        found: list[Row] = self.content["rows"]
        return found

    def fix(self, name: str, value: Any) -> None:
        """States what all rows have in common and no row says.

        Raises:
            UserError: the rows that are there have something else in common.
        """
        with self._lock:
            before = self.content["fixed"].setdefault(name, value)
            if before != value:
                raise UserError(
                    f"{self.file}: its rows were made with {name} {before}, not {value}: choose another --results"
                )
            self._write()

    @staticmethod
    def key(run: Run) -> Row:
        """What a row and a run must have in common to be the same."""
        key = {"arm": run.arm, "seed": run.seed, "reported": run.reported, "steps": run.steps, "options": run.options}
        return key | ({} if run.base_steps is None else {"base_steps": run.base_steps})

    def find(self, run: Run, samples: int) -> list[Row]:
        """The run's rows."""
        key = self.key(run) | {"samples": samples}
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def add(self, run: Run, samples: int, measured: list[Row], seconds: float | None) -> None:
        """Appends the rows of a run's points that are not there yet."""
        with self._lock:
            place = lambda row: (row["guidance"], row["sampling_steps"])  # noqa: E731
            there = {place(row) for row in self.find(run, samples)}
            new = [row for row in measured if place(row) not in there]
            more = {"samples": samples, "commit": commit()} | ({} if seconds is None else {"seconds": seconds})
            self.rows.extend(self.key(run) | more | row for row in new)
            if new:
                self._write()

    def note(self, name: str, value: Any) -> None:
        """Keeps something beside the rows."""
        with self._lock:
            self.content[name] = value
            self._write()

    def _write(self) -> None:
        self.content |= {"lpl": __version__, "environment": environment()}
        text = json.dumps(self.content, indent=1, ensure_ascii=False, allow_nan=False)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, (text + "\n").encode())
