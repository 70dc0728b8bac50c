"""SDXL as a family: encodes, denoises, samples and saves as diffusers' own pipeline does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny_models import tiny_sdxl

from lpl.config import ModelConfig
from lpl.families import blueprint, load_family, model_configs, schedule_of_configs
from lpl.families.sdxl import SDXL
from lpl.families.sdxl_check import SDXL_KIND

CAPTIONS = ["a red fox", "picture 3 of a pattern", "x " * 200]


def load(folder: Path, **options: Any) -> SDXL:
    return load_family(ModelConfig(str(folder), **options), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def family(model: Path) -> SDXL:
    return load(model)


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_text_is_encoded_as_the_pipeline_does(family: SDXL, pipeline: Any) -> None:
    found = family.encode_text(CAPTIONS)
    with torch.no_grad():
        for i, caption in enumerate(CAPTIONS):
            embeds, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
            torch.testing.assert_close(found["prompt_embeds"][i], embeds[0])
            torch.testing.assert_close(found["pooled"][i], pooled[0])
    assert not torch.equal(found["pooled"][0], found["pooled"][1])


@pytest.mark.parametrize("force_zeros", [True, False])
def test_dropped_caption_is_what_the_pipeline_uses_for_none(model: Path, tmp_path: Path, force_zeros: bool) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": force_zeros}))
    family = load(folder)
    found = family.encode_text(["", "a fox"])
    with torch.no_grad():
        _, negative, _, negative_pooled = family.pipeline.encode_prompt("a fox", do_classifier_free_guidance=True)
    torch.testing.assert_close(found["prompt_embeds"][0], negative[0])
    torch.testing.assert_close(found["pooled"][0], negative_pooled[0])
    assert bool((found["prompt_embeds"][0] == 0).all()) is force_zeros
    assert (found["prompt_embeds"][1] != 0).any()


def test_images_are_encoded_to_mean_and_std(family: SDXL, pipeline: Any) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(pixels)
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(std, expected.std)
    assert mean.dtype == std.dtype == torch.float32


def test_sizes_are_sdxl_time_ids(family: SDXL, pipeline: Any) -> None:
    """What the UNet is conditioned on equals what the pipeline makes of the same sizes."""
    seen: dict[str, Any] = {}

    def denoiser(*args: Any, added_cond_kwargs: Any, **_: Any) -> tuple[torch.Tensor]:
        seen.update(added_cond_kwargs)
        return (args[0],)

    sizes = torch.tensor([[480.0, 640.0, 8.0, 24.0, 16.0, 16.0]])
    text = {"prompt_embeds": torch.zeros(1, 5, 24), "pooled": torch.ones(1, 16)}
    family.denoise(denoiser, torch.zeros(1, 4, 4, 4), torch.tensor([3]), text, {"sizes": sizes})  # type: ignore[arg-type]
    expected = pipeline._get_add_time_ids((480, 640), (8, 24), (16, 16), torch.float32, 16)
    assert torch.equal(seen["time_ids"], expected)
    assert torch.equal(seen["text_embeds"], text["pooled"])


def change(file: Path, part: str) -> None:
    weights = load_file(file)
    name = next(n for n in sorted(weights) if n.startswith(part) and n.endswith("weight"))
    save_file(weights | {name: weights[name] * 1.5}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "part", "latents", "text"),
    [
        ("vae", "encoder.", True, False),
        ("vae", "quant_conv", True, False),
        ("vae", "decoder.", False, False),
        ("vae", "post_quant_conv", False, False),
        ("unet", "conv_in", False, False),
        ("text_encoder", "", False, True),
        ("text_encoder_2", "", False, True),
    ],
)
def test_cache_keys_change_with_what_encodes(
    family: SDXL, model: Path, tmp_path: Path, file: str, part: str, latents: bool, text: bool
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    (weights,) = (folder / file).glob("*.safetensors")
    change(weights, part)
    other = load(folder)
    assert (other.latent_key != family.latent_key) is latents
    assert (other.text_key != family.text_key) is text


def fewer_merges(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]


@pytest.mark.parametrize(
    ("file", "edit", "changes"),
    [
        ("tokenizer/tokenizer.json", fewer_merges, "text_key"),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 30}, "text_key"),
        ("tokenizer/tokenizer_config.json", {"padding_side": "left"}, "text_key"),
        ("tokenizer_2/tokenizer_config.json", {"pad_token": "<|startoftext|>"}, "text_key"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "text_key"),
        ("text_encoder_2/config.json", {"layer_norm_eps": 1e-3}, "text_key"),
        ("vae/config.json", {"act_fn": "relu"}, "latent_key"),
        ("vae/config.json", {"scaling_factor": 0.5, "force_upcast": False}, None),
        ("text_encoder/config.json", {"transformers_version": "5.0.0"}, None),
    ],
)
def test_cache_keys_change_with_configs_and_tokenizers_that_act(
    family: SDXL, model: Path, tmp_path: Path, file: str, edit: Any, changes: str | None
) -> None:
    path = Path(shutil.copytree(model, tmp_path / "m")) / file
    content = json.loads(path.read_text())
    if callable(edit):
        edit(content)
    else:
        content |= edit
    path.write_text(json.dumps(content))
    other = load(tmp_path / "m")
    changed = [name for name in ("text_key", "latent_key") if getattr(other, name) != getattr(family, name)]
    assert changed == ([] if changes is None else [changes])


def test_cache_keys_do_not_change_with_the_files_name(family: SDXL, model: Path, tmp_path: Path) -> None:
    other = load(Path(shutil.copytree(model, tmp_path / "renamed")))
    assert (other.latent_key, other.text_key) == (family.latent_key, family.text_key)


def test_another_vae_takes_the_place_of_the_models_own(family: SDXL, model: Path, tmp_path: Path) -> None:
    vae = Path(shutil.copytree(model / "vae", tmp_path / "vae"))
    (weights,) = vae.glob("*.safetensors")
    change(weights, "encoder.")
    other = load(model, pretrained_vae_model_name_or_path=str(vae))
    assert other.latent_key != family.latent_key
    assert other.text_key == family.text_key
    other.export(other.denoiser, tmp_path / "out")
    saved = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out", use_safetensors=True, add_watermarker=False)
    assert torch.equal(saved.vae.encoder.conv_in.weight, other.vae.encoder.conv_in.weight)


@pytest.mark.parametrize("negative", ["", "a green fox"])
def test_samples_equal_the_whole_pipeline(family: SDXL, pipeline: Any, negative: str) -> None:
    family.prepare_prompt("a red fox", negative)
    denoiser = family.denoiser.eval()
    images = [family.decode(family.sample(denoiser, "a red fox", negative, 5 + i, 16)) for i in range(2)]
    expected = pipeline(
        ["a red fox"] * 2,
        negative_prompt=[negative] * 2 if negative else None,
        height=16,
        width=16,
        num_inference_steps=SDXL.steps,
        guidance_scale=SDXL.guidance,
        generator=[torch.Generator("cpu").manual_seed(5 + i) for i in range(2)],
    ).images
    for found, image in zip(images, expected, strict=True):
        difference = np.abs(np.asarray(found, dtype=int) - np.asarray(image, dtype=int))
        assert difference.max() <= 1
    assert np.asarray(images[0]).std() > 1
    assert np.abs(np.asarray(images[0], dtype=int) - np.asarray(images[1], dtype=int)).max() > 5


def test_large_images_are_decoded_in_tiles(family: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 pixels, 4 latents; smaller ones go through in one piece, whatever size the VAE's config states."""
    monkeypatch.setattr("lpl.families.pipeline_family.DECODED_PIXELS", 16)
    seen: list[tuple[int, ...]] = []
    handle = family.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    small, large = (family.decode(torch.zeros(1, 4, side, side)) for side in (4, 8))
    handle.remove()
    assert (small.size, large.size) == ((16, 16), (32, 32))
    assert seen[0] == (4, 4)
    assert len(seen) > 4
    assert max(seen[1:]) == (4, 4)
    assert not family.vae.use_tiling


