"""An accelerator's rules without one: the meta device stands for it, and what would make the host wait is noted.

Operations whose result has a size that only the device knows (nonzero, indexing by booleans) cannot run there at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
aten: Any = torch.ops.aten


class MixedDevicesError(RuntimeError):
    """What a GPU says of an operation on tensors of two devices."""


@dataclass
class Seen:
    """What the device would have had to do beside the work."""

    waits: list[str] = field(default_factory=list)
    """Operations for which the host waits until the device has caught up."""
    layouts: list[str] = field(default_factory=list)
    """Convolutions whose map and weights have different memory layouts, so that one of them is copied."""


class _Operations(TorchDispatchMode):
    """Holds every operation to a GPU's rules; what is read from the device is 1."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if x.is_meta]
        if func is aten._to_copy.default:
            return self._moved(func, args, kwargs)
        if func is aten.copy_.default and args[0].is_meta != args[1].is_meta:
            if not args[0].is_meta or not (len(args) > 2 and args[2]):
                self.seen.waits.append("copy_")
            return args[0] if args[0].is_meta else args[0].fill_(1)
        if func is aten._local_scalar_dense.default and there:
            self.seen.waits.append("a value is read")
            return 1
        if there:
            self._check(func, args, tensors)
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        source, target = args[0], kwargs.get("device")
        to = source.device if target is None else torch.device(target)
        if source.is_meta and to.type == "cpu":
            self.seen.waits.append("values are copied to the host")
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if not source.is_meta and to.type == "meta" and not kwargs.get("non_blocking"):
            self.seen.waits.append(f"{tuple(source.shape)} is copied to the device")
        return func(*args, **kwargs)

    def _check(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        name = str(func)
        if func is aten.convolution.default and args[0].dim() == 4 and args[1].shape[-1] > 1:
            layouts = [_layout(x) for x in args[:2]]
            if None not in layouts and layouts[0] != layouts[1]:
                self.seen.layouts.append(f"{tuple(args[0].shape)} {layouts[0]}, weights {layouts[1]}")
        others = [x for x in tensors if not x.is_meta]
        if name.startswith(("aten.index.", "aten.index_put", "aten._index_put")) and args[0].is_meta:
            indices = [x for x in args[1] if x is not None]
            if any(not x.is_meta for x in indices):
                self.seen.waits.append(f"{name} by what lies on the host")
            others = [x for x in others if all(x is not index for index in indices)]
        scalars = torch.Tag.pointwise in func.tags or func.overloadpacket is aten.where
        if any(x.dim() or not scalars for x in others):
            found = ", ".join(f"{tuple(x.shape)} on {'the device' if x.is_meta else 'the host'}" for x in tensors)
            raise MixedDevicesError(f"{name}: {found}")


def _layout(x: Tensor) -> str | None:
    """None: it is both."""
    first, last = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
    return None if first == last else "channels first" if first else "channels last"


class _Constructors(TorchFunctionMode):
    """Notes tensors that are made of the host's numbers on the device: that copy waits."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and made.is_meta:
            self.seen.waits.append("a tensor is made of numbers on the device")
        return made


@contextmanager
def stand_in() -> Iterator[Seen]:
    """Holds what runs in it to a GPU's rules.

    Raises:
        MixedDevicesError: an operation on tensors of the device and of the host.
    """
    seen = Seen()
    with _Constructors(seen), _Operations(seen):
        yield seen
