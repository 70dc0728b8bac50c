"""docs/troubleshooting.md quotes messages that are there: each part between what differs is a text in the package."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
OTHERS = "ComfyUI"
"""A message of another program, in whose line its name stands."""


def literals() -> list[str]:
    """Texts in the package: each whole, with a mark for what is put in."""
    found = []
    for file in (ROOT / "src" / "lpl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.0-9]*[sdgf]", "…", node.value).replace("%%", "%"))
    return found


def test_every_message_is_one_of_the_package() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^|]+)`((?: \(\w+\))?) \|", page, re.M)
    assert len(messages) > 40
    texts = literals()
    for message, whose in messages:
        parts = [part.strip() for part in message.split("…") if re.search(r"\w{2}", part)]
        missing = [part for part in parts if not any(part in text for text in texts)]
        assert parts
        assert OTHERS in whose or not missing, (message, missing)
