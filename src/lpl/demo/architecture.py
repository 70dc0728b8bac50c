"""The demo's StableDiffusionXLPipeline: every part of SDXL, at widths that a CPU can train in minutes."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lpl.demo.photographs import IMAGE_SIZE, all_captions

LATENT_CHANNELS = 16
TEXT_WIDTHS = (64, 96)  # different, as in SDXL: tools distinguish the two text encoders by them
UNET_WIDTHS = (80, 96)
TIME_ID_WIDTH = 16
MAX_TOKENS = 32  # the longest caption takes 18
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"


def byte_characters() -> list[str]:
    """The 256 printable characters that byte-level BPE uses for bytes, in CLIP's order: "!" is the first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


@functools.cache
def learn_merges(captions: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Byte pair merges learned from captions, most frequent pair first, until each of their words is one token."""
    counts = Counter(word for caption in captions for word in caption.lower().replace(",", " ,").split())
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            return tuple(merges)
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in words.values():
            index = 0
            while index < len(symbols) - 1:
                if (symbols[index], symbols[index + 1]) == best:
                    symbols[index : index + 2] = ["".join(best)]
                index += 1


def build_vocabulary(captions: tuple[str, ...]) -> dict[str, int]:
    """Token to id: bytes, bytes that end a word, merges of these captions' words, start and end."""
    characters = byte_characters()
    tokens = [*characters, *(character + "</w>" for character in characters)]
    tokens += ["".join(pair) for pair in learn_merges(captions)]
    return {token: index for index, token in enumerate([*tokens, START_TOKEN, END_TOKEN])}


def build_tokenizers(captions: tuple[str, ...] | None = None) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """SDXL's pair with one vocabulary, from the captions' words (None: the demo's); the second pads with "!" (id 0)."""
    captions = tuple(all_captions()) if captions is None else captions
    vocabulary = build_vocabulary(captions)
    merges: list = list(learn_merges(captions))  # pairs, though the signature says strings
    first, second = (
        CLIPTokenizer(
            vocab=vocabulary,
            merges=merges,
            bos_token=START_TOKEN,
            eos_token=END_TOKEN,
            unk_token=END_TOKEN,
            pad_token=pad_token,
            model_max_length=MAX_TOKENS,
        )
        for pad_token in (END_TOKEN, "!")
    )
    return first, second


def _text_config(width: int, activation: str, vocabulary: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        bos_token_id=vocabulary[START_TOKEN],
        eos_token_id=vocabulary[END_TOKEN],
        pad_token_id=vocabulary[END_TOKEN],
    )


def build_text_encoders(
    captions: tuple[str, ...] | None = None,
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two small CLIP text encoders with SDXL's activations; the second gives the pooled embedding too."""
    vocabulary = build_vocabulary(tuple(all_captions()) if captions is None else captions)
    return (
        CLIPTextModel(_text_config(TEXT_WIDTHS[0], "quick_gelu", vocabulary)),
        CLIPTextModelWithProjection(_text_config(TEXT_WIDTHS[1], "gelu", vocabulary)),
    )


def build_vae(scaling_factor: float = 1.0) -> AutoencoderKL:
    """A four-block autoencoder of stride 8; scaling_factor is 1 / standard deviation of its latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=scaling_factor,
        force_upcast=True,
    )


def build_unet(widths: tuple[int, int] = UNET_WIDTHS) -> UNet2DConditionModel:
    """A two-level UNet, attention at the lower one, with SDXL's conditioning.

    Cross attention sees both text encoders' states, concatenated; the pooled embedding and six sizes join the timestep.
    """
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=widths,
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=tuple(width // 16 for width in widths),
        norm_num_groups=16,
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + TEXT_WIDTHS[1],
    )


def build_scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise schedule: scaled linear from 0.00085 to 0.012 over 1000 steps, noise prediction."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        interpolation_type="linear",
        use_karras_sigmas=False,
        timestep_spacing="leading",
        steps_offset=1,
    )


def build_pipeline(scaling_factor: float = 1.0) -> StableDiffusionXLPipeline:
    """The whole pipeline with fresh weights."""
    tokenizer, tokenizer_2 = build_tokenizers()
    text_encoder, text_encoder_2 = build_text_encoders()
    return StableDiffusionXLPipeline(
        vae=build_vae(scaling_factor),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=build_unet(),
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