@pytest.mark.parametrize("prediction_type", [None, "v_prediction", "sample"])
def test_export_reloads_bit_for_bit_and_says_its_prediction_type(
    model: Path, tmp_path: Path, prediction_type: str | None
) -> None:
    family = load(model, prediction_type=prediction_type)
    family.export(family.denoiser, tmp_path / "out")
    saved = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out", use_safetensors=True, add_watermarker=False)
    assert saved.scheduler.config.prediction_type == (prediction_type or "epsilon")
    assert family.schedule.prediction_type == (prediction_type or "epsilon")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        before, after = getattr(family.pipeline, name).state_dict(), getattr(saved, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert saved.tokenizer(CAPTIONS[0]).input_ids == family.pipeline.tokenizer(CAPTIONS[0]).input_ids


def test_v_prediction_model_trains_by_what_its_scheduler_says(train: Any, tmp_path: Path) -> None:
    folder = tiny_sdxl(tmp_path / "v", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    run = train(pretrained_model_name_or_path=folder, snr_gamma=5.0, train_batch_size=4)
    config = json.loads((run.folder / "scheduler" / "scheduler_config.json").read_text())
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert all(np.isfinite(list(values.values())).all() for values in run.losses().values())
    given = train(pretrained_model_name_or_path=folder, snr_gamma=5.0, train_batch_size=4,
                  prediction_type="v_prediction", output="given")  # fmt: skip
    assert given.losses() == run.losses()


def test_configs_alone_give_schedule_models_and_resolution(model: Path, family: SDXL) -> None:
    configs = model_configs(ModelConfig(str(model)))
    assert torch.equal(schedule_of_configs(configs).alpha, family.schedule.alpha)
    plan = blueprint(configs)
    with torch.device("meta"):
        parts = [plan.denoiser(), plan.vae(), *plan.text_encoders()]
    for part, loaded in zip(parts, (family.denoiser, family.vae, *family.text_encoders), strict=True):
        shapes = {name: weight.shape for name, weight in loaded.state_dict().items()}
        assert {name: weight.shape for name, weight in part.state_dict().items()} == shapes
    assert plan.lora_targets == family.lora_targets
    text = family.encode_text(["a fox", "a hare"])
    assert {name: value.shape for name, value in plan.text(2).items()} == {n: v.shape for n, v in text.items()}
    assert plan.tokens(2)[1].shape == (2, family.pipeline.tokenizer.model_max_length)
    assert SDXL_KIND.native_resolution(configs) == 4 * 4
    assert SDXL_KIND.native_resolution({}) == 1024
