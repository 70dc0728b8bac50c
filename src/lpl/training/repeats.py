"""Counts a denoiser's repeated blocks once: a checkpointed block that is like another one is not run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lpl.base.counter import StepCounter, checkpoint

REAL = 2
"""So many of the last blocks of a kind run: outputs of the very last may go nowhere."""
OWN_NAME = "target_name"
"""What peft's layers call the name that they have in the model."""
PLAIN = (bool, int, float, str, NoneType)


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
    weights: list[bool]
    """Of each of the block's parameters, whether it gets a gradient."""
    inputs: list[bool]
    """The same of each argument."""


class _Backward(NamedTuple):
    flops: int
    peak: int


class Repeats:
    """Checkpointing for passes that are counted: a forward pass within trial(), then one with its backward pass.

    A block that is not run takes the bytes and FLOPs of one of the same kind that was: of the same class, with the same
    attributes and hooks, weights of the same form, and inputs of the same form, the last of which has just been made.

    Args:
        counter: active during the forward and the backward pass.
        keeps_gradients: whether the gradients of weights stay, once they are there.

    Raises:
        UnlikeError: from any of the passes.
    """

    def __init__(self, counter: StepCounter, keeps_gradients: bool) -> None:
        self.counter, self.keeps_gradients = counter, keeps_gradients
        self._is_trial = False
        self._number: Counter[Any] = Counter()
        """Of blocks of a kind in the model."""
        self._seen: Counter[Any] = Counter()
        self._kinds: dict[int, Any] = {}
        self._weights: set[int] = set()
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

    def close(self) -> None:
        """After the backward pass, which may not have reached the inputs of a block."""
        if self._open is not None:
            self._open.end()

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
        pairs = zip(args, forward.inputs, strict=True)
        given = [a.detach() if isinstance(a, Tensor) and not is_reached else a for a, is_reached in pairs]
        outputs = _Replayed.apply(self, key, forward, [*function.parameters()], *given)
        return outputs[0] if len(outputs) == 1 else outputs

    def _key(self, function: Any, args: Any) -> Any:
        """Of blocks that are alike, in what they are and are given; None: of which that is not known."""
        hidden = [t for arg in args if not isinstance(arg, Tensor) for t in _tensors(arg)]
        if not isinstance(function, nn.Module) or any(t.requires_grad for t in hidden):
            return None
        makers = [t.grad_fn for t in args if isinstance(t, Tensor) and t.requires_grad]
        # What is computed between the last input and the block would be counted with the block's backward pass.
        if not makers or None in makers or max(map(_number, makers)) != torch.autograd._get_sequence_nr() - 1:
            return None
        if self._is_trial:
            weights = {id(weight) for weight in function.parameters()}
            if weights & self._weights:  # used twice: autocast converts it once
                raise UnlikeError
            self._weights |= weights
            self._kinds[id(function)] = _kind(function)
        kind = self._kinds.get(id(function))
        return None if kind is None else (kind, tuple(map(_form, args)))

    def _run_forward(self, key: Any, function: Any, args: Any) -> Any:
        counter = self.counter
        before, flops, peak = counter.live, counter.flops, counter.peak
        counter.reset_peak()
        found = checkpoint(function, *args)
        outputs = found if isinstance(found, tuple) else (found,)
        self._forward[key] = None
        if all(isinstance(t, Tensor) and t.requires_grad for t in outputs):
            made = {id(t.untyped_storage()): t for t in outputs}
            left = counter.live - before - sum(t.untyped_storage().nbytes() for t in made.values())
            given = {id(t.untyped_storage()) for t in _tensors(args)}
            if not given & made.keys() and (left == 0 or (left > 0 and torch.is_autocast_enabled("cpu"))):
                places = [*made]
                forms = [
                    (places.index(id(t.untyped_storage())), t.shape, t.stride(), t.storage_offset()) for t in outputs
                ]
                storages = [(t.untyped_storage().nbytes() // t.element_size(), t.dtype) for t in made.values()]
                weights, inputs = _reached(outputs, [*function.parameters()], args)
                cost = counter.flops - flops, counter.peak - before
                self._forward[key] = _Forward(*cost, left, storages, forms, weights, inputs) if any(inputs) else None
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
            repeats.close()  # an output is the next block's input
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
    def forward(ctx: Any, repeats: Repeats, key: Any, forward: _Forward, weights: list[Any], *args: Any) -> Any:
        ctx.repeats, ctx.key, ctx.forward, ctx.weights, ctx.args = repeats, key, forward, weights, args
        ctx.set_materialize_grads(False)
        return tuple(_outputs(forward, _first(args)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        repeats, counter, forward = ctx.repeats, ctx.repeats.counter, ctx.forward
        found = repeats._backward.get(ctx.key)
        if found is None or any(grad is None for grad in grads):
            raise UnlikeError
        counter.flops += found.flops
        peak = max(counter.peak, counter.live + found.peak)
        for weight, is_reached in zip(ctx.weights, forward.weights, strict=True):
            if repeats.keeps_gradients and is_reached and weight.grad is None:
                weight.grad = torch.empty_like(weight)
        given = [torch.empty_like(a) if wanted else None for a, wanted in zip(ctx.args, forward.inputs, strict=True)]
        counter.peak = peak  # the gradients above are not there beside those of the outputs
        ctx.args = ctx.weights = None
        return None, None, None, None, *given


def _outputs(forward: _Forward, like: Tensor) -> Iterator[Tensor]:
    users, storages = Counter(i for i, *_ in forward.outputs), {}
    for i, shape, stride, offset in forward.outputs:
        number, dtype = forward.storages[i]
        if users[i] == 1 and shape.numel() == number:  # no view, which must not be written to
            yield like.new_empty_strided(shape, stride, dtype=dtype)
        else:
            if i not in storages:
                storages[i] = like.new_empty(number, dtype=dtype)
            yield storages[i].as_strided(shape, stride, offset)


def _reached(outputs: Any, weights: list[nn.Parameter], args: Any) -> tuple[list[bool], list[bool]]:
    """Which weights and which arguments the gradients of a block's outputs reach."""
    ends = {(t.grad_fn, t.output_nr) for t in args if isinstance(t, Tensor) and t.requires_grad}
    last = {maker for maker, _ in ends}
    found: set[Any] = set()
    waiting, leaves = [(t.grad_fn, t.output_nr) for t in outputs], set()
    while waiting:
        node, number = waiting.pop()
        if node is None or (node, number) in found:
            continue
        found.add((node, number))
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        elif node not in last:
            waiting += node.next_functions
    inputs = [isinstance(t, Tensor) and t.requires_grad and (t.grad_fn, t.output_nr) in found for t in args]
    return [id(weight) in leaves for weight in weights], inputs


def _number(node: Any) -> int:
    number: int = node._sequence_nr()
    return number


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
    if isinstance(value, (list, tuple, set)):
        return type(value), *map(_form, value)
    if isinstance(value, dict):
        return type(value), *((name, _form(each)) for name, each in value.items() if name != OWN_NAME)
    if isinstance(value, partial):
        return partial, _form(value.func), _form(value.args), _form(value.keywords)
    if hasattr(value, "__dict__") and not isinstance(value, (type, FunctionType, nn.Module)):  # an attention processor
        return type(value), *((name, each) for name, each in vars(value).items() if isinstance(each, PLAIN))
    return (type(value), value) if isinstance(value, Hashable) else object()


def _kind(block: nn.Module) -> Any:
    """What two blocks must have in common to do the same with the same inputs."""
    return tuple(
        (name, type(module), *((n, _attribute(n, v)) for n, v in vars(module).items() if n != "_modules"))
        for name, module in block.named_modules()
    )


def _attribute(name: str, value: Any) -> Any:
    """Its form; hooks are known by numbers that all modules count together."""
    return tuple(map(_form, value.values())) if "_hooks" in name and isinstance(value, dict) else _form(value)
