"""How numbers are written for readers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def short(value: float | None, digits: int = 3) -> str:
    """A number for readers: three digits, a true minus sign, thousands as k from 10,000 on."""
    if value is None or not math.isfinite(value):
        return "–"
    # Rounded first, so that a number that rounds up to the next power of ten is written as that.
    value = float(f"{value:.0f}" if 10**digits <= abs(value) < 10_000 else f"{value:.{digits - 1}e}")
    size = abs(value)
    if 10_000 <= size < 1e15:
        unit, power = next(pair for pair in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if size >= pair[1])
        text = f"{value / power:.{digits}g}{unit}"
    elif 10 ** (digits - 1) <= size < 10_000 or value == 0:
        text = f"{value:.0f}" if size >= 10**digits or value == int(value) else f"{value:.{digits}g}"
    elif size < 1e-3 or size >= 10_000:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.{digits}g}"
    return text.replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign."""
    text = short(value, digits)
    return f"+{text}" if value > 0 else text


def bracketed(interval: Sequence[float] | None) -> str:
    """An interval in square brackets; a dash: there is none."""
    return "–" if interval is None else f"[{short(interval[0])}, {short(interval[1])}]"
