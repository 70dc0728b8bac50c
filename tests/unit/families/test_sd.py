"""Stable Diffusion 1 and 2 beyond the contract: trained text encoder, clip_skip, kohya's names, single files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_sd

from lpl.base.tensor_file import write_tensors
from lpl.config import ModelConfig
from lpl.families import blueprint, kind_of, load_family, load_for_export, plan_configs
from lpl.families.kinds import SD_KIND

CPU, PROMPT = torch.device("cpu"), "picture 3 of a pattern"


@pytest.fixture(scope="module", params=[False, True], ids=["first", "second"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_sd(tmp_path_factory.mktemp("sd") / "model", second=request.param))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_sd(tmp_path_factory.mktemp("sd") / "model"))


def pipeline_of(folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)


def test_clip_skip_is_the_pipelines(first: Path) -> None:
    family = load_family(ModelConfig(str(first), clip_skip=1), CPU, torch.float32)
    pipeline = pipeline_of(first)
    encoder = pipeline.text_encoder
    encoder.__dict__["text_model"] = encoder  # as diffusers still reads it, and transformers 5 no longer has it
    expected, _ = pipeline.encode_prompt(PROMPT, CPU, 1, False, clip_skip=1)
    found = family.encode_text([PROMPT])["prompt_embeds"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert family.text_key != load_family(ModelConfig(str(first)), CPU, torch.float32).text_key


def test_clip_skip_of_all_layers_is_refused(first: Path, train: Any) -> None:
    run = train(pretrained_model_name_or_path=first, clip_skip=2, expect_error=True)
    assert "--clip_skip 2: the model's text_encoder has 2 layers; give less than that" in run.errors[0]
    run = train(pretrained_model_name_or_path=first, train_text_encoder=True, text_encoder_2_lr=1e-3, expect_error=True)
    assert "--text_encoder_2_lr 0.001: no model of Stable Diffusion 1 and 2 has that" in run.errors[0]


def test_text_encoder_trains_and_its_lora_arrives_under_both_names(
    folder: Path, train: Any, run_cli: Any, tmp_path: Path
) -> None:
    is_second = json.loads((folder / "unet" / "config.json").read_text())["use_linear_projection"]
    skip = 1 if is_second else None
    options = {"train_text_encoder": True, "rank": 2, "lora_alpha": 5, "learning_rate": 1e-2, "lora_targets": "all"}
    run = train(pretrained_model_name_or_path=folder, **options, clip_skip=skip, max_train_steps=3)
    own = load_file(run.folder / "pytorch_lora_weights.safetensors")
    (second,) = run.folder.glob("*kohya*.safetensors")
    with safe_open(second, "pt") as content:
        metadata = content.metadata()
    assert metadata["ss_base_model_version"] == ("sd_v2" if is_second else "sd_v1")
    kohya = load_file(second)
    layers = {name.split(".")[0] for name in kohya}
    for layer in (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    ):
        assert layer in layers
    assert ("lora_te_text_model_encoder_layers_1_mlp_fc1" in layers) == (skip is None)
    assert 2 * len(kohya) == 3 * len(own)
    out = tmp_path / "k.safetensors"
    code, _, err = run_cli(["export", str(run.folder), "--to", "kohya", "--output", str(out)])
    assert code == 0, err
    assert all(torch.equal(value, kohya[name]) for name, value in load_file(out).items())

    def loaded(file: Path) -> dict[str, torch.Tensor]:
        pipeline = pipeline_of(folder)
        pipeline.load_lora_weights(file)
        parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
        layers = {
            f"{part}.{name}": module
            for part, network in parts.items()
            for name, module in network.named_modules()
            if hasattr(module, "lora_A") and len(module.lora_A)
        }
        return {name: module.get_delta_weight(next(iter(module.lora_A))) for name, module in layers.items()}

    found, expected = loaded(second), loaded(run.folder / "pytorch_lora_weights.safetensors")
    assert found.keys() == expected.keys()
    assert 2 * len(found) == len(own)
    assert {name.split(".")[0] for name in found} == {"unet", "text_encoder"}
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-7)
        assert delta.abs().max() > 0


def test_whole_text_encoder_trains_and_samples_as_it_is_written(first: Path, train: Any) -> None:
    options = {"train_text_encoder": True, "text_encoder_lr": 1e-2, "max_train_steps": 2, "validation_prompt": PROMPT}
    run = train(pretrained_model_name_or_path=first, **options, validation_steps=2)
    before, after = (pipeline_of(root).text_encoder.state_dict() for root in (first, run.folder))
    assert all(not torch.equal(after[name], before[name]) for name in after if "position_ids" not in name)
    family = load_family(ModelConfig(str(run.folder), train_text_encoder=True), CPU, torch.float32)
    frozen = load_family(ModelConfig(str(run.folder)), CPU, torch.float32)
    frozen.prepare_prompt(PROMPT)
    found, expected = (f.sample(f.denoiser.eval(), PROMPT, "", 3, 16) for f in (family, frozen))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_plan_counts_what_is_trained(first: Path) -> None:
    config = ModelConfig(str(first), train_text_encoder=True)
    plan, pipeline = blueprint(plan_configs(config), config), pipeline_of(first)
    denoiser = plan.denoiser()
    expected = sum(p.numel() for part in (pipeline.unet, pipeline.text_encoder) for p in part.parameters())
    assert sum(p.numel() for p in denoiser.parameters()) == expected
    assert plan.denoise(denoiser, torch.zeros(1, 4, 4, 4), plan.schedule.at([3]), plan.text(1), {}).shape[1] == 4


def test_single_file_out_and_in(folder: Path, train: Any, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    write_tensors(*load_and_name(folder, file))
    assert kind_of(ModelConfig(str(file))) is SD_KIND
    theirs = StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, safety_checker=None
    )
    ours = load_family(ModelConfig(str(file), single_file_config=str(folder)), CPU, torch.float32)
    before = pipeline_of(folder)
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(before, part).state_dict()
        for found in (getattr(theirs, part).state_dict(), getattr(ours.pipeline, part).state_dict()):
            assert found.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], part
    plan = train("--dry_run", pretrained_model_name_or_path=file, single_file_config=folder)
    assert f"{sum(p.numel() for p in before.unet.parameters()):,} parameters" in plan.stdout
    failed = train("--dry_run", pretrained_model_name_or_path=file, expect_error=True, output="none")
    assert "a plan needs --single_file_config" in failed.errors[0]


def load_and_name(folder: Path, file: Path) -> tuple[Any, Path, dict[str, str]]:
    tensors, metadata = load_for_export(ModelConfig(str(folder)), None, None, 1.0).single_file("a title")
    assert metadata["modelspec.architecture"] in ("stable-diffusion-v1", "stable-diffusion-v2")
    return tensors, file, metadata
