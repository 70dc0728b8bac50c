"""--clip_skip and --max_token_length: against the text encoders run by hand, layer by layer and chunk by chunk."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.families import blueprint, model_configs, plan_configs
from lpl.families.sdxl import SDXL
from lpl.families.sdxl_configs import NAME

CAPTIONS = [
    "a red fox",
    "",
    "x " * 30,
    "x " * 31,
    "x " * 75,
    "a " * 76 + "b",
    "x " * 149 + "y",
    "x " * 151,
    "w " * 300,
]


def input_of_layer(encoder: torch.nn.Module, index: int, ids: Tensor) -> tuple[Tensor, Any]:
    """What goes into a layer, and the encoder's output."""
    (layers,) = [module for name, module in encoder.named_modules() if name.endswith("encoder.layers")]
    seen: list[Tensor] = []
    handle = layers[index].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        output = encoder(ids)
    handle.remove()
    return seen[0], output


def by_hand(folder: Path, caption: str, clip_skip: int, chunks: int) -> tuple[Tensor, Tensor]:
    """Hidden states (chunks * length, C) and pooled embedding (P,) of one caption, from the model's files."""
    sides, pooled = [], torch.empty(0)
    for part, cls in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{part}")
        encoder = cls.from_pretrained(folder / f"text_encoder{part}").eval()
        length, last = tokenizer.model_max_length, encoder.config.num_hidden_layers - 1
        start, *tokens, end = tokenizer(caption).input_ids
        assert tokenizer.convert_ids_to_tokens([start, end]) == ["<|startoftext|>", "<|endoftext|>"]
        parts = []
        for n in range(chunks):
            ids = torch.full((1, length), 0 if part else end)  # the second one pads with "!", id 0
            chunk = [start, *tokens[n * (length - 2) : (n + 1) * (length - 2)], end]
            ids[0, : len(chunk)] = torch.tensor(chunk)
            hidden, output = input_of_layer(encoder, last - clip_skip, ids)
            parts.append(hidden[0])
            if part and n == 0:
                pooled = output.text_embeds[0]
        sides.append(torch.cat(parts))
    return torch.cat(sides, 1), pooled


@pytest.mark.parametrize(
    ("which", "clip_skip", "tokens"),
    [
        ("tiny", None, 75), ("tiny", 1, 150), ("tiny", None, 225), ("deep", 0, 75), ("deep", 1, 75), ("deep", 2, 150),
        ("deep", None, 150), ("deep", 1, 225),
    ],
)  # fmt: skip
def test_text_is_encoded_layer_by_layer_and_chunk_by_chunk(
    family_of: Callable[..., SDXL], model: Path, deep: Path, which: str, clip_skip: int | None, tokens: int
) -> None:
    loaded = family_of(which, clip_skip=clip_skip, max_token_length=tokens)
    found = loaded.encode_text(CAPTIONS)
    length, chunks = (32, tokens // 75) if which == "tiny" else (77, tokens // 75)
    assert found["prompt_embeds"].shape == (len(CAPTIONS), chunks * length, 24)
    assert found["pooled"].shape == (len(CAPTIONS), 16)
    for n, caption in enumerate(CAPTIONS):
        embeds, pooled = by_hand(model if which == "tiny" else deep, caption, clip_skip or 0, chunks)
        if which == "tiny" and caption == "":  # force_zeros_for_empty_prompt
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        torch.testing.assert_close(found["prompt_embeds"][n], embeds, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["pooled"][n], pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["tiny", "deep"])
@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_one_chunk_is_the_pipelines_own_encoding_bit_for_bit(
    family_of: Callable[..., SDXL], which: str, clip_skip: int | None
) -> None:
    loaded = family_of(which, clip_skip=clip_skip)
    captions = [caption for caption in CAPTIONS if caption]
    found = loaded.encode_text(captions)
    with torch.no_grad():
        embeds, _, pooled, _ = loaded.pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, clip_skip=clip_skip
        )
    assert torch.equal(found["prompt_embeds"], embeds)
    assert torch.equal(found["pooled"], pooled)


def test_skipped_layers_differ(family_of: Callable[..., SDXL]) -> None:
    found = [family_of("deep", clip_skip=skip).encode_text(["a red fox"]) for skip in (0, 1, 2)]
    for n, one in enumerate(found):
        for other in found[:n]:
            assert (one["prompt_embeds"][..., :8] - other["prompt_embeds"][..., :8]).abs().max() > 0.1
            assert (one["prompt_embeds"][..., 8:] - other["prompt_embeds"][..., 8:]).abs().max() > 0.1
            assert torch.equal(one["pooled"], other["pooled"])


