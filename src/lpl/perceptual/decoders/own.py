"""The caller's own decoder: as a list of stages, or as names of modules whose outputs hooks catch."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lpl.base.arguments import function
from lpl.base.errors import on_one_line
from lpl.diffusion.latent_space import LatentSpace
from lpl.perceptual.decoders.base import Decoder, DecoderTaps, Tap
from lpl.perceptual.decoders.blocks import frozen_stage
from lpl.perceptual.feature_maps import State, map_of, version_of
from lpl.perceptual.frozen import Fuse, Identity
from lpl.perceptual.sweep import Segment

logger = logging.getLogger("lpl")


class StageTaps(DecoderTaps):
    """A decoder as a list of callables: the first takes raw latents, each other what the one before returned.

    A stage returns a feature map (B, C, *space) with 1, 2 or 3 axes of space, or a tuple that begins with it and
    carries more to the next stage. It runs as it is: in eval mode, in the precision and on the device of the latents
    that the loss sends.

    Args:
        stages: first to last; the decoder is not run past the last one, so the convolution to the output is left out.
        strides: of their maps, in cells of the decoder's output; None: not known.

    Raises:
        ValueError: stages that are not callables of one argument, modules in training mode, or not one positive stride
            per stage; in use, stages that fail on their input, change it in place, or run a module in training mode.
    """

    axes = (1, 2, 3)

    def __init__(self, stages: Sequence[Callable[..., Any]], strides: Sequence[float] | None = None) -> None:
        if isinstance(stages, nn.ModuleList | nn.Sequential):
            stages = list(stages)
        if not isinstance(stages, list | tuple) or not stages or not all(map(callable, stages)):
            raise ValueError(f"stages is {_words(stages)}: pass a list of callables, from raw latents to the last map")
        known = [0.0] * len(stages) if strides is None else list(strides) if isinstance(strides, list | tuple) else []
        positive = strides is None or all(isinstance(s, Real) and 0 < float(s) < math.inf for s in known)
        if len(known) != len(stages) or not positive:
            raise ValueError(
                f"strides {strides}: pass {len(stages)} positive numbers, the output's cells per cell of a map"
            )
        for number, stage in enumerate(stages):
            function(f"stage_{number}", stage, "x")
        self._stages = list(stages)
        self._ran: list[nn.Module] = []
        self.latent_channels = None
        self.taps = tuple(Tap(f"stage_{i}", 0, stride) for i, stride in enumerate(known))
        for module in self.modules():
            if any(part.training for part in module.modules()):
                raise ValueError(f"a stage, {type(module).__name__}, is in training mode: call .eval() on the decoder")

    @property
    def latent_space(self) -> LatentSpace:
        return LatentSpace.identity()

    def modules(self) -> list[nn.Module]:
        return [stage for stage in self._stages if isinstance(stage, nn.Module)]

    def copy_to(self, dtype: torch.dtype) -> Self:
        raise ValueError(_cast(self.modules(), dtype))

    def in_training(self) -> str:
        return super().in_training() or _in_training(self._ran)

    def begin(self, raw_latents: Tensor) -> State:
        return raw_latents

    def run(self, stage: int, x: State) -> State:
        name, given = self.taps[stage].name, map_of(x)
        try:
            out = self._stages[stage](x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{name} does not take {_words(given)}: {on_one_line(error)}") from error
        shown = out[0] if isinstance(out, tuple | list) and len(out) else out
        _check_map(shown, name)
        if len(shown) != len(given):
            raise ValueError(f"{name} makes {len(shown)} samples of {len(given)}: keep samples separate")
        return out

    @torch.no_grad()
    def try_out(self, raw_latents: Tensor, chosen: Sequence[int]) -> None:
        """Runs the stages once, and notes the modules that plain functions among them call."""
        x: State = raw_latents
        with _modules_that_run(self._ran):
            for stage in range(len(self._stages)):
                x = self.run(stage, x)
                if stage in chosen:
                    _check_axes(map_of(x), raw_latents, self.taps[stage].name)
        if name := self.in_training():
            raise ValueError(f"the stages run a {name} in training mode: call .eval() on the decoder")

    def finish(self, x: State) -> Tensor:
        return map_of(x)

    def segments(self, fuse: Fuse) -> list[Segment]:
        """Frozen operations where a stage's modules have them, which the log says."""
        heads: list[Any] = [Identity()]
        bodies: list[Any] = []
        for tap, stage in zip(self.taps, self._stages, strict=True):
            operations, head, frozen = frozen_stage(stage, fuse)
            if frozen:
                logger.info(
                    "LPL: %s: %d of %d operations are frozen ones", tap.name, frozen, len(operations) + bool(head)
                )
            bodies.append(operations if frozen else [self.plain(len(bodies))])
            heads.append((head if frozen else None) or Identity())
        return [Segment(head, body) for head, body in zip(heads, [*bodies, []], strict=True)]


