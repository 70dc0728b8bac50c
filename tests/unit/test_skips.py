"""What is said of tests that do not run here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def test_skipped_browser_tests_are_told_in_one_line(pytestconfig: pytest.Config) -> None:
    names = ("tests/gpu/a.py::b", "tests/browser/test_page.py::c", "tests/browser/test_page.py::d")
    skipped = [SimpleNamespace(nodeid=name, longrepr=[name, 1, f"Skipped: no {name[6:9]}"]) for name in names]
    said: list[str] = []
    summary = pytestconfig.pluginmanager.get_plugin(str(CONFTEST)).pytest_terminal_summary
    summary(SimpleNamespace(stats={"skipped": skipped}, write_line=said.append))
    assert said == ["2 browser tests skipped: no bro"]
    summary(SimpleNamespace(stats={"skipped": skipped[:1]}, write_line=said.append))
    summary(SimpleNamespace(stats={}, write_line=said.append))
    assert len(said) == 1
