"""docs/options.md from the declarations of the options: `python tools/options_page.py` writes it."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

from lpl.config import TrainConfig, declared
from lpl.config.help import texts_of

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """# Options of `lpl train`

Flags, keys of `--config` files and of `config.yaml` have the same names. Made by `make options` from the
declarations of the options in `src/lpl/config`. `lpl cache`, `plan`, `data`, `check` and `compare` take them, too.

*Range*: bounds, ends included except for "between", "above" and "below". *Needs*: what it needs to have an effect.
*Resume*: whether an unfinished run may be continued with another value: yes, or `=` where batch size, accumulation and
processes must give the same number of samples a step; elsewhere only with `--allow_changes`.
"""


def shown(value: Any) -> str:
    """A default as one would write it."""
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def row(name: str, default: Any, kind: str, text: str) -> str:
    """The line of an option."""
    facts = declared()[name]
    bounds = facts.range().replace("be ", "").replace("lie ", "")
    if kind.startswith("Literal"):
        bounds = ", ".join(
            f"`{choice}`" for choice in ast.literal_eval(kind.split("]")[0].removeprefix("Literal") + "]")
        )
    resume = "yes" if facts.free else "=" if facts.divides else ""
    cells = [f"`{name}`", shown(default), bounds, text, facts.needs.words if facts.needs else "", resume]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for group in TrainConfig().groups():
        text = texts_of(type(group))
        parts.append(f"\n## {(type(group).__doc__ or '').splitlines()[0].rstrip('.')}\n")
        parts.append("| option | default | range | what | needs | resume |\n|---|---|---|---|---|---|")
        parts += [row(f.name, getattr(group, f.name), str(f.type), text[f.name]) for f in fields(group)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