@pytest.mark.parametrize("which", ["tiny", "deep"])
def test_further_chunks_change_nothing_of_the_first(family_of: Callable[..., SDXL], which: str) -> None:
    short, long, longest = (family_of(which, max_token_length=n).encode_text(CAPTIONS) for n in (75, 150, 225))
    length = short["prompt_embeds"].shape[1]
    assert torch.equal(long["prompt_embeds"][:, :length], short["prompt_embeds"])
    assert torch.equal(longest["prompt_embeds"][:, : 2 * length], long["prompt_embeds"])
    assert torch.equal(short["pooled"], long["pooled"])
    assert torch.equal(short["pooled"], longest["pooled"])


def test_what_lies_beyond_the_first_chunk_counts(family_of: Callable[..., SDXL]) -> None:
    captions = ["x " * 100 + "fox", "x " * 100 + "dog"]
    short, long = (family_of("deep", max_token_length=n).encode_text(captions)["prompt_embeds"] for n in (75, 150))
    assert torch.equal(short[0], short[1])
    differs = (long[0] != long[1]).any(1)
    assert not differs[: 77 + 1 + 25].any()
    assert differs[77 + 1 + 25]


@pytest.mark.parametrize(("tokens", "cut"), [(75, 4), (150, 2), (225, 1)])
def test_captions_are_counted_that_are_cut(
    family_of: Callable[..., SDXL], caplog: pytest.LogCaptureFixture, tokens: int, cut: int
) -> None:
    loaded = family_of("deep", max_token_length=tokens)
    loaded.free_encoders()  # what other tests have cut
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lpl"):
        loaded.encode_text(CAPTIONS)
        loaded.prepare_prompt("p " * 300)  # no caption
        loaded.free_encoders()
        loaded.free_encoders()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lpl"]
    first = next(c for c in CAPTIONS if len(c.split()) > tokens)
    assert line == f"{cut} captions were cut to {tokens} tokens (--max_token_length {tokens}), first: {first[:80]}"


