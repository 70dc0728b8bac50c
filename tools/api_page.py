"""docs/api.md from the docstrings of the public names: `python tools/api_page.py` writes it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import lpl

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# Public names

`from lpl import ...`. Made by `make api` from the docstrings; how to use them together: [library](library.md).
Latents are (B, C, *space), in model space unless stated otherwise.
"""
LONGEST = 110
CALLS = {"PerceptualObjective": "objective", "LatentPerceptualLoss": "loss_fn"}
"""Variable names of objects of these classes, for their calls."""


def signature(name: str, function: Any) -> str:
    """The call as in the source, with one argument per line where it is long."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef)
    own = [*node.args.posonlyargs, *node.args.args]
    defaults: list[ast.expr | None] = [*[None] * (len(own) - len(node.args.defaults)), *node.args.defaults]
    words = [_word(a, d) for a, d in zip(own, defaults, strict=True) if a.arg not in ("self", "cls")]
    if node.args.kwonlyargs:
        words.append("*")
        words += [_word(a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    returned = "" if node.returns is None or function.__name__ == "__init__" else f" -> {ast.unparse(node.returns)}"
    line = f"{name}({', '.join(words)}){returned}"
    if len(line) > LONGEST:
        line = f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){returned}"
    return f"```python\n{line}\n```\n"


def _word(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + ("" if default is None else f" = {ast.unparse(default)}")


def text_of(thing: Any) -> str:
    """The docstring unchanged, so that formulas and arguments keep their columns."""
    return f"```text\n{inspect.getdoc(thing)}\n```\n"


def fields_of(thing: Any) -> str:
    """The fields of a named tuple or a dataclass, each with the text under it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0].body  # type: ignore[attr-defined]
    lines = []
    for number, node in enumerate(body):
        if isinstance(node, ast.AnnAssign):
            after = body[number + 1 : number + 2]
            text = ast.literal_eval(after[0].value) if after and isinstance(after[0], ast.Expr) else ""
            default = "" if node.value is None else f" = {ast.unparse(node.value)}"
            lines.append(f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}{default}")
            lines += [f"    {line.strip()}" for line in str(text).splitlines()]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def entry(name: str) -> str:
    """The page's entry for a public name."""
    thing, lines = getattr(lpl, name), [f"\n## {name}\n"]
    if not inspect.isclass(thing):
        return "\n".join([*lines, signature(name, thing), text_of(thing)])
    generated = hasattr(thing, "_fields") or is_dataclass(thing)
    if "__init__" in vars(thing) and not generated and not getattr(thing, "_is_protocol", False):
        lines.append(signature(name, thing.__init__))
    lines.append(text_of(thing))
    if generated:
        lines.append(fields_of(thing))
    for method, function in vars(thing).items():
        call = CALLS.get(name, "") if method == "__call__" else method
        if call and not call.startswith("_") and inspect.isfunction(function) and inspect.getdoc(function):
            lines += [f"### {name}: {call}\n", signature(call, function), text_of(function)]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    names = [name for name in lpl.__all__ if not name.startswith("__")]
    return HEAD + "".join(entry(name) for name in names)


if __name__ == "__main__":
    PAGE.write_text(page())
