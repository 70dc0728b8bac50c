"""The table that a comparison ends with."""

from __future__ import annotations

import pytest

from lpl.comparison.verdict import Pair, entry
from lpl.report.findings import chance_line, result_table


@pytest.mark.parametrize(
    ("compared", "told"),
    [
        (0, ""),
        (1, "of 1 verdict, about 0.05 would find a difference by chance alone"),
        (11, "of 11 verdicts, about 0.55 would find a difference by chance alone"),
        (39, "of 39 verdicts, about 1.95 would find a difference by chance alone"),
    ],
)
def test_chance_is_told_at_any_number(compared: int, told: str) -> None:
    known = [entry("lpl", f"m{i}", "steps", [Pair(1.0, 0.9), Pair(1.0, 0.8)], None) for i in range(compared)]
    paired = [*known, entry("lpl", "unknown", "steps", [Pair(1.0, 0.9)], None)]
    assert chance_line(paired) == told
    arms = [{"name": "lpl", "overrides": {}, "baseline": False, "runs": [], "unpaired": None}]
    table = result_table({"arms": arms, "paired": paired, "at_best": [], "notes": [], "refused": []})
    assert ("by chance alone" in table) == bool(told)
    assert table.endswith(told)
