"""An optimizer's state as safetensors and JSON hold it, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lpl.training.sharded import split

GROUP = "group"


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
        if type(value) in (Tensor, torch.nn.Parameter, DTensor):
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


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Loads a state of whole tensors, as torch's optimizers have it; each is then held as its parameter is.

    What does not have the shape of its parameter is the same in every process.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(isinstance(p, DTensor) for p in parameters):
        for number, fields in state["state"].items():
            like = parameters[number]
            for name, value in fields.items():
                if isinstance(value, Tensor) and value.shape == like.shape:
                    fields[name] = split(value, like)
    optimizer.load_state_dict(state)
