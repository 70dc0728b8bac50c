"""Runs each part of a training run on full-size networks that take no memory, and counts what it would take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import wraps
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lpl.base.counter import FusedAttention, StepCounter, checkpoint, make_fake
from lpl.config import LPLConfig, ModelConfig, OptimConfig, TrainConfig
from lpl.data.filling import CAPTION_BATCH, batch_of
from lpl.diffusion.latent_space import LatentSpace
from lpl.diffusion.losses import diffusion_loss
from lpl.families.base import DECODED_PIXELS, Blueprint
from lpl.perceptual.loss import CHUNK_PIXELS
from lpl.training.engine import add_lora, build_loss
from lpl.training.offloaded import offload
from lpl.training.quantized import quantize
from lpl.training.repeats import Repeats, UnlikeError
from lpl.training.states import one_step_size

Device = Literal["cuda", "cpu"]
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
STEPPING = ("use_8bit_adam", "optimizer", "optimizer_args", "weights_dtype", "adam_beta1", "adam_beta2")
"""Options that decide what a parameter's step takes."""


class Weights(NamedTuple):
    """What the options say of the denoiser's weights."""

    lora: ModelConfig | None
    precision: str
    """Of the arithmetic."""
    dtype: str
    """Of what is trained."""


class Parameters(NamedTuple):
    """The denoiser's parameters, in numbers of values."""

    base: int
    """Of the model itself."""
    trained: int
    """The model's, or its adapter's."""
    largest: int
    """Of the largest trained tensor."""
    size: int
    """Bytes of all that stay on the device."""
    waiting: int
    """Bytes of those that are copied there while their block runs."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the trained tensors."""
    itemsize: int
    """Bytes of a trained value and of its gradient."""


class DenoiserCost(NamedTuple):
    """A micro-batch's forward and backward pass through the denoiser; bytes are on top of what was there before."""

    forward: int
    """Peak of the forward pass."""
    kept: int
    """What the forward pass leaves for the backward pass."""
    backward: int
    """Peak of the backward pass, with the gradients as they appear."""
    flops: int


class LossCost(NamedTuple):
    """LPL with its gradient; bytes are on top of what was there before."""

    copy: int
    """Bytes of the decoder's copy in another precision, which stays."""
    peak: int
    flops: int
    """Of one sample, on average over depths."""
    taps: list[tuple[str, int, int, float]]
    """Name, channels, stride and weight."""


def _once(count: F) -> F:
    """A method that counts once for the same arguments."""

    @wraps(count)
    def counted(self: Rehearsal, *key: Any) -> Any:
        if (count, key) not in self._done:
            self._done[count, key] = count(self, *key)
        return self._done[count, key]

    return counted  # type: ignore[return-value]


