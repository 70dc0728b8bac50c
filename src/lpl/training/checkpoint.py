"""Checkpoints: safetensors and JSON, never a pickle; written under a temporary name, synced, renamed.

A checkpoint folder holds model.safetensors (the trained parameters by name), optimizer.safetensors, ema.safetensors
where there is an average, and state.json with everything that is a number. No random state: every draw is keyed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpl.errors import UserError
from lpl.training.ema import Average
from lpl.training.optimizers import bare, label

PATTERN = re.compile(r"checkpoint-(\d+)")
STATE = "state.json"
GROUP = "group"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's folder, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := PATTERN.fullmatch(p.name))]
    return [path for _, path in sorted(found) if (path / STATE).is_file()]


def find_checkpoint(folder: Path, choice: str | None) -> Path | None:
    """The checkpoint to go on from: the newest of the run, or the one that --resume_from_checkpoint names.

    Raises:
        UserError: a named checkpoint that is not there or not complete.
    """
    if choice is None or choice == "latest":
        found = list_checkpoints(folder)
        return found[-1] if found else None
    for path in (Path(choice), folder / choice):
        if (path / STATE).is_file():
            return path
    names = ", ".join(p.name for p in list_checkpoints(folder)) or "none"
    raise UserError(f"--resume_from_checkpoint {choice}: no complete checkpoint there; {folder} has {names}")


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: Any,
    ema: Average | None,
    state: dict[str, Any],
    total_limit: int | None,
) -> Path:
    """Writes folder/checkpoint-<step>; older ones beyond total_limit go only after the new one is in place.

    Args:
        folder: the run's output folder.
        step: optimizer steps done.
        parameters: the trained parameters by name.
        optimizer: a torch optimizer over those parameters in that order.
        ema: their average, or None.
        state: plain numbers to keep: schedule, weight, scaler.
        total_limit: how many checkpoints to keep.
    """
    final = folder / f"checkpoint-{step}"
    temporary = folder / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _save(parameters, temporary / "model.safetensors")
    tensors, numbers = split_optimizer(optimizer.state_dict())
    _save(tensors, temporary / "optimizer.safetensors")
    state = state | {"step": step, "optimizer": numbers | {"class": label(bare(optimizer))}}
    if ema is not None:
        _save(dict(zip(parameters, ema.shadow_params, strict=True)), temporary / "ema.safetensors")
        state["ema"] = ema.numbers()
    (temporary / STATE).write_text(json.dumps(state))
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(folder)
    if total_limit is not None:
        older = [path for path in list_checkpoints(folder) if path != final]
        for old in older[: max(0, len(older) + 1 - total_limit)]:
            shutil.rmtree(old)
    return final


def load_checkpoint(
    path: Path, parameters: Mapping[str, Tensor], optimizer: Any, ema: Average | None
) -> dict[str, Any]:
    """Restores parameters, optimizer and average in place; returns the rest of what was kept.

    Raises:
        UserError: a damaged checkpoint, one of another model or optimizer, or of a run with another EMA setting.
    """
    try:
        state = json.loads((path / STATE).read_text())
        saved = load_file(path / "model.safetensors")
        tensors = load_file(path / "optimizer.safetensors")
        shadow = load_file(path / "ema.safetensors") if "ema" in state else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it to go on from the checkpoint before it") from error
    if list(saved.keys() - parameters.keys()) or list(parameters.keys() - saved.keys()):
        raise UserError(
            f"{path}: holds other parameters than this run trains (another model, --rank, --lora_targets or --use_dora)"
        )
    if (ema is None) != ("ema" not in state):
        raise UserError(f"{path}: was written {'with' if ema is None else 'without'} --use_ema")
    kept = state.pop("optimizer")
    _check_same_optimizer(path, kept, optimizer)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    if ema is not None:
        ema.load(state.pop("ema"), [shadow[name] for name in parameters])
    optimizer.load_state_dict(join_optimizer(tensors, kept))
    return state


def _check_same_optimizer(path: Path, kept: dict[str, Any], optimizer: Any) -> None:
    own = label(bare(optimizer))
    if kept.get("class", own) != own:
        raise UserError(f"{path}: holds the state of {kept['class']}, not of this run's {own}: see --optimizer")
    sizes = [[len(group["params"]) for group in groups] for groups in (kept["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise UserError(f"{path}: groups parameters as {sizes[0]}, this run as {sizes[1]}: see --decay_all")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors named "<parameter>.<field>" or "group<n>.<field>", and the rest as for JSON.

    A field that is a mapping, as bitsandbytes has them, becomes fields "<field>/<key>".

    Raises:
        TypeError: state that is neither a plain tensor nor what JSON can hold.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    groups: list[dict[str, Any]] = [{} for _ in state["param_groups"]]
    owners = [*state["state"].items(), *((f"{GROUP}{i}", group) for i, group in enumerate(state["param_groups"]))]
    for key, value in ((f"{owner}.{name}", v) for owner, own in owners for name, v in _flat(own)):
        owner, name = key.split(".", 1)
        if type(value) in (Tensor, torch.nn.Parameter):
            tensors[key] = value
        elif not _is_plain(value):
            raise TypeError(f"its state has {name}, a {type(value).__name__}, which checkpoints cannot hold")
        elif owner.startswith(GROUP):
            groups[int(owner.removeprefix(GROUP))][name] = value
        else:
            numbers[key] = value
    return tensors, {"numbers": numbers, "param_groups": groups}


def join_optimizer(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """What split_optimizer took apart."""
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = [{} for _ in rest["param_groups"]]
    for group, kept in zip(groups, rest["param_groups"], strict=True):
        for name, value in kept.items():
            _put(group, name, value)
    for key, value in [*tensors.items(), *rest["numbers"].items()]:
        owner, name = key.split(".", 1)
        if owner.startswith(GROUP):
            _put(groups[int(owner.removeprefix(GROUP))], name, value)
        else:
            _put(state.setdefault(int(owner), {}), name, value)
    return {"state": state, "param_groups": groups}


def _flat(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", v) for inner, v in _flat(value))
        else:
            yield name, value


def _put(fields: dict[str, Any], name: str, value: Any) -> None:
    *outer, last = name.split("/")
    for part in outer:
        fields = fields.setdefault(part, {})
    fields[last] = value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
