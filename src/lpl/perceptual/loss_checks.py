"""Checks of what a loss is built and called with: each raises a ValueError that says what to do."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lpl.base.arguments import integer, is_number
from lpl.perceptual.decoders import Decoder, HookTaps, Tap
from lpl.perceptual.input_checks import given


def check_options(
    decoder: Decoder,
    compared: Sequence[Tap],
    chosen: Sequence[int],
    remove_outliers: bool,
    checkpointing: bool,
    crop: int | None,
) -> None:
    """Checks options that not every decoder allows."""
    unknown = [tap.name for tap in compared if not tap.stride]
    if remove_outliers and unknown:
        raise ValueError(
            f"outlier masks follow the strides of {', '.join(unknown)}: pass strides=, the output's pixels per cell of "
            "each stage's map, or remove_outliers=False"
        )
    if checkpointing and isinstance(decoder, HookTaps):
        raise ValueError("checkpointing recomputes stages, which hooks do not know: pass stages=, or leave it off")
    if crop is not None and (not decoder.croppable or chosen[0] != 0):
        raise ValueError(
            "crop cuts a window behind the first tap, of latents' size: it takes a VAE with a middle block, which is "
            "compared; leave it out"
        )


def check_latent_space(space: Any, decoder: Decoder) -> None:
    """Checks that it maps latents with the decoder's number of channels, where that is known."""
    if isinstance(space, type) or not hasattr(space, "to_raw"):
        raise ValueError(f"latent_space is {given(space)}: pass a LatentSpace, such as LatentSpace.scaled(0.18215)")
    channels = len(getattr(space, "scale", " "))
    if channels != 1 and decoder.latent_channels not in (None, channels):
        raise ValueError(f"latent_space is of {channels} channels, the VAE's latents have {decoder.latent_channels}")


def check_depth(depth: Any, reach: Any, taps: int, random: bool) -> None:
    """Checks how far a call goes: all taps, a depth with random_depth, or a probability for each tap it reaches."""
    if depth is not None and (not random or not 1 <= integer("depth", depth) <= taps):
        raise ValueError(f"depth {depth} needs random_depth and must lie in 1..{taps}")
    if reach is None:
        return
    listed = list(reach) if isinstance(reach, Iterable) else []
    if depth is not None or not 1 <= len(listed) <= taps or not all(is_number(p) and 0 < p <= 1 for p in listed):
        raise ValueError(f"reach {reach!r}: pass probabilities above 0 of 1 to {taps} taps, instead of a depth")


def check_pair(pred: Tensor, target: Tensor, decoder: Decoder) -> None:
    """Checks two latents: of one shape, on one device, as the decoder takes them."""
    tensors = isinstance(pred, Tensor) and isinstance(target, Tensor)
    axes = decoder.axes
    spaces = {1: "(B, C, w)", 2: "(B, C, h, w)", 3: "(B, C, T, h, w)" if decoder.frames else "(B, C, d, h, w)"}
    if (
        not tensors
        or pred.shape != target.shape
        or pred.device != target.device
        or pred.dim() - 2 not in axes
        or not pred.numel()
        or not (pred.is_floating_point() and target.is_floating_point())
    ):
        raise ValueError(
            f"latents: {given(pred)} and {given(target)}; pass two {' or '.join(spaces[n] for n in axes)} of one "
            "shape and of floating point, on one device"
        )
    if decoder.latent_channels is not None and pred.shape[1] != decoder.latent_channels:
        raise ValueError(f"latents have {pred.shape[1]} channels, the VAE's have {decoder.latent_channels}")
    frames = pred.shape[2] if decoder.frames and pred.dim() == 5 else 1
    if decoder.max_frames is not None and frames > decoder.max_frames:
        raise ValueError(
            f"latents of {frames} frames: this decoder is walked {decoder.max_frames} at a time (it decodes more in "
            "pieces); pass fewer"
        )


def check_modules(decoder: Decoder, dtype: torch.dtype, device: torch.device, copied: bool) -> None:
    """Checks the decoder's modules: eval mode, the latents' device (moves a private copy to it), the loss's dtype."""
    if training := decoder.in_training():
        raise ValueError(f"the VAE, or a part of its decoder, is in training mode ({training}): call .eval() on it")
    for module in decoder.modules():
        weight = next(module.parameters(), None)
        if weight is None:
            continue
        if copied and weight.device != device:
            module.to(device)
        elif weight.device != device:
            raise ValueError(f"the VAE is on {weight.device}, the latents on {device}: move one of them")
        if weight.dtype != dtype:
            raise ValueError(f"the VAE was cast to {weight.dtype} after the loss was built for {dtype}")
