"""Measures the code: size, imports between packages ("rooms"), files per option's name, the loss's stack depth.

    python tools/house.py [--frames] [--options] [--edges]

--frames also trains two steps of a tiny model, to count the frames of src on the stack where the loss is called;
--options lists every option, --edges every upward import and every circle.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src"
ROOMS = (
    "base", "diffusion", "perceptual", "presets", "config", "data", "families", "training", "evaluation", "report",
    "analysis", "comparison", "demo", "cli", "__main__",
)  # fmt: skip
"""Packages and modules of lpl from low to high level: none may import one to its right."""
OPTIONS = re.compile(r"\w+(Config|Options)")
"""Data classes whose fields are options."""
STRUCTURE = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
COUNT_FRAMES = """
import os, runpy, sys
import lpl
from lpl import LatentPerceptualLoss
folder, call = os.path.dirname(lpl.__file__), LatentPerceptualLoss.__call__
def counted(*args, **keywords):
    frame, seen = sys._getframe(1), []
    while frame is not None:
        if frame.f_code.co_filename.startswith(folder):
            seen.append(os.path.relpath(frame.f_code.co_filename, folder) + ":" + frame.f_code.co_name)
        frame = frame.f_back
    print("frames", *reversed(seen))
    return call(*args, **keywords)
LatentPerceptualLoss.__call__ = counted
sys.argv[0] = "lpl"
runpy.run_module("lpl", run_name="__main__", alter_sys=True)
"""


def docstring_lines(tree: ast.Module) -> set[int]:
    """Lines of docstrings, including those of fields: every expression statement that is a string."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def import_lines(text: str) -> int:
    """Lines of imports."""
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in found)


def code_lines(text: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in STRUCTURE and token.type != tokenize.COMMENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(text)))


def module_of(file: Path) -> str:
    """The dotted name of a file's module."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Modules of lpl that a module imports, anywhere: at its top, in functions, for types."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                target = name if name in known else node.module
                if target in known and target != module:
                    yield target


def room_of(module: str) -> str:
    """The room of a module; empty for lpl itself, which only exports names."""
    return module.partition(".")[2].partition(".")[0]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            start = stack.index(node)
            found.append(sorted(stack[start:]))
            del stack[start:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return [nodes for nodes in found if len(nodes) > 1]


class Edges(NamedTuple):
    """How modules and rooms import each other."""

    number: int
    module_circles: list[list[str]]
    room_circles: list[list[str]]
    upwards: list[tuple[str, str]]
    """(importing, imported), where the imported room is later in ROOMS."""


def read_edges(trees: dict[str, ast.Module]) -> Edges:
    """How the modules, by name, import each other; every import counts, also those in functions."""
    graph = {module: set(imports(module, tree, set(trees))) for module, tree in trees.items()}
    unplaced = {room_of(module) for module in graph} - {"", *ROOMS}
    if unplaced:
        sys.exit(f"ROOMS lacks {', '.join(sorted(unplaced))}")
    rank = {room: number for number, room in enumerate(ROOMS)} | {"": -1}
    edges = [(a, b) for a in sorted(graph) for b in sorted(graph[a]) if room_of(a)]
    among_rooms: dict[str, set[str]] = {room: set() for room in rank}
    for a, b in edges:
        among_rooms[room_of(a)] |= {room_of(b)} - {room_of(a), ""}
    upwards = [(a, b) for a, b in edges if rank[room_of(b)] > rank[room_of(a)]]
    return Edges(len(edges), circles(graph), circles(among_rooms), upwards)


def read_trees() -> dict[str, ast.Module]:
    """Every module of lpl, parsed."""
    return {module_of(file): ast.parse(file.read_text()) for file in sorted((SOURCE / "lpl").rglob("*.py"))}


def option_names(trees: dict[str, ast.Module]) -> list[str]:
    """Fields of the data classes of options, except those that are groups of other options."""
    found: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and OPTIONS.fullmatch(node.name) and node.decorator_list:
                fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
                found |= {
                    field.target.id
                    for field in fields
                    if isinstance(field.target, ast.Name) and not OPTIONS.fullmatch(ast.unparse(field.annotation))
                }
    return sorted(found)


def spread(name: str, texts: dict[str, str]) -> int:
    """Number of files in which a name occurs."""
    word = re.compile(rf"\b{name}\b")
    return sum(bool(word.search(text)) for text in texts.values())


def count_frames() -> list[str]:
    """Frames of src, outermost first, where `lpl train` calls the loss."""
    from same_cases import TRAIN, write_inputs

    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder) / "inputs", REPOSITORY)
        argv = [*TRAIN, "--max_train_steps=2", "--output_dir=out", "--latent_cache_dir=cache", "--report_to=none"]
        given = dict(word.split("=", 1) for word in argv)
        environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", COUNT_FRAMES, "train", *(f"{name}={value}" for name, value in given.items())]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("frames ")]
    if done.returncode or not lines:
        sys.exit(f"the loss was not called: {done.stderr[-2000:]}")
    return max(lines, key=len).split()[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("frames", "options", "edges"):
        parser.add_argument(f"--{name}", action="store_true")
    asked = parser.parse_args()
    files = sorted((SOURCE / "lpl").rglob("*.py"))
    texts = {module_of(file): file.read_text() for file in files}
    trees = {module: ast.parse(text) for module, text in texts.items()}
    lengths = {module: text.count("\n") for module, text in texts.items()}
    longest = max(lengths, key=lambda module: lengths[module])
    code, imported = sum(map(code_lines, texts.values())), sum(map(import_lines, texts.values()))
    print(f"lines              {sum(lengths.values()):,}; of code {code - imported:,}, of imports {imported:,}")
    print(f"files              {len(files)}; longest {longest}, {lengths[longest]} lines")

    built = read_edges(trees)
    modules, rooms = built.module_circles, built.room_circles
    told = (
        f"{len(modules)} of modules ({sum(map(len, modules))} in them), {len(rooms)} of rooms ({sum(map(len, rooms))})"
    )
    print(f"circles            {told}\nupward imports     {len(built.upwards)} of {built.number}")
    if asked.edges:
        print(
            "\n".join(
                [*(f"  circle: {', '.join(c)}" for c in modules + rooms), *(f"  {a} -> {b}" for a, b in built.upwards)]
            )
        )

    found = {name: spread(name, texts) for name in option_names(trees)}
    print(f"options            {len(found)}; files in which a name stands: median {median(found.values()):g}, "
          f"most {max(found.values())}, more than two {sum(count > 2 for count in found.values())}")  # fmt: skip
    if asked.options:
        print("\n".join(f"  {count:3} {name}" for name, count in sorted(found.items(), key=lambda item: -item[1])))
    tests = [file.read_text() for file in (REPOSITORY / "tests").rglob("*.py")]
    print(f"tests              {sum(text.count(chr(10)) for text in tests):,} lines in {len(tests)} files")
    if asked.frames:
        frames = count_frames()
        print(f"frames             {len(frames)} at LatentPerceptualLoss.__call__\n  " + "\n  ".join(frames))


if __name__ == "__main__":
    main()
