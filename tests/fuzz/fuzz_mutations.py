"""What may have happened to a file: bytes, types, depth, encodings and sizes; the same number, the same change."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

DEEP = 100_000
TALL = '"a number of four hundred digits"'
OVER = '"a number beyond all floats"'
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, OVER, float("nan"), "x", [], {}, "y" * 20_000, TALL, "a\ud800", "a\x00b", "../../x",
    1e308, 5e-324, "z" * 256, "\u202e\x1b[2J", [1, "a", None], {"a": {"b": 1}}, 2**31, 1e7,
)  # fmt: skip
"""What is put in the place of a value of JSON."""
PLACED = ("\x00", "\x1b[31m", "\ud800", "\\ud800", "\\u0000", "\u202e", "\u2028", "\n", "'", '"', "{", "[", ": ", "*a")
Mutation = Callable[[bytes, random.Random], bytes]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Up to four bytes are others."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found)


def cut(content: bytes, rng: random.Random) -> bytes:
    """The file ends earlier, or not even begins."""
    return content[: rng.choice([0, 1, 7, rng.randrange(len(content))])]


def without_part(content: bytes, rng: random.Random) -> bytes:
    """A part is missing."""
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randint(1, 64) :]


def with_part(content: bytes, rng: random.Random) -> bytes:
    """A part is there twice, or zeros are between."""
    start = rng.randrange(len(content))
    part = rng.choice([bytes(rng.randint(1, 64)), content[start : start + rng.randint(1, 64)], rng.randbytes(8)])
    return content[:start] + part + content[start:]


def with_letters(content: bytes, rng: random.Random) -> bytes:
    """Characters that mean something to somebody."""
    start = rng.randrange(len(content))
    return content[:start] + rng.choice(PLACED).encode("utf-8", "surrogatepass") + content[start:]


def encoded(content: bytes, rng: random.Random) -> bytes:
    """Another encoding."""
    text = content.decode("utf-8", "replace") + "\u00e9"
    return text.encode(rng.choice(["utf-16", "utf-16-le", "latin-1", "utf-8-sig", "utf-32", "cp037"]), "replace")


def nested(content: bytes, rng: random.Random) -> bytes:
    """Deeper than anybody reads."""
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ("- ", "")])
    deep = rng.choice([opening * DEEP, opening * DEEP + "1" + closing * DEEP]).encode()
    lines = content.split(b"\n")
    lines[rng.randrange(len(lines))] = deep
    return rng.choice([deep, b"\n".join(lines)])


def grown(content: bytes, rng: random.Random) -> bytes:
    """A word, a line or a number that is far too long."""
    start = rng.randrange(len(content))
    part = rng.choice([b"w" * 20_000, b"n" * 256, b"9" * 5000, b"\n" * 5000, b" " * 100_000, "\u0301".encode() * 9000])
    return content[:start] + part + content[start:]


def changed_json(content: bytes, rng: random.Random) -> bytes:
    """Of JSON, or of a line of it, one value is another, a key is missing, or has another name."""
    try:
        return _changed(content, rng)
    except ValueError:
        lines = content.split(b"\n")
        place = rng.randrange(len(lines))
        try:
            lines[place] = _changed(lines[place], rng)
        except ValueError:
            return changed_lines(content, rng)
        return b"\n".join(lines)


def _changed(content: bytes, rng: random.Random) -> bytes:
    value = json.loads(content)
    places = [([], value), *_places(value, [])]
    path, _ = rng.choice(places)
    if not path:
        value = rng.choice(VALUES)
    else:
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        how = rng.random()
        if how < 0.75:
            owner[path[-1]] = rng.choice(VALUES)
        elif how < 0.9 or isinstance(owner, list):
            del owner[path[-1]]
        else:
            owner[rng.choice(["", "x" * 300, "a/b", "__class__"])] = owner.pop(path[-1])
    text = json.dumps(value).replace(json.dumps(TALL), "9" * 400).replace(json.dumps(OVER), "1e400")
    return text.encode()


def _places(value: Any, path: list[Any]) -> list[tuple[list[Any], Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in items:
        found += [([*path, key], item), *_places(item, [*path, key])]
    return found


def changed_lines(content: bytes, rng: random.Random) -> bytes:
    """Of lines of `key: value` one has another value, or is there twice."""
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    key, colon, _ = lines[place].partition(b":")
    values = [
        "null",
        "-1",
        "0",
        "1e400",
        ".nan",
        "100000000",
        "[1]",
        "{}",
        "x",
        '"\\ud800"',
        '"\\0"',
        "9" * 400,
        "&a [*a]",
    ]
    values += ["z" * 256, "2024-13-45", "true", "''", "!!python/object:os.system x", "<<: 1"]
    lines[place] = key + colon + b" " + rng.choice(values).encode()
    return b"\n".join(lines + ([lines[place]] if rng.random() < 0.1 else []))


def changed_header(content: bytes, rng: random.Random) -> bytes:
    """Of a safetensors file, the header is changed as JSON, and its length is right, or the length is wrong."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        return rng.choice([0, 2**63, 2**40, length - 1, length + 1]).to_bytes(8, "little") + content[8:]
    header = rng.choice([changed_json, changed_json, nested])(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


BYTES: tuple[Mutation, ...] = (flipped, cut, without_part, with_part)
TEXT: tuple[Mutation, ...] = (*BYTES, with_letters, encoded, nested, grown)
JSON: tuple[Mutation, ...] = (
    changed_json,
    nested,
    changed_json,
    with_letters,
    changed_json,
    grown,
    changed_json,
    *BYTES,
    encoded,
)
YAML: tuple[Mutation, ...] = (changed_lines, nested, changed_lines, with_letters, changed_lines, grown, *BYTES, encoded)
TENSORS: tuple[Mutation, ...] = (changed_header, *BYTES, changed_header)


def mutated(content: bytes, ways: tuple[Mutation, ...], kind: str, number: int) -> tuple[str, bytes]:
    """The change of this number, by name, and the file after it."""
    rng = random.Random(f"{kind} {number}")
    way = ways[number % len(ways)]
    return way.__name__, way(content, rng)
