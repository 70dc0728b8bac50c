"""Axes of the plots: from values to places, ticks, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to places [start, end], straight or by the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (
            (math.log10(self.low), math.log10(self.high), math.log10(value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, number: int) -> list[float]:
        """Round values within the scale, about so many."""
        return _log_ticks(self.low, self.high, number) if self.log else _even_ticks(self.low, self.high, number)


def scale_for(values: Sequence[float], start: float, end: float, log: bool = False, zero: bool = False) -> Scale:
    """A scale that holds all values, with a margin of 4 %.

    Args:
        values: finite; above 0 with log.
        start, end: places of its ends.
        log: by the logarithm.
        zero: 0 is to be on it.
    """
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    if log:
        margin = (high / low) ** 0.04 if high > low else 1.5
        return Scale(low / margin, high * margin, start, end, True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            return Scale(0.0, 1.0, start, end)
    margin = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low if zero and low == 0 else low - margin, high if zero and high == 0 else high + margin, start, end)


def _even_ticks(low: float, high: float, number: int) -> list[float]:
    raw = (high - low) / max(1, number)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, number: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    whole = [10.0**d for d in decades if low <= 10.0**d <= high]
    if len(whole) < 3:
        some = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
        return some if len(some) >= 2 else _even_ticks(low, high, number)
    every = -(-len(whole) // max(2, number))
    return whole[::every]


def short(value: float | None, digits: int = 3) -> str:
    """A number for readers: three digits, a true minus sign, thousands as k from 10,000 on."""
    if value is None or not math.isfinite(value):
        return "–"
    # Rounded first: what rounds up to the next power of ten is written as that.
    value = float(f"{value:.0f}" if 10**digits <= abs(value) < 10_000 else f"{value:.{digits - 1}e}")
    size = abs(value)
    if 10_000 <= size < 1e15:
        for unit, power in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if size >= power:
                text = f"{value / power:.{digits}g}{unit}"
                break
    elif 10 ** (digits - 1) <= size < 10_000 or value == 0:
        text = f"{value:.0f}" if size >= 10**digits or value == int(value) else f"{value:.{digits}g}"
    elif size < 1e-3 or size >= 10_000:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.{digits}g}"
    return text.replace("-", "−")
