"""A LoRA on the text encoders: every tensor arrives, in diffusers' naming, in kohya's, and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lpl.families import sdxl
from lpl.families.sdxl_networks import token_fields

LORA = "pytorch_lora_weights.safetensors"
ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("unet", *ENCODERS)
PROMPT = "picture 3 of a pattern"
OPTIONS = {"train_text_encoder": True, "rank": 2, "lora_alpha": 5, "learning_rate": 1e-2, "max_train_steps": 3}


def pipeline_of(folder: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, add_watermarker=False)


def embeddings(pipeline: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    return embeds, pooled


def image(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    return torch.as_tensor(pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **size).images)


def layers_of(encoder: Any, preset: str) -> set[str]:
    """The layers that a preset is to reach, found by kind and place, under the names that ComfyUI knows."""
    matrices = [n for n, module in encoder.named_modules() if isinstance(module, nn.Linear) and ".layers." in n]
    chosen = [n for n in matrices if ".self_attn." in n or preset != "attention"]
    return {f"text_model.{n.removeprefix('text_model.')}" for n in chosen}


def state(pipeline: Any) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": v for part in PARTS for name, v in getattr(pipeline, part).state_dict().items()}


def parameters_of(pipeline: Any) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": p for part in PARTS for name, p in getattr(pipeline, part).named_parameters()}


@pytest.fixture(scope="module")
def trained(train_in: Any, model: Path, shared: Path) -> Any:
    """A run with a LoRA on all layers, and what its own networks made of a prompt as training ended."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = sdxl.SDXL.export_lora

    def spy(self: Any, denoiser: Any, folder: Path) -> None:
        fields = token_fields(*self._encode_prompts.tokens([PROMPT]), [PROMPT])
        with torch.no_grad():
            seen.append(denoiser.eval().encode(fields))
        original(self, denoiser, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdxl.SDXL, "export_lora", spy)
        run = train_in(shared / "text-lora", **OPTIONS, lora_targets="all", checkpointing_steps=3)
    return run, seen[0]


@pytest.mark.parametrize("preset", ["attention", "attention_mlp", "all"])
def test_every_tensor_arrives(train: Any, deep: Path, preset: str) -> None:
    run = train(**OPTIONS, lora_targets=preset, pretrained_model_name_or_path=deep, clip_skip=1, checkpointing_steps=3)
    saved, pipeline = load_file(run.folder / LORA), pipeline_of(deep)
    before = {part: layers_of(getattr(pipeline, part), preset) for part in ENCODERS}
    # Of CLIP-L's four layers the last two do not act: its output is taken before them.
    before["text_encoder"] = {n for n in before["text_encoder"] if ".layers.2." not in n and ".layers.3." not in n}
    for part in ENCODERS:
        assert {n.removeprefix(f"{part}.").split(".lora_")[0] for n in saved if n.startswith(f"{part}.")} == before[
            part
        ]
        assert len(before[part]) == {"text_encoder": 2, "text_encoder_2": 3}[part] * (4 if preset == "attention" else 6)
    pipeline.load_lora_weights(run.folder)
    arrived = {
        f"{part}.{n}": p for part in PARTS for n, p in getattr(pipeline, part).named_parameters() if "lora_" in n
    }
    assert len(arrived) == len(saved) == len(run.checkpoint(3, "model"))
    plain = {name.replace("text_encoder.text_model.", "text_encoder."): value for name, value in saved.items()}
    for name, value in arrived.items():
        assert torch.equal(value, plain[name.replace(".default_0", "")]), name
        assert value.abs().sum() > 0
    assert len({name.split(".")[0] for name in arrived}) == 3


