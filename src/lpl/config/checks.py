"""How an option is declared: all that is known of it stands beside its field, and its bounds are checked from there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from math import isfinite
from os.path import expanduser
from typing import Any, NamedTuple

from lpl.base.errors import UserError, require

MOST = 10**12
"""The largest whole number where an option declares no bound of its own."""
MOST_PIXELS = 2**12
"""Longest side of an image: at it a plan, whose time grows with the area, still takes only a minute or two."""
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Most bytes that file systems take."""


class Needs(NamedTuple):
    """What an option cannot act without, where `needs` cannot say it in flags."""

    words: str
    """As in "--x has no effect without ..."."""
    are_met: Callable[[Any], bool]
    """Called with the options: a TrainConfig, or another command's."""


@dataclass(frozen=True)
class Facts:
    """What is known of an option beside its name, type and help.

    Attributes:
        default: its value where it is not given.
        least, most: the smallest and the largest value that it takes.
        above, below: values that it must lie above and below.
        path: it names a file or folder (or may, beside a Hub id).
        may_be_empty: its text may be empty; elsewhere that is refused, as a variable that was not set, or a slip.
        needs: what it has no effect without; as a text: other options by name, `a`, `a=this|that`, joined by ` & `.
        free: it changes the trajectory of a run by float rounding at most: a run may be continued with another value.
        divides: it divides a step's samples, as the number of processes does; a run may be continued if the product of
            them all is the same.
        recorded: config.yaml has it.
        draws: it decides what a step sees: crops, captions, noise and timesteps. Runs that differ in it are not paired.
        defines: kinds of figures that mean something else with another value of it: "diffusion_loss" and "lpl" of
            validation, "samples" of lpl eval.
        arms: why the arms of a comparison cannot have it.
        period: for a number of optimizer steps: what is missing in a run that is shorter.
        elsewhere: what other trainers call it.
        schedule: "discrete" or "flow", the only kind of noise schedule that it acts with; or that kind for each value.
        by_model: only models of some families have it.
        main: `lpl train --help` shows it; `--help all` shows every one.
        replaced_by: options that say the same in another way: a flag of these drops the value from --config.
        preset_unless: options ("name", or "name=value") that, if given, drop the value from a preset.
    """

    default: Any = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    path: bool = False
    may_be_empty: bool = False
    needs: Needs | None = None
    free: bool = False
    divides: bool = False
    recorded: bool = True
    draws: bool = False
    defines: tuple[str, ...] = ()
    arms: str | None = None
    period: str | None = None
    elsewhere: tuple[str, ...] = ()
    schedule: str | Mapping[str, str] | None = None
    by_model: bool = False
    main: bool = False
    replaced_by: tuple[str, ...] = ()
    preset_unless: tuple[str, ...] = ()

    def fits(self, value: Any, schedule: str) -> bool:
        """Whether a value other than the default acts with a kind of schedule, "discrete" or "flow"."""
        only = self.schedule.get(str(value)) if isinstance(self.schedule, Mapping) else self.schedule
        return only in (None, schedule) or value == self.default

    def range(self) -> str:
        """The bounds in words, as in "must be ..."; empty: none."""
        if self.above is not None and self.below is not None:
            return f"lie between {self.above:g} and {self.below:g}"
        if self.above is not None and self.most is not None:
            return f"lie above {self.above:g} and be {self.most:g} at most"
        if self.least is not None and self.below is not None:
            return f"lie in {self.least:g}..{self.below:g}, below {self.below:g}"
        if self.least is not None and self.most is not None:
            return f"lie in {self.least:.17g}..{self.most:.17g}"
        if self.above is not None:
            return f"be above {self.above:g}" if self.above else "be positive"
        if self.least is not None:
            return f"be at least {self.least:.17g}" if self.least else "be 0 or more"
        return "" if self.most is None else f"be at most {self.most:.17g}"