class Rehearsal:
    """Counts parts of a run; a part that several plans share is counted once.

    Shapes, dtypes and lifetimes are a run's, arithmetic does not happen: everything is on the meta device, but for a
    denoiser in half precision, which is on a fake CPU, since autocast does not act on the meta device.

    Args:
        blueprint: of the model.
        device: where the run is to be.
    """

    def __init__(self, blueprint: Blueprint, device: Device = "cuda") -> None:
        self.blueprint, self.device = blueprint, device
        self._fake = FakeTensorMode()
        self._done: dict[tuple[Any, ...], Any] = {}
        self._told = False
        self._waiting: dict[int, nn.Parameter] = {}
        """Weights that are not on the device but while their block runs."""

    def latents(self, config: TrainConfig, batch: int) -> tuple[int, int, int, int]:
        """The shape of a batch of latents."""
        side = config.data.crop_size // self.blueprint.stride
        return batch, self.blueprint.latent_channels, side, side

    def model(self, config: TrainConfig) -> Any:
        """The denoiser that is trained, without data."""
        return self._model(_weights(config))

    def parameters(self, config: TrainConfig) -> Parameters:
        """The number and size of the denoiser's parameters."""
        return self._parameters(_weights(config))

    @_once
    def _parameters(self, kind: Weights) -> Parameters:
        with torch.device("meta"):
            base = sum(p.numel() for p in self.blueprint.denoiser().parameters())
        model = self._model(kind)
        trained = [p for p in model.parameters() if p.requires_grad]
        sizes, shapes = [p.numel() for p in trained], tuple(tuple(p.shape) for p in trained)
        itemsize = max(p.element_size() for p in trained)
        waiting = sum(p.nbytes for p in model.parameters() if id(p) in self._waiting)
        return Parameters(base, sum(sizes), max(sizes), _bytes(model) - waiting, waiting, shapes, itemsize)

    def denoiser(self, config: TrainConfig) -> DenoiserCost:
        """One micro-batch, as the trainer runs it; with accumulation, gradients of earlier ones are there already."""
        run, shape = config.run, self.latents(config, config.run.train_batch_size)
        held, fused = run.gradient_accumulation_steps > 1, None
        if config.optim.fused_backward_pass:
            named = {name: getattr(config.optim, name) for name in STEPPING}
            fused = OptimConfig(**named)
        return self._denoiser(_weights(config), run.gradient_checkpointing, shape, held, fused)

    @_once
    def _denoiser(
        self, kind: Weights, checkpointing: bool, shape: tuple[int, ...], held: bool, fused: OptimConfig | None
    ) -> DenoiserCost:
        if checkpointing and (kind.lora is None or kind.lora.offload_blocks is None):  # those differ block by block
            try:
                return self._passes(kind, True, shape, held, fused, repeats=True)
            except UnlikeError:
                pass
        return self._passes(kind, checkpointing, shape, held, fused, repeats=False)

    def _passes(
        self,
        kind: Weights,
        checkpointing: bool,
        shape: tuple[int, ...],
        held: bool,
        fused: OptimConfig | None,
        repeats: bool,
    ) -> DenoiserCost:
        """Forward and backward, with each block of them or with one of each kind."""
        denoiser = self._model(kind)
        denoiser.disable_gradient_checkpointing()
        trained = [p for p in denoiser.parameters() if p.requires_grad]
        counter = StepCounter()
        blocks = Repeats(counter, keeps_gradients=fused is None)
        if checkpointing:
            denoiser.enable_gradient_checkpointing(blocks.checkpoint if repeats else checkpoint)
        with self._tensors(kind.precision in HALF), FusedAttention():
            inputs = self._inputs(shape)
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter) if held else None
            if repeats:
                with blocks.trial(), _autocast(kind.precision):
                    self.blueprint.denoise(denoiser, *inputs)
            with counter:
                with blocks.autocast(), _autocast(kind.precision):
                    output = self.blueprint.denoise(denoiser, *inputs)
                loss = diffusion_loss(output.float(), inputs[0]).mean()
                forward, kept = counter.peak, counter.live
                counter.reset_peak()
                with self._stepping(trained, fused):
                    loss.backward()
                blocks.close()
            for parameter in trained:
                parameter.grad = None
        return DenoiserCost(forward, kept, counter.peak, counter.flops)

    @contextmanager
    def _stepping(self, trained: list[Any], optim: OptimConfig | None) -> Iterator[None]:
        """Under --fused_backward_pass, allocates what each weight's step writes out, and frees its gradient at once."""

        def step(parameter: Any) -> None:
            assert optim is not None
            size = one_step_size(optim, tuple(parameter.shape), self.device)
            parameter.grad.new_empty(size, dtype=torch.uint8)
            parameter.grad = None

        hooks = [p.register_post_accumulate_grad_hook(step) for p in trained if optim is not None]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @_once
    def _model(self, kind: Weights) -> Any:
        """The denoiser in training mode, as the trainer prepares it."""
        lora, precision, dtype = kind
        with torch.device("meta"):
            denoiser = self.blueprint.denoiser().requires_grad_(True)
            if dtype != "float32":
                _cast(denoiser, getattr(torch, dtype))
            if lora is not None:
                _cast(denoiser, HALF.get(precision, torch.float32))
                if lora.quantize_base is not None:
                    quantize(denoiser, lora.quantize_base, torch.device("meta"))
                add_lora(denoiser, lora, self.blueprint.lora_targets, 0)
        if precision in HALF:
            make_fake(denoiser, self._fake)
            for module in denoiser.modules():
                if self.device == "cuda" and isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                    module.register_forward_pre_hook(_to_float32)
        if lora is not None and lora.offload_blocks is not None and self.device == "cuda":
            self._waiting |= {id(p): p for p in offload(denoiser, lora.offload_blocks, torch.empty_like)}
        return denoiser.train()

    def _inputs(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        batch = shape[0]
        levels = torch.zeros(batch, dtype=torch.float32 if self.blueprint.schedule.is_flow else torch.long)
        return torch.empty(shape), levels, self.blueprint.text(batch), {"sizes": torch.zeros(batch, 6)}

    def loss(self, config: TrainConfig) -> LossCost:
        """LPL of a micro-batch in which every sample passes the gate."""
        options = replace(config.lpl, lpl_compile=False)  # fused needs less; how much is not known
        if options.lpl_dtype == "auto":
            options = replace(options, lpl_dtype="float32")  # what it needs at most
        if self.device == "cpu" and options.lpl_channels_last == "auto":
            options = replace(options, lpl_channels_last="true")
        config = replace(config, lpl=options)
        # Samples that fill the decoder once (or, for statistics of the batch, twice): with more, memory does not grow.
        chunk = max(1, CHUNK_PIXELS // config.data.crop_size**2) if options.lpl_chunk == "auto" else options.lpl_chunk
        limit = 2 * chunk if options.lpl_norm_type == "batch" else chunk
        batch = min(config.run.train_batch_size, options.lpl_max_samples or limit, limit)
        checkpointing: Any = str(config.lpl_checkpointing).lower()
        return self._loss(replace(options, lpl_checkpointing=checkpointing), self.latents(config, batch))

    @_once
    def _loss(self, options: LPLConfig, shape: tuple[int, ...]) -> LossCost:
        config = TrainConfig(lpl=options)
        space = LatentSpace.identity()  # some VAEs keep the real one in weights, which are empty here
        with torch.device("meta"), StepCounter() as counter:
            vae = self.blueprint.vae()
            before = counter.live
            with _quiet(self._told):  # the loss logs its messages only once
                loss = build_loss(config, vae, space)
            copy = counter.live - before
            # Built again on weights of its own precision, which can be made fake: it then copies nothing.
            _cast(vae, getattr(torch, config.lpl.lpl_dtype))
        if self.device == "cpu":
            make_fake(vae, self._fake)
        self._told = True
        with _quiet(True):
            loss = build_loss(config, vae, space)
        # The windows' places are read, which fake tensors do not allow, and real ones do not mix with fake ones.
        windows: Any = None if config.lpl.lpl_crop is None else np.zeros((shape[0], 2))
        reach = [*(loss.reach or [1.0] * len(loss.taps)), 0.0]
        flops, peak = 0.0, 0
        for depth, (reached, passed) in enumerate(pairwise(reach), 1):
            if reached > passed:
                # The loss takes its work in smaller parts on a CPU than elsewhere.
                with self._tensors(self.device == "cpu"), FusedAttention(), StepCounter() as counter:
                    pred, target = torch.empty(shape).requires_grad_(), torch.empty(shape)
                    loss(pred, target, windows=windows, depth=None if loss.reach is None else depth)
                flops += (reached - passed) * counter.flops / shape[0]
                peak = max(peak, counter.peak)
        taps = [(tap.name, tap.channels, int(tap.stride), w) for tap, w in zip(loss.taps, loss.weights, strict=True)]
        return LossCost(copy, peak, round(flops), taps)

    def _tensors(self, fake: bool) -> AbstractContextManager[Any]:
        """Where new tensors come from: a fake CPU, or the meta device."""
        return self._fake if fake else torch.device("meta")

    @_once
    def vae(self) -> int:
        """Bytes of the VAE's weights, float32."""
        return _bytes(self._on_meta(self.blueprint.vae))

    def caching(self, config: TrainConfig) -> int:
        """Peak of filling the caches, weights of VAE and text encoders included: the denoiser is not there yet."""
        return self._caching(config.data.crop_size, config.model.offload_text_encoders and self.device != "cpu")

    @_once
    def _caching(self, size: int, offloaded: bool) -> int:
        trained = self.blueprint.trained_encoders  # for which tokens are cached
        encoders = self._on_meta(self.blueprint.text_encoders)[trained:]
        tokens = self.blueprint.tokens(CAPTION_BATCH)[trained:]
        vae = self._on_meta(self.blueprint.vae)
        with torch.device("meta"), torch.no_grad(), FusedAttention():
            with StepCounter() as counter:
                vae.encode(torch.empty(batch_of((3, size, size)), 3, size, size))
            for encoder, ids in zip(encoders, tokens, strict=True):
                with counter:
                    encoder(ids, output_hidden_states=True)
        # Offloaded, one layer at a time is on the device.
        layers = [sum(p.nbytes for p in m.parameters(recurse=False)) for e in encoders for m in e.modules()]
        return counter.peak + _bytes(vae) + (max(layers, default=0) if offloaded else sum(map(_bytes, encoders)))

    def validation(self, config: TrainConfig) -> tuple[int, int]:
        """Peaks of sampling the latents of a validation image and of decoding them, on top of what was there before."""
        return self._validation(_weights(config), self.latents(config, 2))  # with and without the prompt

    @_once
    def _validation(self, kind: Weights, shape: tuple[int, ...]) -> tuple[int, int]:
        denoiser = self._model(kind)
        vae = self._on_meta(self.blueprint.vae)
        tile = [min(side, DECODED_PIXELS // self.blueprint.stride) for side in shape[2:]]
        with torch.no_grad(), FusedAttention():
            with self._tensors(kind.precision in HALF), StepCounter() as sampling, _autocast(kind.precision):
                self.blueprint.denoise(denoiser, *self._inputs(shape))
            with torch.device("meta"), StepCounter() as decoding:
                vae.decode(torch.empty(1, shape[1], *tile))
        image = 3 * 4 * (shape[2] * shape[3]) * self.blueprint.stride**2
        copies = 0 if tile == [*shape[2:]] else 3 * image  # tiles, rows of tiles, and the whole
        return sampling.peak, decoding.peak + copies

    def _on_meta(self, build: Callable[[], T]) -> T:
        with torch.device("meta"):
            return build()


@contextmanager
def _quiet(active: bool) -> Iterator[None]:
    logger = logging.getLogger("lpl.perceptual")
    level = logger.level
    if active:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _weights(config: TrainConfig) -> Weights:
    """The options that decide the denoiser's weights; others are left out, so that plans share what was counted."""
    names = ["rank", "lora_alpha", "lora_dropout", "lora_targets", "use_dora", "quantize_base", "offload_blocks"]
    if config.model.continued_lora is not None:
        names += ["lora_weights", "pretrained_model_name_or_path", "single_file_config"]
    lora = {name: getattr(config.model, name) for name in names}
    own = None if config.model.rank is None else ModelConfig(**lora)
    return Weights(own, config.run.mixed_precision or "no", config.optim.weights_dtype)


def _autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", HALF.get(precision, torch.bfloat16), enabled=precision in HALF)


def _to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What CUDA's autocast does to the inputs of a norm, and the CPU's does not."""
    return tuple(x.float() for x in inputs) if torch.is_autocast_enabled("cpu") else inputs


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