def test_no_line_is_printed_for_a_caption_that_fits(
    family_of: Callable[..., SDXL], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = family_of("deep", max_token_length=225, clip_skip=0)
    loaded.encode_text(["x " * 225])
    loaded.free_encoders()
    assert not caplog.records
    assert "onger than" not in capfd.readouterr().err


def test_text_key_says_what_encodes(family_of: Callable[..., SDXL]) -> None:
    usual = family_of("deep")
    assert family_of("deep", clip_skip=0, max_token_length=75).text_key == usual.text_key
    others = [
        family_of("deep", clip_skip=skip, max_token_length=tokens) for skip in (None, 1, 2) for tokens in (75, 150, 225)
    ]
    assert len({other.text_key for other in others}) == 9
    assert {other.latent_key for other in others} == {usual.latent_key}


@pytest.mark.parametrize(("which", "tokens"), [("tiny", 75), ("tiny", 150), ("deep", 75), ("deep", 225)])
def test_validation_images_use_both(
    family_of: Callable[..., SDXL], model: Path, deep: Path, which: str, tokens: int
) -> None:
    """As diffusers' pipeline draws them from embeddings that were made by hand."""
    folder, prompt, seed = {"tiny": model, "deep": deep}[which], "a red fox " * 40, 5
    loaded = family_of(which, clip_skip=1, max_token_length=tokens)
    loaded.prepare_prompt(prompt)
    image = loaded.decode(loaded.sample(loaded.denoiser.eval(), prompt, "", seed, 16))
    embeds, pooled = by_hand(folder, prompt, 1, tokens // 75)
    negative, negative_pooled = by_hand(folder, "", 1, tokens // 75)
    if which == "tiny":
        negative, negative_pooled = torch.zeros_like(negative), torch.zeros_like(negative_pooled)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)

    def draw(*encoded: Tensor) -> Any:
        names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
        (drawn,) = pipeline(
            **{name: value[None] for name, value in zip(names, encoded, strict=True)},
            height=16,
            width=16,
            num_inference_steps=SDXL.steps,
            guidance_scale=SDXL.guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images
        return np.asarray(drawn, dtype=int)

    found = np.asarray(image, dtype=int)
    assert np.abs(found - draw(embeds, pooled, negative, negative_pooled)).max() <= 1
    other, _ = by_hand(folder, prompt, 0, tokens // 75)
    assert np.abs(found - draw(other, pooled, negative, negative_pooled)).max() > 1


@pytest.mark.parametrize("tokens", [75, 150, 225])
@pytest.mark.parametrize("which", ["tiny", "deep"])
def test_a_plan_knows_the_shapes(
    family_of: Callable[..., SDXL], model: Path, deep: Path, which: str, tokens: int
) -> None:
    configs = model_configs(ModelConfig(str({"tiny": model, "deep": deep}[which])))
    plan = blueprint(configs, ModelConfig(max_token_length=tokens))
    text = family_of(which, max_token_length=tokens).encode_text(["a fox", "x " * 300])
    assert {name: value.shape for name, value in plan.text(2).items()} == {n: v.shape for n, v in text.items()}
    assert plan.tokens(2)[1].shape == (2, 32 if which == "tiny" else 77)


@pytest.mark.slow
def test_a_plan_counts_longer_captions(run_cli: Any, train: Any, model: Path) -> None:
    def counted(text: str) -> str:
        (line,) = [line for line in text.splitlines() if line.startswith("FLOPs")]
        return line

    argv = ["plan", f"--pretrained_model_name_or_path={model}", "--resolution=16", "--no_use_lpl"]
    code, out, err = run_cli([*argv, "--max_token_length=225"])
    assert code == 0, err
    options = {"use_lpl": False, "lpl_weight": None, "lpl_norm_type": None, "lpl_t_threshold": None}
    short, long = (counted(train("--dry_run", max_token_length=n, **options).stdout) for n in (75, 225))
    assert short != long == counted(out)


def test_clip_skip_leaves_no_encoder_without_a_layer(deep: Path, model: Path, tmp_path: Path) -> None:
    for check in (model_configs, plan_configs):
        check(ModelConfig(str(deep), clip_skip=2))
        with pytest.raises(UserError, match=r"^--clip_skip 3: .*text_encoder_2 has 3 layers") as caught:
            check(ModelConfig(str(deep), clip_skip=3))
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=r"^--clip_skip 2: .*text_encoder has 2 layers"):
            check(ModelConfig(str(model), clip_skip=2))
    for name in (None, NAME):
        plan_configs(ModelConfig(name, clip_skip=11))
        with pytest.raises(UserError, match=r"^--clip_skip 12: .*text_encoder has 12 layers"):
            plan_configs(ModelConfig(name, clip_skip=12))
    parts = ("conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.ln_final.weight")
    parts += ("model.diffusion_model.x", "first_stage_model.x")
    header = {key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for key in parts}
    text = json.dumps(header).encode()
    file = tmp_path / "one.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert model_configs(ModelConfig(str(file), clip_skip=11)) == {}
    for check in (model_configs, plan_configs):
        with pytest.raises(UserError, match=r"^--clip_skip 12: .*text_encoder has 12 layers"):
            check(ModelConfig(str(file), clip_skip=12))


def test_a_run_trains_on_long_captions(train: Any, data: Path, tmp_path: Path) -> None:
    """From the command line to the exported pipeline, with dropped captions and validation images."""
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps(line | {"text": "y " * 40 + line["text"][:9]}) for line in lines)
    )
    options = {
        "train_data_dir": folder, "validation_prompt": "y " * 45, "num_validation_images": 1, "validation_steps": 2,
        "proportion_empty_prompts": 0.3, "train_batch_size": 3, "dataloader_num_workers": 0,
    }  # fmt: skip
    short = train(**options, output="short")
    long = train(**options, output="long", max_token_length=150)
    skipped = train(**options, output="skipped", max_token_length=150, clip_skip=1)
    again = train(**options, output="again", max_token_length=150)
    assert "6 captions were cut to 30 tokens (--max_token_length 75)" in short.stderr
    assert "were cut" not in long.stderr + skipped.stderr
    assert "onger than" not in short.stderr + long.stderr
    runs = [run.losses()["train_loss"] for run in (short, long, skipped)]
    assert all(math.isfinite(value) for run in runs for value in run.values())
    assert runs[0] != runs[1] != runs[2] != runs[0]
    assert again.losses() == long.losses()
    images = [(run.folder / "samples" / "step-0000002.png").read_bytes() for run in (short, long, again)]
    assert images[0] != images[1] == images[2]
    refused = train(expect_error=True, output="deep", clip_skip=2)
    assert refused.errors == ["error: --clip_skip 2: the model's text_encoder has 2 layers; give less than that"]