def option(default: Any, needs: str | Needs | None = None, **facts: Any) -> Any:
    """A field with what is known of it; the keywords are those of Facts."""
    return field(default=default, metadata=facts | {"needs": _named(needs) if isinstance(needs, str) else needs})


def _named(options: str) -> Needs:
    parts = [part.partition("=") for part in options.split(" & ")]
    wanted = {name: values.split("|") if values else None for name, _, values in parts}
    words = (f"--{name}" + (f" {' or '.join(values)}" if values else "") for name, values in wanted.items())

    def are_met(config: Any) -> bool:
        given = config.flat() if hasattr(config, "flat") else vars(config)
        return all(
            given[n] in values if values else given[n] not in (None, False, 0, "none") for n, values in wanted.items()
        )

    return Needs(" and ".join(words), are_met)


@cache
def facts_of(group: Any) -> dict[str, Facts]:
    """What is known of each option of a class of options; its USUALLY holds for all that do not say otherwise."""
    usually = getattr(group, "USUALLY", Facts())
    return {f.name: replace(usually, **{"default": f.default} | dict(f.metadata)) for f in fields(group)}


class Options:
    """A group of options, whose values are checked by what is declared beside them."""

    def __post_init__(self) -> None:
        """Checks bounds, and that texts and paths are ones a system can hold.

        In paths ~ becomes the home folder, which a shell does not always do (a YAML file, --option=~/x).

        Raises:
            UserError: the first value that does not fit.
        """
        own: Any = type(self)
        for declared, facts in zip(fields(own), facts_of(own).values(), strict=True):
            values = getattr(self, declared.name)
            for value in values if isinstance(values, tuple) else (values,):
                flag = f"--{declared.name}"
                if isinstance(value, str):
                    check_text(flag, value, facts.path)
                    if facts.path:
                        check_path(flag, value)
                elif isinstance(value, int | float) and not isinstance(value, bool):
                    _check_number(flag, value, facts, "be auto, or " * ("'auto'" in str(declared.type)))
            if facts.path and isinstance(values, str | tuple):
                at_home = expanduser(values) if isinstance(values, str) else tuple(map(expanduser, values))
                object.__setattr__(self, declared.name, at_home)

    def require_acting(self) -> None:
        """Raises UserError for an option that is given and cannot act beside the others."""
        own: Any = type(self)
        for name, facts in facts_of(own).items():
            if facts.needs is not None and getattr(self, name) != facts.default:
                require(facts.needs.are_met(self), f"--{name} acts with {facts.needs.words}")


def _check_number(flag: str, value: float, facts: Facts, auto: str) -> None:
    within = (facts.least is None or value >= facts.least) and (facts.most is None or value <= facts.most)
    fits = within and (facts.above is None or value > facts.above) and (facts.below is None or value < facts.below)
    is_large = isinstance(value, int) and facts.most is None and value > MOST
    if not fits:
        require(False, f"{flag} must {auto}{facts.range()}, not {str(value)[:40]}")
    elif isinstance(value, float):
        require(isfinite(value), f"{flag} must {auto}be a finite number, not {value}")
    require(not is_large, f"{flag} must be at most {MOST}, not {str(value)[:40]}")


def check_text(flag: str, text: str, path: bool = False) -> None:
    """Refuses U+0000 and halves of surrogate pairs, except those that stand for bytes of a path that are not UTF-8."""
    for letter in text:
        escaped = path and "\udc80" <= letter <= "\udcff"
        if letter == "\0" or ("\ud800" <= letter <= "\udfff" and not escaped):
            raise UserError(f"{flag}: holds \\u{ord(letter):04x}, which is no character of a text: take it out")


def check_path(flag: str, name: str) -> None:
    """Refuses a name that is longer than file systems take."""
    encoded = os.fsencode(name)
    long = len(encoded) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in encoded.split(os.sep.encode()))
    require(not long or "://" in name, f"{flag} {name[:40]}...: {len(name)} characters are too many for a file's name")
