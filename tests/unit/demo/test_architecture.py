"""The demo's networks and tokenizers: SDXL's parts, in SDXL's roles."""

from __future__ import annotations

from lpl.demo.architecture import (
    MAX_TOKENS,
    build_pipeline,
    build_tokenizers,
    build_vocabulary,
    byte_characters,
    learn_merges,
)
from lpl.demo.photographs import all_captions


def test_byte_characters_are_clips() -> None:
    characters = byte_characters()
    assert len(set(characters)) == 256
    assert (characters[0], characters[93], characters[94]) == ("!", "~", "¡")


def test_merges_make_each_word_of_a_caption_one_token() -> None:
    merges = learn_merges(tuple(all_captions()))
    assert len(set(merges)) == len(merges)
    tokenizer, _ = build_tokenizers()
    caption = "a close-up photo of a tabby cat with green eyes, upper left"
    words = tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids)[1:-1]
    assert words[-5:] == ["green</w>", "eyes</w>", ",</w>", "upper</w>", "left</w>"]


def test_every_caption_fits_and_words_outside_the_captions_are_spelled() -> None:
    tokenizer, _ = build_tokenizers()
    assert max(len(ids) for ids in tokenizer(all_captions()).input_ids) <= MAX_TOKENS
    assert tokenizer.decode(tokenizer("zebra").input_ids, skip_special_tokens=True).strip() == "zebra"


def test_tokenizers_differ_in_padding_alone() -> None:
    first, second = build_tokenizers()
    vocabulary = build_vocabulary(tuple(all_captions()))
    assert first.get_vocab() == second.get_vocab() == vocabulary
    assert first.pad_token_id == first.eos_token_id == len(vocabulary) - 1
    assert (second.pad_token, second.pad_token_id) == ("!", 0)


def test_pipeline_has_sdxls_shape() -> None:
    pipeline = build_pipeline(scaling_factor=0.5)
    assert pipeline.vae.config.scaling_factor == 0.5
    assert pipeline.vae.config.force_upcast
    assert len(pipeline.vae.decoder.up_blocks) == 4
    assert pipeline.vae.quant_conv is not None
    assert pipeline.vae.post_quant_conv is not None
    assert pipeline.vae_scale_factor == 8
    assert pipeline.default_sample_size * pipeline.vae_scale_factor == 64
    assert pipeline.text_encoder.config.hidden_size != pipeline.text_encoder_2.config.hidden_size
    assert pipeline.unet.config.addition_embed_type == "text_time"
    assert pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.scheduler.config.prediction_type == "epsilon"
