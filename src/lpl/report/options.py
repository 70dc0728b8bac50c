"""Options of `lpl report`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from lpl.config.checks import check_declared, option, require

PAGE = "report.html"


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page about runs, comparisons, evaluations and checks; it works from disk, without network."""

    runs: tuple[str, ...] = option(MISSING, path=True)
    """Folders that lpl train, compare, eval or check wrote; the first one named is what others are set against."""
    output: str | None = option(None, path=True)
    """The HTML file; unset: report.html in the first folder."""
    max_megabytes: float = option(7.5, most=10_000.0)
    """Largest size of the page; pictures are made smaller to keep below it."""

    def __post_init__(self) -> None:
        check_declared(self)
        require(bool(self.runs), "name a folder to report on: lpl report RUN ...")
        require(self.max_megabytes >= 1, f"--max_megabytes must be at least 1, not {self.max_megabytes}")

    @property
    def page(self) -> Path:
        """The file to write."""
        return Path(self.runs[0]) / PAGE if self.output is None else Path(self.output)
