"""What reaches the terminal."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest

from lpl.base.terminal import one_line, printable, printable_streams

HOSTILE = "a\x1b[2J\x07\x9b31m\u202eb\ud800\r\x00c"
SHOWN = r"a\x1b[2J\x07\x9b31m\u202eb\ud800\x0d\x00c"


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("a\tb\nc \u05d0\u0301\U0001f600") == "a\tb\nc \u05d0\u0301\U0001f600"
    assert one_line("a\nb\u2028c") == r"a\nb\u2028c"
    assert len(one_line("x" * 10**6)) < 5000


def test_it_is_escaped_in_whatever_is_printed_or_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the terminal's encoding lacks letters; a bar may go back to the start of its line."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with printable_streams():
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("lpl")
        logger.addHandler(handler)
        try:
            logger.warning("%s\nerror: forged", HOSTILE)
        finally:
            logger.removeHandler(handler)
        print(HOSTILE, "\u00e9")
        print("50 %", end="\r", file=sys.stderr)
    shown = out.buffer.getvalue().decode(), err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert shown == (rf"{SHOWN} \xe9" + "\n", rf"{SHOWN}\nerror: forged" + "\n50 %\r")


@pytest.mark.parametrize(
    "argv",
    [
        ["train", f"--train_data_dir=/nowhere/{HOSTILE.replace(chr(0), '')}", "--pretrained_model_name_or_path=/none"],
        ["\x1b[31m"],
        ["report", "/nowhere/\x1b]0;title\x07"],
        ["train", "--resolution=\x1b[31mx"],
    ],
)
def test_errors_do_not_pass_control_characters_on(run_cli: Any, argv: list[str]) -> None:
    code, _, err = run_cli(argv)
    assert code == 2
    assert "error: " in err
    assert not [letter for letter in err if letter < " " and letter != "\n"]


def test_a_full_memory_is_one_line(run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own error, and what torch says of the computer's memory."""
    import lpl.cli

    full = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    for error in (MemoryError(), full):

        def fail(_argv: list[str], error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(lpl.cli, "_dispatch", fail)
        code, out, err = run_cli(["train"])
        assert (code, out, len(err.splitlines())) == (3, "", 1)
        assert err.startswith("error: out of memory: ")
