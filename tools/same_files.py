"""How same_results.py compares two folders: each file as named values, only a few of which may differ."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

IGNORED = re.compile(
    r"environment|.*seconds.*|samples_per_second|header (modelspec\.date|ss_training_.*)|"
    r".*_(comfyui|kohya|lora_weights)\.safetensors"
)
"""Keys of JSON and YAML, of files' headers and of logs, for times, places and speeds (the last pattern: digests of
files whose headers have a date or no fixed order); only their presence is compared."""
TEXT: tuple[tuple[str, str], ...] = (
    (r"\x1b\[\w|(?<=\S)\s*\n {8,}(?=\S)", " "),
    (r"\b\d+(\.\d+)? s\b", "TIME"),
    (r"Written \d{4}-\d\d-\d\d \d\d:\d\d", "Written DATE"),
    (r'(<th scope="row">git</th><td>)[^<]*', r"\1COMMIT"),
    (r"<figure(?:(?!</figure>)[\s\S])*(?:over training time|per second)(?:(?!</figure>)[\s\S])*", "<figure of times"),
)
"""Patterns and their replacements before texts are compared; line wraps are removed, since they depend on times."""
MOMENT = re.compile(r"(?<=tfevents\.).*|\b\d{10}(\.\d+)?\b")
"""Times in names of TensorBoard's files and folders."""
RENAMED: dict[str, str] = {}
"""Keys, and parts of names of files, as the older commit has them -> as they are now."""
ADDED = frozenset({
    *("mode_scale", "timestep_shift", "lora_weights", "merge_lora_weights", "quantize_base", "offload_text_encoders"),
    "offload_blocks",
    "draws_per_image",
    *(f"metadata_{name}" for name in ("author", "description", "license", "tags", "trigger_phrase", "title")),
})  # fmt: skip
"""Options that the older commit lacks, which are not compared."""
TEXTS = (".stdout", ".stderr", ".html", ".md")
"""Files for readers: left out by --no_text."""
PROGRESS = re.compile(r"\d+%\||\?it/s|\d(it|s| examples)/(s|it)")
"""Lines of progress bars."""
SHOWN = 120
"""Characters of a value that are printed."""
Values = dict[str, Any]


class Difference(NamedTuple):
    """A value that differs, and how."""

    file: str
    key: str
    what: str


def flat(value: Any, key: str = "") -> Values:
    """Nested JSON as path -> value."""
    if isinstance(value, dict):
        parts = [(RENAMED.get(str(name), str(name)), part) for name, part in value.items() if name not in ADDED]
    elif isinstance(value, list):
        parts = [(str(number), part) for number, part in enumerate(value)]
    else:
        return {key: repr(value)}
    found = {} if parts else {key: repr(value)}
    for name, part in parts:
        found |= {f"{key}/{name}": "..."} if IGNORED.fullmatch(name) else flat(part, f"{key}/{name}")
    return found


def read_tensors(file: Path) -> Values:
    """The tensors of a file, and its header's metadata."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        header = {f"header {key}": value for key, value in (opened.metadata() or {}).items()}
        header = {key: "..." if IGNORED.fullmatch(key) else value for key, value in header.items()}
        return header | {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def read_events(file: Path) -> Values:
    """TensorBoard's values by name and step; times are replaced by "..."."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: Values = {}
    for event in LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            content = value.simple_value if value.HasField("simple_value") else value.WhichOneof("value")
            found[f"{value.tag} {event.step}"] = "..." if IGNORED.fullmatch(value.tag) else repr(content)
    return found


def read_lines(text: str) -> Values:
    """Lines by number, without progress bars, after the replacements of TEXT."""
    for pattern, instead in TEXT:
        text = re.sub(pattern, instead, text)
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip() and not PROGRESS.search(line)]
    return {f"line {number}": line for number, line in enumerate(lines, 1)}


READERS: dict[str, Callable[[Path], Values]] = {
    ".safetensors": read_tensors,
    ".json": lambda file: flat(json.loads(file.read_text())),
    ".jsonl": lambda file: flat([json.loads(line) for line in file.read_text().splitlines()]),
    ".yaml": lambda file: flat(yaml.safe_load(file.read_text())),
    ".yml": lambda file: flat(yaml.safe_load(file.read_text())),
}
"""By file suffix; other files are compared as text if they can be decoded, else as bytes."""


def read(file: Path) -> Values:
    """The values of a file."""
    if "events.out.tfevents" in file.name:
        return read_events(file)
    if file.suffix in READERS:
        return READERS[file.suffix](file)
    content = file.read_bytes()
    try:
        return read_lines(content.decode())
    except UnicodeDecodeError:
        return {"content": content}


