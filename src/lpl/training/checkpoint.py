"""Checkpoints: safetensors and JSON, never a pickle; written under a temporary name, synced, renamed.

A checkpoint folder holds model.safetensors (the trained parameters by name), optimizer.safetensors, ema.safetensors
where there is an average, state.json with everything that is a number, and manifest.json with sizes and checksums of
the other files, by which damage is recognised. No random state: every draw is keyed.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpl.base.errors import TrainingStoppedError, UserError, on_one_line
from lpl.base.files import sync_file as sync
from lpl.base.json_files import ANY, REST, TEXT, WHOLE, Shape, read_object, require_shape, whole
from lpl.config.run_folder import (
    CHECKPOINT,
    PATTERN,
    RESULT,
    STATE,
    damage,
    last_checkpoint,
    list_checkpoints,
    unlisted,
    write_manifest,
)
from lpl.training.optimizers import label
from lpl.training.sharded import gathered, join_optimizer, joined, load_optimizer, local, put, split, split_optimizer
from lpl.training.weights import Average

logger = logging.getLogger("lpl")

TEMPORARY = ".tmp-"
DISCARDED = ".tmp-old-"
KEPT: Shape = {
    "step": whole(0, 2**53),
    "optimizer": {"numbers": {REST: ANY}, "param_groups": [{"params": [WHOLE]}], "class?": TEXT},
    "ema?": {"optimization_step": whole(0, 2**53)},
}
"""state.json, without what RunState adds to it."""
Tensors = Iterator[tuple[str, Iterable[tuple[str, Tensor]]]]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def recover(folder: Path) -> None:
    """Renames a checkpoint that was whole but not yet renamed at a kill; removes whatever else kills have left."""
    for temporary in folder.glob(f"{TEMPORARY}{CHECKPOINT}*"):
        final = folder / temporary.name.removeprefix(TEMPORARY)
        if PATTERN.fullmatch(final.name) and damage(temporary) is None and damage(final) is not None:
            _replace(temporary, final)
    _clear(folder)


def _clear(folder: Path) -> None:
    """Removes what killed processes have left unfinished, or half removed."""
    for left in [*folder.glob(f"{TEMPORARY}{CHECKPOINT}*"), *folder.glob(f"{DISCARDED}*")]:
        shutil.rmtree(left, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: Any,
    ema: Average | None,
    state: dict[str, Any],
    total_limit: int | None,
    writes: bool = True,
) -> Path:
    """Writes folder/checkpoint-<step>; older ones beyond total_limit go only after the new one is in place.

    Damaged checkpoints are not counted, and stay. Where parameters are split over processes, every process must call
    it; what is written is whole and does not depend on the processes.

    Args:
        optimizer: a torch optimizer over those parameters in that order.
        writes: whether this is the process that writes; the others only give their parts.

    Raises:
        TrainingStoppedError: the disk is full, or cannot be written; older checkpoints are unchanged.
    """
    final = folder / f"{CHECKPOINT}{step}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    moments, numbers = split_optimizer(optimizer.state_dict())
    files = _tensors(parameters, moments, ema)
    if not writes:
        for _, tensors in files:
            gathered(tensors, False)
        return final
    _clear(folder)
    state = state | {"step": step, "optimizer": numbers | {"class": label(optimizer)}}
    if ema is not None:
        state["ema"] = ema.numbers()
    try:
        _write(temporary, files, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingStoppedError(f"{final} cannot be written ({reason(error)}); {last_checkpoint(folder)}") from error
    _replace(temporary, final)
    prune_checkpoints(folder, final, total_limit)
    return final


def prune_checkpoints(folder: Path, newest: Path, total_limit: int | None) -> None:
    """Removes the oldest checkpoints of a run beyond total_limit, never the newest good one; None: keeps all.

    A checkpoint with a file in it that no run wrote stays.
    """
    if total_limit is not None:
        older = [path for path in list_checkpoints(folder) if path.name != newest.name]
        for old in older[: max(0, len(older) + 1 - total_limit)]:
            if (extra := unlisted(old)) is None:
                _discard(old)
            else:
                logger.warning("%s stays: no run wrote %s in it", old, extra)


def _write(temporary: Path, files: Tensors, state: dict[str, Any]) -> None:
    temporary.mkdir(parents=True)
    for name, tensors in files:
        save_file(gathered(tensors, True), temporary / f"{name}.safetensors")
    (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
    write_manifest(temporary)


def _tensors(parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor], ema: Average | None) -> Tensors:
    """The files of a checkpoint and what is in each, in the order in which processes must go through them."""
    yield "model", parameters.items()
    yield "optimizer", moments.items()
    if ema is not None:
        of = zip(parameters.items(), ema.shadow_params, strict=True)
        yield "ema", ((name, joined(part, parameter)) for (name, parameter), part in of)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Turns the error of a full disk into one line, whatever was being written.

    Raises:
        TrainingStoppedError: the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = re.search(r"os error (\d+)", str(error))  # safetensors reports the system's errors as text
        number = error.errno if isinstance(error, OSError) else int(text[1]) if text else None
        if number not in FULL:
            raise
        shutil.rmtree(folder / RESULT, ignore_errors=True)
        raise TrainingStoppedError(
            f"{folder}: no room left on the disk; {last_checkpoint(folder)}: make room, the same command continues"
        ) from error


def reason(error: Exception) -> str:
    """What went wrong with a file, in a few words; safetensors reports the system's errors as text."""
    return error.strerror if isinstance(error, OSError) and error.strerror else on_one_line(error)


