"""What the loss needs to know of a decoder: its stages in order, and how to run one at a time."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


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
        num_up_blocks: how many stages follow the first one.
    """

    taps: tuple[Tap, ...]

    @property
    def num_up_blocks(self) -> int:
        return len(self.taps) - 1

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of a latent."""

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
