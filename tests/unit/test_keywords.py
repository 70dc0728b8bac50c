"""Keywords as texts: literal values and nothing else."""

import math

import pytest

from lpl.base.errors import UserError
from lpl.base.text import parse_keywords


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("d_coef=2", {"d_coef": 2}),
        ("a=1e-3,b=(0.9, 0.99), c=None,d=True,e='x,y',f=-1", {
            "a": 1e-3, "b": (0.9, 0.99), "c": None, "d": True, "e": "x,y", "f": -1,
        }),
        ("growth_rate=1e999", {"growth_rate": math.inf}),
    ],
)  # fmt: skip
def test_literals(text, expected):
    assert parse_keywords("optimizer_args", text) == expected


@pytest.mark.parametrize(
    "text",
    ["d_coef", "d_coef=", "a=b", "a=__import__('os')", "**{'a': 1}", "1", "a=1)(b=2", "a=1)+(b=2", "a=1, a=2",
     "a=1;b=2", "a = [x for x in (1,)]"],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"--optimizer_args .*: expected key=value") as caught:
        parse_keywords("optimizer_args", text)
    assert "\n" not in str(caught.value)
