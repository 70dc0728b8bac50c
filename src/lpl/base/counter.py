"""Counts what runs under it: floating-point operations, and the bytes of the tensors that are alive."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces a module's parameters, buffers and plain tensors by fake tensors of the same shapes and dtypes.

    Fake tensors refuse module.to(): dtypes are set before, on the meta device.
    """
    for part in module.modules():
        for name, t in [*part._parameters.items(), *part._buffers.items()]:
            if t is not None:
                with mode:
                    fake = torch.empty(t.shape, dtype=t.dtype)
                    setattr(part, name, nn.Parameter(fake, t.requires_grad) if name in part._parameters else fake)
        for name, value in vars(part).items():
            listed = value if isinstance(value, list) else [value]
            if listed and all(isinstance(t, Tensor) for t in listed):
                with mode:
                    fakes = [torch.empty(t.shape, dtype=t.dtype) for t in listed]
                setattr(part, name, fakes if value is listed else fakes[0])


class FusedAttention(TorchFunctionMode):
    """While it is active, scaled_dot_product_attention keeps no scores, even where torch would write them out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = _attention if func is scaled_dot_product_attention else func
        return function(*args, **(kwargs or {}))


def checkpoint(function: Any, *args: Any) -> Any:
    """Checkpointing as diffusers does it, with FusedAttention also in recomputation: backward() runs without modes."""
    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), FusedAttention()))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


aten: Any = torch.ops.aten
DEVICE: Any = torch.ops.prim.device.default


class StepCounter(TorchDispatchMode):
    """Counts FLOPs, and live and peak bytes of every storage that an operation under it allocates.

    Works on real, meta and fake tensors alike: it counts storages, not pages. It does not see what a kernel allocates
    and frees within itself, nor a storage that grows, and does not count what was there before.

    Attributes:
        flops: of matrix products, convolutions and attention so far; a multiplication with its addition is two.
        live: bytes alive now.
        peak: the most bytes alive at once, since the start or the last reset_peak().
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.live, self.peak = 0, 0, 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def reset_peak(self) -> None:
        """Starts the peak again from what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):  # half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        out = _run(func, args, kwargs)
        if func.namespace == "prim":  # a question about a tensor, no operation
            return out
        new = {id(storage): storage for storage in _storages((out,)) if id(storage) not in self._known}
        if new:
            for storage in _storages((args, kwargs.values())):
                new.pop(id(storage), None)
            for key, storage in new.items():
                self._add(key, storage)
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _add(self, key: int, storage: Any) -> None:
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._remove, key, size)
        self._known[key].atexit = False

    def _remove(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]


_made: dict[Any, list[Any]] = {}
"""Forms of the results of operations on meta and fake tensors, which torch takes long to derive."""
_written: set[Any] = set()
"""Operations, with forms of their arguments, that torch has found to write to one of these and to nothing else."""


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation; one that makes meta or fake tensors, or writes to one, runs once for each form."""
    first = args[0] if args and isinstance(args[0], FakeTensor) and args[0].constant is None else None
    if first is not None and _is_view(func):
        with in_kernel_invocation_manager(first.fake_mode):
            views = func(*args, **kwargs)
        listed = views if isinstance(views, (list, tuple)) else [views]
        wrapped = [FakeTensor(first.fake_mode, view, first.fake_device) for view in listed]
        return wrapped if isinstance(views, (list, tuple)) else wrapped[0]
    key, returns = (func, _form(args), _form([*kwargs.items()])), func._schema.returns
    place = _place_written(func)
    if place is not None:
        written = args[place] if isinstance(place, int) else kwargs[place]
        if key not in _written:
            before = _form(written)
            func(*args, **kwargs)
            if _is_empty(written) and _form(written) == before:
                _written.add(key)
        return written
    if key not in _made:
        out = func(*args, **kwargs)
        tensors = out if isinstance(out, tuple) else (out,)
        is_new = not func._schema.is_mutable and all(each.alias_info is None for each in returns)
        is_known = first is not None or not any(isinstance(t, FakeTensor) for t in tensors)  # their mode
        if is_new and is_known and all(map(_is_empty, tensors)):
            _made[key] = [_form(t) for t in tensors]
        return out
    with no_dispatch():
        made = [_empty(*form) for form in _made[key]]
    return tuple(made) if len(returns) > 1 else made[0]


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operation returns nothing but views of its first argument."""
    returns = func._schema.returns
    return not func._schema.is_mutable and all(each.alias_info is not None for each in returns) and bool(returns)


@functools.cache
def _place_written(func: Any) -> int | str | None:
    """The argument, by place or name, that an operation writes to and returns; None: it does not, or changes views."""
    schema = func._schema
    if torch.Tag.inplace_view in func.tags or len(schema.returns) != 1 or schema.returns[0].alias_info is None:
        return None
    returned = schema.returns[0].alias_info
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == returned.before_set:
            return (argument.name if argument.kwarg_only else number) if returned.is_write else None
    return None


def _is_empty(value: Any) -> bool:
    """Whether it is a tensor that holds no numbers."""
    return (type(value) is Tensor and value.is_meta) or (isinstance(value, FakeTensor) and value.constant is None)


def _empty(size: Any, stride: Any, dtype: torch.dtype, device: torch.device, mode: FakeTensorMode | None) -> Tensor:
    made = torch.empty_strided(size, stride, dtype=dtype, device="meta")
    return made if mode is None else FakeTensor(mode, made, device)


def _form(value: Any) -> Any:
    if isinstance(value, FakeTensor):  # a constant is one that still has its numbers
        mode = value.fake_mode if value.constant is None else value
        return value.shape, value.stride(), value.dtype, value.fake_device, mode
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, None
    return tuple(map(_form, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _storages(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Tensor):
            yield value.untyped_storage()
        elif isinstance(value, (list, tuple, type({}.values()))):
            yield from _storages(value)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FORMULAS: dict[Any, Any] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""torch's formulas, and those for attention on a CPU."""
