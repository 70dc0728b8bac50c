"""Which decoders LPL can walk. Names of VAE classes live in this package only."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lpl.perceptual.decoders.autoencoder_kl import AutoencoderKLTaps
from lpl.perceptual.decoders.base import DecoderTaps, Tap

DECODERS: dict[str, Callable[[Any], DecoderTaps]] = {"AutoencoderKL": AutoencoderKLTaps}


def decoder_taps(vae: Any) -> DecoderTaps:
    """The walk through a VAE's decoder, chosen by the name of its class or of the classes it derives from.

    Raises:
        ValueError: no module, a class without a walk, or a VAE in training mode.
    """
    if not isinstance(vae, nn.Module):
        hint = "pass its .vae" if hasattr(vae, "vae") else "pass the loaded VAE"
        raise ValueError(f"vae is a {type(vae).__name__}: {hint}")
    if vae.training:
        raise ValueError("the VAE is in training mode: call vae.eval() before building the loss")
    for cls in type(vae).__mro__:
        if cls.__name__ in DECODERS:
            return DECODERS[cls.__name__](vae)
    inside = getattr(vae, "_orig_mod", getattr(vae, "module", None))  # of torch.compile; of DistributedDataParallel
    hint = f": pass the {type(inside).__name__} inside it" if isinstance(inside, nn.Module) else ""
    raise ValueError(f"no walk through the decoder of {type(vae).__name__}{hint}; known: {', '.join(DECODERS)}")


__all__ = ["DecoderTaps", "Tap", "decoder_taps"]