class HookTaps(Decoder):
    """A decoder whose taps are outputs of modules, given by dotted names: hooks catch them while `decode` runs.

    Prefer stages where possible: a hook's features are kept whole for the gradient. Slicing, tiling and gradient
    checkpointing of the model are switched off during the call; none of its parameters are frozen.

    Args:
        model: holds the decoder, which must be in eval mode, and may hold more.
        names: names of modules in `model`, in the order in which they run, such as "decoder.up.3.block.2".
        decode: from raw latents to the output; it must support autograd.
        example: a small batch of raw latents, decoded once as a check.
        to_map: from a module's output to its feature map (B, C, *space); None: the output, or the first of a tuple.

    Raises:
        ValueError: unknown names, modules that do not run, or run twice or in another order, whose output is changed in
            place afterwards or has no graph; a decode that runs a module in training mode, or fails.
    """

    axes = (1, 2, 3)

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        decode: Callable[[Tensor], Any],
        example: Tensor,
        to_map: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model is {_words(model)}: pass the module that holds the decoder")
        function("decode", decode, "raw_latents")
        if to_map is not None:
            function("to_map", to_map, "output")
        if not isinstance(example, Tensor) or not example.is_floating_point() or example.dim() < 3:
            raise ValueError(
                f"example is {_words(example)}: pass raw latents of floating point, a small batch of zeros"
            )
        modules = dict(model.named_modules())
        listed = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else []
        unknown = [name for name in listed if name not in modules]
        if not listed or unknown or len(set(listed)) < len(listed):
            raise ValueError(f"names {unknown or names!r}: pass names of model.named_modules(), each once")
        self.model, self.names, self.decode, self.to_map = model, listed, decode, to_map or _first
        self.latent_channels = example.shape[1]
        self._ran: list[nn.Module] = []
        self.taps = self._try(example)

    @property
    def latent_space(self) -> LatentSpace:
        return LatentSpace.identity()

    def modules(self) -> list[nn.Module]:
        modules = dict(self.model.named_modules())
        return [modules[name] for name in self.names]

    def copy_to(self, dtype: torch.dtype) -> Self:
        raise ValueError(_cast(self.modules(), dtype))

    def in_training(self) -> str:
        return super().in_training() or _in_training(self._ran)

    def features(self, raw_latents: Tensor, chosen: Sequence[int]) -> list[Tensor]:
        """The maps of the chosen taps; the decoder stops behind the last of them."""
        found, _ = self._run(raw_latents, [self.names[i] for i in chosen], stop=True)
        if raw_latents.requires_grad:
            _check_graph(found)
        return list(found.values())

    def _run(self, raw_latents: Tensor, names: Sequence[str], stop: bool) -> tuple[dict[str, Tensor], Any]:
        """Maps by name in the order in which they were made, and what decode returned."""
        found: dict[str, Tensor] = {}
        versions: dict[str, tuple[Tensor, int]] = {}

        def hook(name: str) -> Callable[..., None]:
            def listen(module: nn.Module, inputs: Any, output: Any) -> None:
                if name in found:
                    raise ValueError(f"{name} runs twice in a decode: name a module that runs once")
                found[name] = self.to_map(output)
                _check_map(found[name], name)
                versions[name] = found[name], version_of(found[name])
                if stop and len(found) == len(names):
                    raise _StopDecoding

            return listen

        modules, result = dict(self.model.named_modules()), None
        handles = [modules[name].register_forward_hook(hook(name)) for name in names]
        try:
            with _whole(self.model):
                result = self.decode(raw_latents)
        except _StopDecoding:
            pass
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"{', '.join(missing)}: not run by decode; name modules that are (without torch.compile)")
        changed = [name for name, (x, version) in versions.items() if version_of(x) != version]
        if changed:
            raise ValueError(f"{', '.join(changed)}: its output is changed in place by a later module: name that one")
        return found, result

    def _try(self, example: Tensor) -> tuple[Tap, ...]:
        try:
            with torch.enable_grad(), _modules_that_run(self._ran):
                found, result = self._run(example.detach().requires_grad_(), self.names, stop=False)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"decode does not take example, {_words(example)}: {on_one_line(error)}") from error
        if name := self.in_training():
            raise ValueError(f"decode runs a {name} in training mode: call .eval() on the decoder")
        if list(found) != self.names:
            raise ValueError(f"names in the order they run are {', '.join(found)}: pass them in that order")
        _check_graph(found)
        for name, x in found.items():
            _check_axes(x, example, name)
        output = _first(result)
        return tuple(Tap(name, x.shape[1], output.shape[-1] / x.shape[-1]) for name, x in found.items())


