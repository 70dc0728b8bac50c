"""Checkpoints: safetensors and JSON, never a pickle; written under a temporary name, synced, renamed.

A checkpoint folder holds model.safetensors (the trained parameters by name), optimizer.safetensors, ema.safetensors
where there is an average, and state.json with everything that is a number. No random state: every draw is keyed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpl.errors import UserError

PATTERN = re.compile(r"checkpoint-(\d+)")
STATE = "state.json"


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
    ema: EMAModel | None,
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
    tensors, numbers = _split_optimizer(optimizer.state_dict())
    _save(tensors, temporary / "optimizer.safetensors")
    state = state | {"step": step, "optimizer": numbers}
    if ema is not None:
        _save(dict(zip(parameters, ema.shadow_params, strict=True)), temporary / "ema.safetensors")
        state["ema"] = {k: v for k, v in ema.state_dict().items() if k != "shadow_params"}
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
    path: Path, parameters: Mapping[str, Tensor], optimizer: Any, ema: EMAModel | None
) -> dict[str, Any]:
    """Restores parameters, optimizer and average in place; returns the rest of what was kept.

    Raises:
        UserError: a damaged checkpoint, one of another model, or of a run with another EMA setting.
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
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    if ema is not None:
        device = ema.shadow_params[0].device
        ema.load_state_dict(state.pop("ema") | {"shadow_params": [shadow[name].to(device) for name in parameters]})
    optimizer.load_state_dict(_join_optimizer(tensors, state.pop("optimizer")))
    return state


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors named "<parameter>.<field>" and the rest, which JSON can hold."""
    tensors, numbers = {}, {}
    for index, fields in state["state"].items():
        for name, value in fields.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def _join_optimizer(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["numbers"].items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}
