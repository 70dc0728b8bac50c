"""Tensors that FSDP has split over processes, as whole ones; all other tensors stay as they are.

`whole`, `gathered` and `WholeModel.get` are collective: every process calls them, in one order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds; writing into it writes into the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def joined(part: Tensor, like: Tensor) -> Tensor:
    """A tensor that is split as `like` is, made from the part that each process holds, on whatever device."""
    if not isinstance(like, DTensor):
        return part
    part = part.to(like.to_local().device)
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def split(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, split as `like` is; processes do not communicate."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.to_local().device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def forget_gathered(model: nn.Module) -> None:
    """Frees what FSDP still holds gathered after a forward pass without backward: it would outlive a change of weights.

    FSDP2 leaves the outermost module's weights gathered until a backward pass, and does not gather them again before.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def put(value: Tensor, parameter: Tensor) -> None:
    """Writes a whole tensor, the same in every process, into a parameter."""
    local(parameter).copy_(local(split(value, parameter)))


class WholeModel:
    """The trained model as it would be in a single process, to be saved with its own methods.

    Under FSDP a second model of the same structure, without memory of its own until it is asked for,
    whose weights are gathered on the CPU of the main process; else the model itself.

    Args:
        model: before the engine has prepared it.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self._accelerator, self._model = accelerator, model
        self._shell: nn.Module | None = None
        if accelerator.distributed_type == DistributedType.FSDP:
            empty: dict[int, Any] = {
                id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
            }
            self._shell = copy.deepcopy(model, empty)

    def get(self) -> Any:
        """The whole model; collective. With such a second model other processes than the main one get None."""
        if self._shell is None:
            return self._model
        weights = gathered(self._model.state_dict().items(), self._accelerator.is_main_process)
        if not self._accelerator.is_main_process:
            return None
        self._shell.load_state_dict(weights, assign=True)
        return self._shell


def gathered(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Tensors by name, whole and ready to be written; collective, one after another; empty without `keep`."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        value = whole(tensor)
        if keep:
            found[name] = (value if value is tensor else value.cpu()).detach().contiguous()
    return found


def set_precision(accelerator: Accelerator) -> None:
    """Tells FSDP2 the precision in which it gathers weights; gradients are added up in float32.

    Autocast is the trainer's (`autocast_dtype`), and inputs stay as they are: a size of 1023 pixels would be 1024 in
    bfloat16.
    """
    dtype = autocast_dtype(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP and dtype is not None:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """The precision in which the trainer itself must run the model; None: accelerate does it."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


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
    """Loads a state of whole tensors, as torch's optimizers have it; each is then split as its parameter is.

    A tensor without the shape of its parameter is the same in every process.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(isinstance(p, DTensor) for p in parameters):
        for number, fields in state["state"].items():
            like = parameters[number]
            for name, value in fields.items():
                if isinstance(value, Tensor) and value.shape == like.shape:
                    fields[name] = split(value, like)
    optimizer.load_state_dict(state)