def files_of(folder: Path, text: bool) -> dict[str, Path]:
    """Files by name; names of TensorBoard's files without time, computer and process."""
    found: dict[str, Path] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix in TEXTS and not text:
            continue
        name = "/".join(RENAMED.get(part, part) for part in name.split("/"))
        name = MOMENT.sub("MOMENT", name)
        while name in found:
            name += "+"
        found[name] = file
    return found


def difference(before: Any, now: Any) -> str | None:
    """How two values differ; None where they are equal in every bit."""
    if isinstance(before, str | bytes) or isinstance(now, str | bytes):
        if before == now:
            return None
        if isinstance(before, str) and isinstance(now, str):
            pairs = enumerate(zip(before, now, strict=False))
            first = max(next((place for place, (a, b) in pairs if a != b), 0) - 30, 0)
            return f"{before[first:][:SHOWN]} -> {now[first:][:SHOWN]}"
        return "other bytes"
    import torch

    if before.dtype != now.dtype or before.shape != now.shape:
        return f"{before.dtype} {tuple(before.shape)} -> {now.dtype} {tuple(now.shape)}"
    if torch.equal(before.contiguous().view(-1).view(torch.uint8), now.contiguous().view(-1).view(torch.uint8)):
        return None
    return f"differs by {float((before.double() - now.double()).abs().max()):.3g} at most"


def differences(older: Path, newer: Path, text: bool = True) -> tuple[list[Difference], int]:
    """What differs between two folders, and how many files were compared."""
    sides = files_of(older, text), files_of(newer, text)
    found, compared = [], 0
    for name in sorted(sides[0].keys() | sides[1].keys()):
        missing = [side for side, files in zip(("older", "newer"), sides, strict=True) if name not in files]
        if missing:
            found.append(Difference(name, "file", f"missing in the {missing[0]}"))
            continue
        compared += 1
        if filecmp.cmp(sides[0][name], sides[1][name], shallow=False):
            continue
        before, now = read(sides[0][name]), read(sides[1][name])
        for key in [*before, *(key for key in now if key not in before)]:
            if key not in before or key not in now:
                what = f"{'new' if key not in before else 'gone'}: {str((before | now)[key])[:SHOWN]}"
            else:
                what = difference(before[key], now[key]) or ""
            if what:
                found.append(Difference(name, key, what))
    return found, compared


def self_test(folder: Path) -> bool:
    """Writes a file of each kind, changes one value of each in a copy, and prints which changes were found."""
    import torch
    from safetensors.torch import load_file, save_file
    from torch.utils.tensorboard import SummaryWriter

    def log(folder: Path, loss: float) -> None:
        with SummaryWriter(str(folder / "logs")) as writer:
            writer.add_scalar("loss", loss, 1)
            writer.add_scalar("samples_per_second", loss, 1)

    older, newer = folder / "older", folder / "newer"
    older.mkdir()
    save_file({"weight": torch.ones(3), "half": torch.ones(3, dtype=torch.bfloat16)}, older / "w.safetensors")
    texts = {
        "result.json": '{"a": [{"loss": 0.1}], "seconds": 1.5}',
        "validation.jsonl": '{"step": 1}\n{"step": 2}\n',
        "config.yaml": "rank: 2\n",
        "0-train.stdout": "trained 10 samples\n",
    }
    for name, content in texts.items():
        (older / name).write_text(content)
    (older / "picture.png").write_bytes(b"\x89PNG\xff\x00")
    shutil.copytree(older, newer)
    log(older, 0.5)
    log(newer, 0.5)
    unchanged = differences(older, newer)[0]
    shutil.rmtree(newer / "logs")
    tensors = load_file(newer / "w.safetensors")
    tensors["half"].view(torch.int16)[2] += 1
    tensors["weight"].view(torch.int32)[1] += 1
    save_file(tensors, newer / "w.safetensors")
    for name, was, now in (
        ("result.json", "0.1", "0.10000000000000002"),
        ("validation.jsonl", "2}", "3}"),
        ("config.yaml", "2", "3"),
        ("0-train.stdout", "10", "11"),
    ):
        (newer / name).write_text(texts[name].replace(was, now))
    (newer / "picture.png").write_bytes(b"\x89PNG\xff\x01")
    (newer / "more.txt").write_text("a file of its own")
    log(newer, 0.50000006)
    seen = differences(older, newer)[0]
    for item in seen:
        print(f"seen: {item.file}: {item.key}: {item.what}")
    missed = {"w.safetensors", *texts, "picture.png", "more.txt"} - {item.file for item in seen}
    told = [item for item in seen if "tfevents" in item.file]
    print(f"missed: {sorted(missed) or 'nothing'}; of equal folders {len(unchanged)} differences")
    return not missed and not unchanged and len(told) == 1 and len(seen) == len(texts) + 5
