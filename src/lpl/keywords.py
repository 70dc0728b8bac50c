"""`key=value, ...` as users write it in an option: literal values, nothing is run."""

from __future__ import annotations

import ast
from typing import Any

from lpl.errors import UserError


def parse_keywords(flag: str, text: str | None) -> dict[str, Any]:
    """The keywords of a text such as `d_coef=2.0, betas=(0.9, 0.99)`; values are Python literals (ast.literal_eval).

    Args:
        flag: the option that it was given to, for the message.
        text: None is the same as an empty text.

    Raises:
        UserError: anything but keywords with literal values, or one given twice.
    """
    if not text:
        return {}
    expected = f"--{flag} {text}: expected key=value, ... with numbers, True, False, None, 'texts' or (tuples)"
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise UserError(expected)
        found = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError) as error:
        raise UserError(expected) from error
    if len(found) != len(call.keywords):
        raise UserError(f"{expected}, each once")
    return found
