"""What the loss needs of a decoder: its stages in order, and how to run them."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from lpl.diffusion.latent_space import LatentSpace
from lpl.perceptual.convolution import Head, Operation
from lpl.perceptual.decoders.blocks import as_built
from lpl.perceptual.feature_maps import State, map_of
from lpl.perceptual.frozen import Fuse, Identity, Plain
from lpl.perceptual.sweep import Segment

logger = logging.getLogger("lpl")


class Tap(NamedTuple):
    """A place where features are compared."""

    name: str
    channels: int
    """0: not known before features are computed."""
    stride: float
    """Pixels of the image per cell of this feature map; 0: not known."""


class Decoder(ABC):
    """What is known of any decoder.

    Attributes:
        taps: first to last.
        latent_channels: channels of the latents; None: whatever the first stage takes.
        axes: how many axes of space latents may have.
        frames: the maps (B, C, T, H, W) of latents (B, C, T, h, w) are compared frame by frame; latents (B, C, h, w)
            are one frame.
        max_frames: maximum number of frames of latents; None: any number.
        croppable: the first tap's map is of the latents' size, and a window of it may be decoded alone.
    """

    taps: tuple[Tap, ...]
    latent_channels: int | None
    axes: tuple[int, ...] = (2,)
    frames: bool = False
    max_frames: int | None = None
    croppable: bool = False

    @property
    def latent_space(self) -> LatentSpace:
        """How model space maps to raw latents by default.

        Raises:
            ValueError: the decoder does not state it.
        """
        raise ValueError("pass latent_space=, how model space maps to what the decoder takes")

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """The modules that the walk runs: they are frozen, checked and, for another precision, copied."""

    def in_training(self) -> str:
        """The class name of a module in training mode that the walk runs; empty if there is none."""
        return next((type(part).__name__ for m in self.modules() for part in m.modules() if part.training), "")

    def try_out(self, raw_latents: Tensor, chosen: Sequence[int]) -> None:  # noqa: B027
        """A trial on one sample's raw latents, for decoders not known to run; chosen: the compared taps' numbers.

        Raises:
            ValueError: the decoder does not run.
        """

    @abstractmethod
    def copy_to(self, dtype: torch.dtype) -> Self:
        """The same decoder with a private copy of its weights in dtype."""


class DecoderTaps(Decoder):
    """A decoder as a walk: raw latents -> begin -> stage 0 -> stage 1 -> ... ; each stage's output is a tap.

    Running every stage and then `finish` equals `vae.decode(raw_latents)`. What a stage passes on is a feature map (B,
    C, H, W), (B, C, L) or (B, C, D, H, W), or a tuple that begins with it (feature_maps.py).
    """

    @abstractmethod
    def begin(self, raw_latents: Tensor) -> State:
        """Raw latents (B, C, h, w) to the input of stage 0."""

    @abstractmethod
    def run(self, stage: int, x: State) -> State:
        """A stage's output, from the output of the stage before it."""

    @abstractmethod
    def finish(self, x: State) -> Tensor:
        """The last stage's output to the image, (B, 3, H, W), about [-1, 1]."""

    def segments(self, fuse: Fuse) -> list[Segment]:
        """The stages as segments (the first includes `begin`), each with its own forward and backward pass.

        By default plain blocks, through autograd; a decoder may override it with the operations of frozen.py. The heads
        follow the taps: tap i is the output of the head of segment i + 1, and the list ends with the last tap's head.

        Args:
            fuse: applied to pointwise functions.
        """
        return self.plain_segments()

    def plain_segments(self) -> list[Segment]:
        """The stages as plain blocks."""
        plain = [Segment(Identity(), [self.plain(stage)]) for stage in range(len(self.taps))]
        return [*plain, Segment(Identity(), [])]

    def plain(self, stage: int) -> Plain:
        """A stage (the first includes `begin`) as plain blocks."""
        return Plain(lambda x: self.run(stage, x if stage else self.begin(x)), self.taps[stage].name)


