"""What the loss needs to know of a decoder: its stages in order, and how to run them."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from lpl.perceptual.frozen import Fuse, Identity, Plain
from lpl.perceptual.sweep import Segment


class Tap(NamedTuple):
    """A place where features are compared."""

    name: str
    channels: int
    stride: int
    """Pixels of the image per cell of this feature map."""


class DecoderTaps(ABC):
    """A decoder as a walk: raw latents -> begin -> stage 0 -> stage 1 -> ... ; each stage's output is a tap.

    Running every stage and then `finish` equals `vae.decode(raw_latents)`.

    Attributes:
        taps: one per stage, first to last.
        latent_channels: of the latents.
    """

    taps: tuple[Tap, ...]
    latent_channels: int

    @property
    def num_up_blocks(self) -> int:
        """How many stages follow the first one."""
        return len(self.taps) - 1

    @abstractmethod
    def modules(self) -> list[torch.nn.Module]:
        """The modules that the walk runs: what is frozen, checked and, for another precision, copied."""

    @abstractmethod
    def copy_to(self, dtype: torch.dtype) -> "DecoderTaps":
        """The same decoder with a private copy of its weights in dtype."""

    @abstractmethod
    def begin(self, raw_latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) to the input of stage 0."""

    @abstractmethod
    def run(self, stage: int, x: Tensor) -> Tensor:
        """The output of a stage for the output of the one before."""

    @abstractmethod
    def finish(self, x: Tensor) -> Tensor:
        """The last stage's output to the image, (B, 3, H, W), about [-1, 1]."""

    def segments(self, fuse: Fuse) -> list[Segment]:
        """The stages as segments (the first one with `begin`) that run forward and backward by hand.

        Here: plain blocks, through autograd. A decoder overrides it with the operations of frozen.py. The heads follow
        the taps: tap i is the output of the head of segment i + 1, and the list ends with the last tap's head.

        Args:
            fuse: applied to pointwise functions.
        """
        plain = [Segment(Identity(), [self.plain(stage)]) for stage in range(len(self.taps))]
        return [*plain, Segment(Identity(), [])]

    def plain(self, stage: int) -> Plain:
        """A stage (the first one with `begin`) as plain blocks."""

        def function(x: Tensor) -> Tensor:
            return self.run(stage, x if stage else self.begin(x))

        return Plain(function)
