"""Whether a loss is built and called with what it takes: each check raises a ValueError that says what to do."""

from collections.abc import Sequence

import torch
from torch import Tensor

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
    """What a decoder allows."""
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


def check_pair(pred: Tensor, target: Tensor, decoder: Decoder) -> None:
    """Two latents of one shape, on one device, as the decoder takes them."""
    tensors = isinstance(pred, Tensor) and isinstance(target, Tensor)
    axes = decoder.axes
    spaces = {1: "(B, C, w)", 2: "(B, C, h, w)", 3: "(B, C, T, h, w)" if decoder.frames else "(B, C, d, h, w)"}
    if (
        not tensors
        or pred.shape != target.shape
        or pred.device != target.device
        or pred.dim() - 2 not in axes
        or not pred.numel()
    ):
        raise ValueError(
            f"latents: {given(pred)} and {given(target)}; pass two {' or '.join(spaces[n] for n in axes)} of one "
            "shape, on one device"
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
    """The decoder's modules in eval mode, on the latents' device and in the loss's dtype; moves a private copy."""
    for module in decoder.modules():
        if any(part.training for part in module.modules()):
            raise ValueError("the VAE, or a part of its decoder, is in training mode: call vae.eval()")
        weight = next(module.parameters(), None)
        if weight is None:
            continue
        if copied and weight.device != device:
            module.to(device)
        elif weight.device != device:
            raise ValueError(f"the VAE is on {weight.device}, the latents on {device}: move one of them")
        if weight.dtype != dtype:
            raise ValueError(f"the VAE was cast to {weight.dtype} after the loss was built for {dtype}")
