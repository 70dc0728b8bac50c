"""Counts a denoiser's repeated blocks once: a checkpointed block that is like another one is not run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lpl.base.counter import StepCounter, checkpoint

REAL = 2
"""So many of the last blocks of a kind run: outputs of the very last may go nowhere."""


class UnlikeError(Exception):
    """A block's backward pass is not known from one that was run: everything must be."""


class _Forward(NamedTuple):
    flops: int
    peak: int
    """Bytes on top of what was there before."""
    left: int
    """Bytes that stay until the autocast ends, besides the outputs: copies of weights."""
    storages: list[tuple[int, torch.dtype]]
    outputs: list[tuple[int, Any, Any, int]]
    """The storage of each, its shape, strides and offset."""


class _Backward(NamedTuple):
    flops: int
    peak: int


class Repeats:
    """Checkpointing for passes that are counted: a forward pass within trial(), then one with its backward pass.

    A block that is not run takes the bytes and FLOPs of one of the same kind that was: of the same class, with the same
    shapes of weights, the same plain attributes and inputs of the same form.

    Args:
        counter: active during the forward and the backward pass.
        keeps_gradients: whether the gradients of weights stay, once they are there.
    """

    def __init__(self, counter: StepCounter, keeps_gradients: bool) -> None:
        self.counter, self.keeps_gradients = counter, keeps_gradients
        self._is_trial = False
        self._number: Counter[Any] = Counter()
        """Of blocks of a kind in the model."""
        self._seen: Counter[Any] = Counter()
        self._kinds: dict[int, Any] = {}
        self._forward: dict[Any, _Forward | None] = {}
        self._backward: dict[Any, _Backward] = {}
        self._left: list[Tensor] = []
        self._open: _Window | None = None

    @contextmanager
    def trial(self) -> Iterator[None]:
        """A forward pass within it runs one block of each kind, and sees how many there are."""
        self._is_trial, counter = True, self.counter
        with StepCounter() as self.counter, self.autocast():
            yield
        self._is_trial, self.counter, self._number, self._seen = False, counter, self._seen, Counter()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Around autocast: drops what it would have kept to its end."""
        yield
        self._left.clear()

    def checkpoint(self, function: Any, *args: Any) -> Any:
        """In the place of torch's."""
        key = self._key(function, args)
        if key is None:
            return checkpoint(function, *args)
        self._seen[key] += 1
        if key not in self._forward:
            return self._run_forward(key, function, args)
        forward = self._forward[key]
        if forward is None:
            return checkpoint(function, *args)
        if not self._is_trial and self._seen[key] > self._number[key] - REAL:
            return self._run_both(key, function, args)
        self.counter.flops += forward.flops
        self.counter.peak = max(self.counter.peak, self.counter.live + forward.peak)
        self._left.append(_first(args).new_empty(forward.left, dtype=torch.uint8))
        trained = [p for p in function.parameters() if p.requires_grad]
        outputs = _Replayed.apply(self, key, forward, trained, *args)
        return outputs[0] if len(outputs) == 1 else outputs

    def _key(self, function: Any, args: Any) -> Any:
        """Of blocks that are alike, in what they are and are given; None: of which that is not known."""
        tensors = [t for t in args if isinstance(t, Tensor)]
        hidden = [t for arg in args if not isinstance(arg, Tensor) for t in _tensors(arg)]
        if not isinstance(function, nn.Module) or any(t.requires_grad for t in hidden):
            return None
        if not any(t.requires_grad for t in tensors) or any(t.requires_grad and t.is_leaf for t in tensors):
            return None
        if id(function) not in self._kinds:
            self._kinds[id(function)] = _kind(function)
        return self._kinds[id(function)], tuple(map(_form, args))

    def _run_forward(self, key: Any, function: Any, args: Any) -> Any:
        counter = self.counter
        before, flops, peak = counter.live, counter.flops, counter.peak
        counter.reset_peak()
        found = checkpoint(function, *args)
        outputs = found if isinstance(found, tuple) else (found,)
        if not all(isinstance(t, Tensor) and t.requires_grad for t in outputs):
            self._forward[key] = None
            return found
        storages = {id(t.untyped_storage()): t for t in outputs}
        given = {id(t.untyped_storage()) for t in _tensors(args)}
        forms = [
            (list(storages).index(id(t.untyped_storage())), t.shape, t.stride(), t.storage_offset()) for t in outputs
        ]
        left = counter.live - before - sum(t.untyped_storage().nbytes() for t in storages.values())
        own = [(t.untyped_storage().nbytes() // t.element_size(), t.dtype) for t in storages.values()]
        cost = _Forward(counter.flops - flops, counter.peak - before, left, own, forms)
        self._forward[key] = None if left < 0 or given & set(storages) else cost
        counter.peak = max(counter.peak, peak)
        return found

    def _run_both(self, key: Any, function: Any, args: Any) -> Any:
        window = _Window(self, key)
        makers: set[Any] = {arg.grad_fn for arg in args if isinstance(arg, Tensor) and arg.requires_grad}
        for maker in makers:
            maker.register_prehook(window.end)
        found = checkpoint(function, *args)
        outputs = found if isinstance(found, tuple) else (found,)
        window.outputs = len(outputs)
        for output in outputs:
            output.grad_fn.register_prehook(partial(window.begin, output.output_nr))
        return found


class _Window:
    """From the first to the last operation of a block's backward pass."""

    def __init__(self, repeats: Repeats, key: Any) -> None:
        self.repeats, self.key = repeats, key
        self.outputs, self.reached = 0, 0
        self.before: tuple[int, int, int] | None = None

    def begin(self, number: int, grads: Any) -> None:
        """Before an operation runs that made an output, as its number-th."""
        repeats, counter = self.repeats, self.repeats.counter
        if self.before is None:
            if repeats._open is not None:  # an output is the next block's input
                repeats._open.end()
            self.before, repeats._open = (counter.live, counter.flops, counter.peak), self
            counter.reset_peak()
        self.reached += grads[number] is not None

    def end(self, _grads: Any = None) -> None:
        """Before an operation runs that made an input."""
        repeats, counter = self.repeats, self.repeats.counter
        if repeats._open is not self or self.before is None:
            return
        live, flops, peak = self.before
        if self.reached == self.outputs:
            repeats._backward[self.key] = _Backward(counter.flops - flops, counter.peak - live)
        counter.peak, repeats._open = max(counter.peak, peak), None


class _Replayed(torch.autograd.Function):
    """A block that does not run: its outputs, its gradients, and what it takes."""

    @staticmethod
    def forward(ctx: Any, repeats: Repeats, key: Any, forward: _Forward, trained: list[Any], *args: Any) -> Any:
        ctx.repeats, ctx.key, ctx.trained, ctx.args = repeats, key, trained, args
        ctx.set_materialize_grads(False)
        like = _first(args)
        storages = [like.new_empty(number, dtype=dtype) for number, dtype in forward.storages]
        return tuple(storages[i].as_strided(shape, stride, offset) for i, shape, stride, offset in forward.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        repeats, counter = ctx.repeats, ctx.repeats.counter
        found = repeats._backward.get(ctx.key)
        if found is None or any(grad is None for grad in grads):
            raise UnlikeError
        counter.flops += found.flops
        counter.peak = max(counter.peak, counter.live + found.peak)
        if repeats.keeps_gradients:
            for parameter in ctx.trained:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
        needed = ctx.needs_input_grad[4:]
        given = [torch.empty_like(a) if wanted else None for a, wanted in zip(ctx.args, needed, strict=True)]
        ctx.args = ctx.trained = None
        return None, None, None, None, *given


def _first(values: Any) -> Tensor:
    return next(value for value in values if isinstance(value, Tensor))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _form(value: Any) -> Any:
    """What two values must have in common for a block to do the same with them."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    if isinstance(value, dict):
        return tuple((name, _form(each)) for name, each in value.items())
    return value if isinstance(value, (bool, int, float, str)) else id(value)


def _kind(block: nn.Module) -> Any:
    """What two blocks must have in common to do the same with the same inputs."""
    found: list[Any] = []
    for name, module in block.named_modules():
        plain = [(n, v) for n, v in vars(module).items() if isinstance(v, (bool, int, float, str))]
        weights = [
            (n, None if t is None else _form(t)) for n, t in [*module._parameters.items(), *module._buffers.items()]
        ]
        hooks = len(module._forward_pre_hooks), len(module._forward_hooks)
        found.append((name, type(module), tuple(plain), tuple(weights), hooks))
    return tuple(found)