@contextmanager
def _modules_that_run(found: list[nn.Module]) -> Iterator[None]:
    """Notes the modules that are called, but only those without submodules: others may hold some that are not run."""

    def note(module: nn.Module, inputs: Any) -> None:
        if next(module.children(), None) is None and not any(module is other for other in found):
            found.append(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _in_training(modules: Sequence[nn.Module]) -> str:
    return next((type(module).__name__ for module in modules if module.training), "")


class _StopDecoding(Exception):  # noqa: N818
    """Raised by the last hook: the rest of the decoder is not needed."""


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Decoding in one piece, and without recomputing."""
    switched = [
        (module, name)
        for module in model.modules()
        for name in ("use_slicing", "use_tiling", "gradient_checkpointing")
        if getattr(module, name, None) is True
    ]
    for module, name in switched:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module, name in switched:
            setattr(module, name, True)


def _first(output: Any) -> Tensor:
    output = getattr(output, "sample", output)
    output = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(output, Tensor):
        raise ValueError(f"an output is {_words(output)}: pass to_map=, which makes a feature map of it")
    return output


def _check_graph(found: Mapping[str, Tensor]) -> None:
    if detached := [name for name, x in found.items() if not x.requires_grad]:
        raise ValueError(
            f"{', '.join(detached)}: features without a graph, so LPL would train nothing: pass a decode that runs "
            "without torch.no_grad(), torch.inference_mode() and detach()"
        )


def _check_map(value: Any, name: str) -> None:
    """A feature map of 1, 2 or 3 axes of space."""
    if not isinstance(value, Tensor) or not 3 <= value.dim() <= 5 or value.is_complex():
        found = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else _words(value)
        raise ValueError(f"{name} gives {found}: a feature map is (B, C, *space), or begins a tuple of stages=")


def _check_axes(x: Tensor, latents: Tensor, name: str) -> None:
    """A map must have at least the latents' axes of space: tokens (B, N, D) would pass for a map of N channels."""
    if x.dim() < latents.dim():
        raise ValueError(
            f"{name} gives {tuple(x.shape)} for latents {tuple(latents.shape)}, which have more axes of space: make a "
            "map of tokens (B, N, D) by x.transpose(1, 2).unflatten(2, (h, w)), in stages= or by to_map="
        )


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return f"{len(value)} of {type(value).__name__}" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def _cast(modules: Sequence[nn.Module], dtype: torch.dtype) -> str:
    found = {str(p.dtype).removeprefix("torch.") for module in modules for p in module.parameters()}
    return (
        f"the decoder's weights are {', '.join(sorted(found))}, the loss's dtype is {dtype}: your own decoder runs as "
        "it is, so pass its dtype= or cast it"
    )
