"""The shipped weights: small, good enough, and loadable by diffusers alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

from lpl.demo import weights
from lpl.demo.photographs import all_captions, training_crops
from lpl.demo.weights import COMPONENTS, WEIGHTS_FOLDER, export_model, load_component, load_pipeline
from tools.demo_weights.base import TIME_IDS, BaseModel, encode_crops, tokenize
from tools.demo_weights.vae import held_out_psnr, latent_std

CAPTIONS = tuple(all_captions())


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_weights_are_small_and_bfloat16() -> None:
    files = sorted(WEIGHTS_FOLDER.glob("*.safetensors"))
    assert [file.stem for file in files] == sorted(COMPONENTS)
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_autoencoder_reconstructs_held_out_crops(pipeline: StableDiffusionXLPipeline) -> None:
    assert held_out_psnr(pipeline.vae).mean() >= 25.0


def test_scaling_factor_makes_latents_of_unit_variance(pipeline: StableDiffusionXLPipeline) -> None:
    assert latent_std(pipeline.vae, count=64) * pipeline.vae.config.scaling_factor == pytest.approx(1.0, abs=0.1)


@torch.no_grad()
def test_base_model_predicts_noise_and_uses_its_text(pipeline: StableDiffusionXLPipeline) -> None:
    """Noise halfway is predicted better with the right caption than with a wrong one, and far better than by zero."""
    model = BaseModel(CAPTIONS).eval()
    for name in ("unet", "text_encoder", "text_encoder_2"):
        load_component(name, getattr(model, name))
    crops = training_crops()[::4]
    data = encode_crops(pipeline.vae, [crop.image for crop in crops], [CAPTIONS.index(crop.caption) for crop in crops])
    mean, (ids, ids_2) = data.mean, (tokens[data.caption] for tokens in tokenize(CAPTIONS))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(mean.shape, generator=generator)
    alpha_cumprod = pipeline.scheduler.alphas_cumprod[600]
    noisy_latents = alpha_cumprod.sqrt() * mean + (1 - alpha_cumprod).sqrt() * noise
    timesteps = torch.full((len(mean),), 600)

    def error(order: torch.Tensor) -> float:
        return (
            (model(noisy_latents, timesteps, *model.encode_text(ids[order], ids_2[order])) - noise)
            .square()
            .mean()
            .item()
        )

    right = error(torch.arange(len(mean)))
    wrong = error(torch.arange(len(mean)).roll(len(mean) // 2))
    assert right < 0.5
    assert right < wrong


def test_training_conditions_as_the_pipeline_does(pipeline: StableDiffusionXLPipeline) -> None:
    model = BaseModel(CAPTIONS)
    model.text_encoder, model.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2
    caption = training_crops()[0].caption
    with torch.no_grad():
        hidden, pooled = model.encode_text(*(tokens[[CAPTIONS.index(caption)]] for tokens in tokenize(CAPTIONS)))
        expected = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
    torch.testing.assert_close(hidden, expected[0])
    torch.testing.assert_close(pooled, expected[2])
    size = (64, 64)
    assert list(TIME_IDS) == pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, 96)[0].tolist()


def test_exported_model_reloads_and_generates(tmp_path, pipeline: StableDiffusionXLPipeline) -> None:
    folder = export_model(tmp_path / "model")
    reloaded = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    reloaded.set_progress_bar_config(disable=True)
    for name in COMPONENTS:
        shipped, found = getattr(pipeline, name).state_dict(), getattr(reloaded, name).state_dict()
        assert shipped.keys() == found.keys()
        assert all(torch.equal(shipped[key], found[key]) for key in shipped)
    caption = training_crops()[0].caption
    assert reloaded.tokenizer(caption).input_ids == pipeline.tokenizer(caption).input_ids
    assert reloaded.tokenizer_2.pad_token_id == 0
    image = reloaded(
        caption, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert image.shape == (1, 3, 64, 64)
    assert image.isfinite().all()


def test_missing_weights_are_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=r"vae\.safetensors is missing"):
        load_pipeline()