def _replace(temporary: Path, final: Path) -> None:
    """Renames a whole checkpoint to its name; a kill in between leaves it to `recover`."""
    old = _set_aside(final) if final.exists() else None
    temporary.rename(final)
    sync(final.parent)
    if old is not None:
        shutil.rmtree(old)


def _discard(path: Path) -> None:
    """Removes a checkpoint in one go: half of it is never left under its name."""
    old = _set_aside(path)
    sync(path.parent)
    shutil.rmtree(old)


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{DISCARDED}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def load_checkpoint(
    path: Path, parameters: Mapping[str, Tensor], optimizer: Any, ema: Average | None
) -> dict[str, Any]:
    """Restores parameters, optimizer and average in place; returns the rest of what was kept.

    Raises:
        UserError: a damaged checkpoint, one of another model or optimizer, or of a run with another EMA setting.
    """
    try:
        state = read_object(path / STATE)
        require_shape(state, KEPT, str(path / STATE), "resume from another checkpoint")
        saved = load_file(path / "model.safetensors")
        tensors = load_file(path / "optimizer.safetensors")
        shadow = load_file(path / "ema.safetensors") if "ema" in state else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if {name: tuple(tensor.shape) for name, tensor in saved.items()} != shapes:
        raise UserError(
            f"{path}: holds other parameters than this run trains (another model, --rank, --lora_targets, --use_dora "
            "or --train_text_encoder)"
        )
    if (ema is None) != ("ema" not in state):
        raise UserError(f"{path}: was written {'with' if ema is None else 'without'} --use_ema")
    if ema is not None and {name: tuple(tensor.shape) for name, tensor in shadow.items()} != shapes:
        raise UserError(f"{path}: its average is of other parameters than this run trains")
    kept = state.pop("optimizer")
    _check_same_optimizer(path, kept, optimizer)
    with torch.no_grad():
        for name, parameter in parameters.items():
            put(saved[name], parameter)
    if ema is not None:
        ema.load(state.pop("ema"), [local(split(shadow[name], p)) for name, p in parameters.items()])
    try:
        load_optimizer(optimizer, join_optimizer(tensors, kept))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer's state is not what was written ({reason(error)})") from error
    return state


def _check_same_optimizer(path: Path, kept: dict[str, Any], optimizer: Any) -> None:
    own = label(optimizer)
    if kept.get("class", own) != own:
        raise UserError(f"{path}: holds the state of {kept['class']}, not of this run's {own}: see --optimizer")
    sizes = [len(group["params"]) for group in kept["param_groups"]]
    if [place for group in kept["param_groups"] for place in group["params"]] != list(range(sum(sizes))):
        raise UserError(f"{path / STATE}: its parameters are not numbered one by one: resume from another checkpoint")
    own_sizes = getattr(optimizer, "group_sizes", None) or [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own_sizes:
        raise UserError(f"{path}: groups parameters as {sizes}, this run as {own_sizes}: see --decay_all")