def test_reloaded_adapter_is_the_one_in_training(trained: Any, model: Path) -> None:
    run, (embeds, pooled) = trained
    pipeline = pipeline_of(model)
    before = embeddings(pipeline)
    pipeline.load_lora_weights(run.folder)
    after = embeddings(pipeline)
    for own, found, untrained in zip((embeds, pooled), after, before, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
        assert (found - untrained).abs().max() > 1e-3


def test_metadata_say_alpha_and_no_path(trained: Any, model: Path) -> None:
    with safe_open(trained[0].folder / LORA, "pt") as content:
        text = content.metadata()["lora_adapter_metadata"]
    adapter = json.loads(text)
    assert [(adapter[f"{part}.lora_alpha"], adapter[f"{part}.r"]) for part in PARTS] == [(5, 2)] * 3
    assert str(model) not in text
    assert {name for name in adapter["unet.target_modules"] if name in ("q_proj", "fc1")} == set()
    assert set(adapter["text_encoder.target_modules"]) == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def test_kohya_file_is_the_same_adapter(trained: Any, run_cli: Any, model: Path, tmp_path: Path) -> None:
    run, file = trained[0], tmp_path / "style.safetensors"
    ours = load_file(run.folder / LORA)
    code, out, err = run_cli(["export", str(run.folder), "--to", "kohya", "--output", str(file)])
    assert code == 0, err
    theirs = load_file(file)
    assert out.startswith(f"{file}: {len(theirs)} tensors of kohya's naming")
    assert len(theirs) == 3 * len(ours) // 2
    assert {float(v) for k, v in theirs.items() if k.endswith(".alpha")} == {5.0}
    for place in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
        end = place.replace(".", "_")
        own = ours[f"text_encoder.text_model.encoder.layers.0.{place}.lora_A.weight"]
        assert torch.equal(theirs[f"lora_te1_text_model_encoder_layers_0_{end}.lora_down.weight"], own)
        assert f"lora_te2_text_model_encoder_layers_1_{end}.lora_up.weight" in theirs
    last = tmp_path / "checkpoint.safetensors"
    assert run_cli(["export", str(run.folder / "checkpoint-3"), "--to", "kohya", "--output", str(last)])[0] == 0
    found = load_file(last)
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], value) for name, value in theirs.items())
    starts = ("lora_unet_", "lora_te1_text_model_encoder_layers_", "lora_te2_text_model_encoder_layers_")
    assert [name for name in theirs if not name.startswith(starts)] == []
    alone = Path(shutil.copy(file, tmp_path / "alone.safetensors"))
    images, shares = [], []
    for source in (run.folder / LORA, alone):
        pipeline = pipeline_of(model)
        pipeline.load_lora_weights(source.parent, weight_name=source.name)
        parameters = [n for part in PARTS for n, _ in getattr(pipeline, part).named_parameters() if "lora_" in n]
        assert len(parameters) == len(ours)
        scales = {
            s for part in PARTS for m in getattr(pipeline, part).modules() for s in getattr(m, "scaling", {}).values()
        }
        assert scales == {2.5}
        shares.append(embeddings(pipeline))
        images.append(image(pipeline))
    for a, b in zip(*shares, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*images, rtol=1e-5, atol=1e-5)
    assert (images[0] - image(pipeline_of(model))).abs().max() > 1e-3


@pytest.mark.parametrize("naming", ["diffusers", "kohya", "checkpoint"])
def test_merged_model_is_base_and_adapter(trained: Any, run_cli: Any, model: Path, tmp_path: Path, naming: str) -> None:
    run, source = trained[0], [str(trained[0].folder)]
    if naming == "checkpoint":
        source = [str(run.folder / "checkpoint-3")]
    if naming == "kohya":
        assert run_cli(["export", *source, "--to", "kohya", "--output", str(tmp_path / "k.safetensors")])[0] == 0
        source = [str(model), "--lora", str(tmp_path / "k.safetensors")]
    assert run_cli(["export", *source, "--to", "diffusers", "--output", str(tmp_path / "merged")])[0] == 0
    assert run_cli(["export", *source, "--output", str(tmp_path / "one.safetensors")])[0] == 0
    base, merged, ours = (
        state(pipeline_of(model)),
        state(pipeline_of(tmp_path / "merged")),
        load_file(run.folder / LORA),
    )
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(changed) == len(ours) // 2
    for name, down in ours.items():
        if name.endswith(".lora_A.weight") and down.ndim == 2:
            layer = name.removesuffix(".lora_A.weight")
            weight = f"{layer.replace('text_encoder.text_model.', 'text_encoder.')}.weight"
            expected = base[weight] + 2.5 * ours[f"{layer}.lora_B.weight"] @ down
            torch.testing.assert_close(merged[weight], expected, rtol=1e-5, atol=1e-6)
    one = StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(model), local_files_only=True
    )
    assert [name for name, value in state(one).items() if not torch.equal(value, merged[name])] == []


def test_fully_trained_encoders_go_into_the_single_file(train: Any, run_cli: Any, model: Path, tmp_path: Path) -> None:
    run = train(train_text_encoder=True, learning_rate=1e-2)
    file = tmp_path / "full.safetensors"
    assert run_cli(["export", str(run.folder), "--output", str(file)])[0] == 0
    one = StableDiffusionXLPipeline.from_single_file(str(file), config=str(model), local_files_only=True)
    expected, before = state(pipeline_of(run.folder)), state(pipeline_of(model))
    assert [name for name, value in state(one).items() if not torch.equal(value, expected[name])] == []
    name = "text_encoder_2.text_model.encoder.layers.1.mlp.fc1.weight"
    assert not torch.equal(expected[name], before[name])


def test_an_adapter_starts_as_without_text_encoders(train: Any) -> None:
    """The UNet's part is drawn first: the same A, and a first loss that is the base model's."""
    options = {"rank": 2, "max_train_steps": 1, "checkpointing_steps": 1}
    alone, both = train(**options, output="alone"), train(**options, train_text_encoder=True, output="both")
    assert both.logged()["diffusion_loss"][1] == pytest.approx(alone.logged()["diffusion_loss"][1], rel=1e-6)
    fast = {n: v for n, v in both.checkpoint(1, "model").items() if n.startswith("unet.")}
    slow = {f"unet.{n}": v for n, v in alone.checkpoint(1, "model").items()}
    assert fast.keys() == slow.keys()
    first = next(n for n in fast if "lora_A" in n)
    # B is 0 at the first step, so A has no gradient yet, only decay: 1 - 1e-3 * 1e-2.
    torch.testing.assert_close(fast[first], slow[first], rtol=1e-6, atol=0)
