"""Which decoders LPL can walk. Names of VAE classes live in this package only."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lpl.perceptual.decoders import causal, images, videos
from lpl.perceptual.decoders.autoencoder_kl import AutoencoderKLTaps, VQTaps
from lpl.perceptual.decoders.base import Decoder, DecoderTaps, Tap, VaeTaps
from lpl.perceptual.decoders.hunyuan_image import HunyuanImageTaps
from lpl.perceptual.decoders.own import HookTaps, StageTaps

DECODERS: dict[str, Callable[[Any], DecoderTaps]] = {
    "AutoencoderKL": AutoencoderKLTaps,
    "AutoencoderKLFlux2": AutoencoderKLTaps,
    "AsymmetricAutoencoderKL": AutoencoderKLTaps,
    "VQModel": VQTaps,
    "AutoencoderTiny": images.TinyTaps,
    "AutoencoderDC": images.DCTaps,
    "AutoencoderKLHunyuanImage": HunyuanImageTaps,
    "AutoencoderKLKVAE": images.KVAETaps,
    "AutoencoderRAE": images.RAETaps,
    "AutoencoderKLQwenImage": causal.CausalTaps,
    "AutoencoderKLWan": causal.CausalTaps,
    "AutoencoderKLQwenImage21": causal.QwenImage21Taps,
    "AutoencoderKLHunyuanVideo": videos.VideoTaps,
    "AutoencoderKLHunyuanVideo15": videos.HunyuanVideo15Taps,
    "AutoencoderKLHunyuanImageRefiner": videos.HunyuanVideo15Taps,
    "AutoencoderKLCogVideoX": videos.CogVideoXTaps,
    "AutoencoderKLLTXVideo": videos.LTXTaps,
    "AutoencoderKLLTX2Video": videos.LTX2Taps,
    "AutoencoderKLMochi": videos.MochiTaps,
    "AutoencoderKLMagvit": videos.MagvitTaps,
    "AutoencoderKLCosmos": videos.CosmosTaps,
    "AutoencoderKLTemporalDecoder": videos.TemporalDecoderTaps,
}
AUDIO = "it decodes sound, not images"
UNWALKED = "its decoder has not been walked"
DIFFUSES = "it decodes by diffusion, with noise of its own: two passes through it differ"
REFUSED = {
    "ConsistencyDecoderVAE": DIFFUSES,
    "LTX2VideoDiffusionDecoderModel": DIFFUSES,
    "AutoencoderKLAllegro": UNWALKED,
    "AutoencoderKLKVAEVideo": UNWALKED,
    "AutoencoderKLMiniMaxH3": UNWALKED,
    "AutoencoderVidTok": UNWALKED,
    "Kandinsky6SRVAE": UNWALKED,
    "AutoencoderKLKVAEAudio": AUDIO,
    "AutoencoderKLLTX2Audio": AUDIO,
    "AutoencoderKLMiniMaxH3Audio": AUDIO,
    "AutoencoderOobleck": AUDIO,
    "AutoencoderSAME": AUDIO,
    "Cosmos3AVAEAudioTokenizer": AUDIO,
    "LongCatAudioDiTVae": AUDIO,
    "MMAudioVAE": AUDIO,
    "RFD4ProteinaAutoencoder": "it decodes molecules, not images",
}
"""Decoders of diffusers that are not walked, and why."""
OWN = "pass stages= or a HookTaps, see docs/decoders.md"


def any_decoder(
    vae: Any, stages: Sequence[Callable[..., Any]] | None, strides: Sequence[float] | None
) -> DecoderTaps | HookTaps:
    """The decoder of a VAE or of one's own.

    Args:
        vae: a VAE of diffusers in eval mode, a DecoderTaps or a HookTaps; None where stages are given.
        stages, strides: as StageTaps takes them.

    Raises:
        ValueError: not exactly one of vae and stages, strides without stages, or a decoder that is not walked.
    """
    if (vae is None) == (stages is None):
        raise ValueError(f"pass a VAE or stages=, {'one of them' if vae is None else 'not both'}")
    if stages is not None:
        return StageTaps(stages, strides)
    if strides is not None:
        raise ValueError("strides go with stages=: those of a VAE are known")
    return vae if isinstance(vae, DecoderTaps | HookTaps) else decoder_taps(vae)


def is_own(decoder: Decoder) -> bool:
    """Whether it is the caller's own, not one of diffusers' VAEs."""
    return not isinstance(decoder, VaeTaps)


def decoder_taps(vae: Any) -> DecoderTaps:
    """The walk through a VAE's decoder, chosen by the name of its class or of the classes it derives from.

    Args:
        vae: a VAE of diffusers in eval mode.

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
        if cls.__name__ in REFUSED:
            raise ValueError(f"no walk through the decoder of {cls.__name__}: {REFUSED[cls.__name__]}; {OWN}")
    inside = getattr(vae, "_orig_mod", getattr(vae, "module", None))  # of torch.compile; of DistributedDataParallel
    hint = f"pass the {type(inside).__name__} inside it" if isinstance(inside, nn.Module) else OWN
    raise ValueError(f"no walk through the decoder of {type(vae).__name__}: {hint}; known: {', '.join(DECODERS)}")


__all__ = ["Decoder", "DecoderTaps", "HookTaps", "StageTaps", "Tap", "VaeTaps", "any_decoder", "decoder_taps", "is_own"]