class VaeTaps(DecoderTaps):
    """The walk through a VAE of diffusers: what all classes share.

    Widths and strides are read off the maps of latents of zeros of 2 x 2 cells.

    Args:
        vae: the VAE, in eval mode.

    Raises:
        ValueError: the VAE is not built like diffusers' class of that name, or in a way that is not supported.
    """

    parts: ClassVar[tuple[str, ...]] = ("conv_in", "mid_block", "up_blocks")
    """Attributes that tell diffusers' class from others of the same name."""
    channels_key: ClassVar[str] = "latent_channels"
    first_name: ClassVar[str] = "mid"

    def __init__(self, vae: Any) -> None:
        decoder = getattr(vae, "decoder", None)
        missing = [part for part in self.parts if not hasattr(decoder, part)]
        if missing or not hasattr(vae, "config"):
            raise ValueError(
                f"{type(vae).__module__}.{type(vae).__name__} is not diffusers' {type(vae).__name__}, which is walked "
                f"(no {'decoder.' + missing[0] if missing else 'config'}): pass stages= or a HookTaps, see "
                "docs/decoders.md"
            )
        self._vae = vae
        self.check()
        self.latent_channels = int(vae.config[self.channels_key])
        self.taps = self.measure()

    def check(self) -> None:
        """Raises a ValueError where the VAE is built in a way that is not supported."""

    def refuse(self, why: str) -> None:
        """Raises that ValueError."""
        raise ValueError(f"{type(self._vae).__name__}: {why}")

    @property
    def decoder(self) -> Any:
        return self._vae.decoder

    @property
    def latent_space(self) -> LatentSpace:
        return LatentSpace.from_vae(self._vae)

    def modules(self) -> list[nn.Module]:
        return [m for m in (getattr(self._vae, "post_quant_conv", None), self.decoder) if m is not None]

    def copy_to(self, dtype: torch.dtype) -> Self:
        other = copy.copy(self)
        other._vae = copy.copy(self._vae)
        other._vae._modules = {k: m for k, m in self._vae._modules.items() if k in ("post_quant_conv", "decoder")}
        other._vae = nn.Module.to(copy.deepcopy(other._vae), dtype)  # not vae.to(), which warns of float16
        return other

    def stages(self) -> Sequence[Callable[..., State]]:
        """The stages in order: the middle block and the up blocks."""
        return [self.decoder.mid_block, *self.decoder.up_blocks]

    def run(self, stage: int, x: State) -> State:
        return self.stages()[stage](x)

    def begin(self, raw_latents: Tensor) -> State:
        return self.decoder.conv_in(self.quantised(raw_latents))

    def quantised(self, raw_latents: Tensor) -> Tensor:
        """The latents after post_quant_conv, where the VAE has one; for video decoders with an axis of frames."""
        if self.frames and raw_latents.dim() == 4:
            raw_latents = raw_latents.unsqueeze(2)
        convolution = getattr(self._vae, "post_quant_conv", None)
        return raw_latents if convolution is None else convolution(raw_latents)

    def frozen_segments(
        self, stages: Sequence[tuple[list[Operation], Head] | None], plain: Callable[[int], Operation] | None = None
    ) -> list[Segment]:
        """Segments of each stage's operations and the head behind them.

        Args:
            stages: None for a stage that is built otherwise: it runs as plain blocks, and the log says so.
            plain: a stage as plain blocks; None: `self.plain`.
        """
        heads: list[Head] = [Identity()]
        bodies: list[list[Operation]] = []
        for stage, (tap, found) in enumerate(zip(self.taps, stages, strict=True)):
            if found is None or not self._as_built(stage):
                logger.info("LPL: %s has no frozen operations and runs as plain blocks", tap.name)
                found = [(plain or self.plain)(stage)], Identity()
            bodies.append(found[0])
            heads.append(found[1])
        return [Segment(head, body) for head, body in zip(heads, [*bodies, []], strict=True)]

    def _as_built(self, stage: int) -> bool:
        """Whether the modules of a stage (the first includes `begin`) are unchanged, see as_built."""
        own: list[Any] = [self.stages()[stage]]
        if not isinstance(own[0], nn.Module):
            own = self.modules()
        elif not stage:
            own += [m for m in (getattr(self._vae, "post_quant_conv", None), self.decoder.conv_in) if m is not None]
        return all(map(as_built, own))

    @torch.no_grad()
    def measure(self, cells: int = 2) -> tuple[Tap, ...]:
        """The taps, by decoding."""
        weight = next(self.decoder.parameters())
        x = self.begin(
            torch.zeros(1, self.latent_channels or 0, cells, cells, dtype=weight.dtype, device=weight.device)
        )
        maps = []
        for stage in range(len(self.stages())):
            x = self.run(stage, x)
            maps.append(map_of(x))
        pixels = self.finish(x).shape[-1]
        names = [self.first_name, *(f"up_{i}" for i in range(len(maps) - 1))]
        return tuple(Tap(name, m.shape[1], pixels // m.shape[-1]) for name, m in zip(names, maps, strict=True))
