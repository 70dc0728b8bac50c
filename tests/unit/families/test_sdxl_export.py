"""One file in the original layout: diffusers reads back what went in, bit for bit; merges are the papers' equations."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import randomize, tiny_sdxl
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from lpl.base.errors import UserError
from lpl.base.tensor_file import write_tensors
from lpl.config import ModelConfig
from lpl.families.pipeline_export import stored_dtype
from lpl.families.sdxl_check import SDXL_KIND
from lpl.families.sdxl_export import SDXLExport

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def pipeline_of(folder: Path, **options: Any) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, add_watermarker=False, **options)


def export(model: Path, file: Path, dtype: torch.dtype | None = None) -> Path:
    tensors, metadata = SDXLExport(ModelConfig(str(model)), dtype, None, 1.0).single_file("a title")
    write_tensors(tensors, file, metadata)
    return file


@pytest.fixture(scope="module")
def other(model: Path, shared: Path) -> Path:
    """Unlike the tiny model: three blocks, two layers, transformers of several depths, no square projections."""
    folder = Path(shutil.copytree(model, shared / "other"))
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8, 16),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 4),
        norm_num_groups=4,
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 8, 8, 12),
        layers_per_block=2,
        norm_num_groups=4,
    )
    text = json.loads((folder / "text_encoder_2" / "config.json").read_text())
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig.from_dict(text | {"projection_dim": 12, "num_hidden_layers": 12, "intermediate_size": 20})
    )
    for seed, (part, module) in enumerate({"unet": unet, "vae": vae, "text_encoder_2": encoder}.items()):
        shutil.rmtree(folder / part)
        randomize(module, seed).save_pretrained(folder / part)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize("name", ["tiny", "other"])
def test_single_file_equals_the_folder(name: str, model: Path, other: Path, tmp_path: Path) -> None:
    folder = {"tiny": model, "other": other}[name]
    file = export(folder, tmp_path / "out.safetensors")
    loaded = StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    expected, count = pipeline_of(folder), 0
    for part in PARTS:
        found, weights = (getattr(p, part).state_dict() for p in (loaded, expected))
        assert found.keys() == weights.keys()
        assert [key for key in weights if not torch.equal(found[key], weights[key])] == [], part
        count += len(weights)
    fused = 4 * len([k for k in expected.text_encoder_2.state_dict() if k.endswith("q_proj.weight")])
    assert len(load_file(file)) == count - fused + 2  # position_ids and logit_scale


def test_metadata_follow_modelspec(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = export(model, tmp_path / "out.safetensors")
    # What the file cannot say is said.
    (warning,) = [r.getMessage() for r in caplog.records if "scaling_factor" in r.getMessage()]
    assert warning.endswith("to be 0.13025; this one's is 0.5")
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    raw = file.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    assert start % 8 == 0
    assert metadata.pop("modelspec.hash_sha256") == f"0x{hashlib.sha256(raw[start:]).hexdigest()}"
    assert metadata.pop("modelspec.date").endswith("Z")
    assert metadata == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "a title",
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "epsilon",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize(
    ("scheduler", "markers", "word"),
    [
        ({}, set(), "epsilon"),
        ({"prediction_type": "v_prediction"}, {"v_pred"}, "v"),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"}, "v"),
    ],
)
def test_v_prediction_is_marked_as_comfyui_reads_it(
    scheduler: dict[str, Any], markers: set[str], word: str, tmp_path: Path
) -> None:
    folder = tiny_sdxl(tmp_path / "model", **scheduler)
    file = export(folder, tmp_path / "out.safetensors")
    with safe_open(file, "pt") as content:
        assert {"v_pred", "ztsnr"} & set(content.keys()) == markers
        assert content.metadata()["modelspec.prediction_type"] == word
    StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)


def test_sample_prediction_has_no_single_file(tmp_path: Path) -> None:
    folder = tiny_sdxl(tmp_path / "model", prediction_type="sample")
    with pytest.raises(UserError, match="predicts sample"):
        export(folder, tmp_path / "out.safetensors")


def test_precision(model: Path, tmp_path: Path) -> None:
    half = load_file(export(model, tmp_path / "half.safetensors", torch.float16))
    full = load_file(export(model, tmp_path / "full.safetensors"))
    integers = {name for name, value in full.items() if not value.is_floating_point()}
    assert integers == {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids"}
    assert half.keys() == full.keys()
    for name in full.keys() - integers:
        assert (full[name].dtype, half[name].dtype) == (torch.float32, torch.float16)
        assert torch.equal(half[name], full[name].half()), name
    # Unset: each part as its files have it.
    mixed = Path(shutil.copytree(model, tmp_path / "mixed"))
    (weights,) = (mixed / "unet").glob("*.safetensors")
    save_file({name: value.bfloat16() for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    config = ModelConfig(str(mixed))
    assert [stored_dtype(config, part) for part in PARTS] == [torch.bfloat16, *[torch.float32] * 3]
    found = load_file(export(mixed, tmp_path / "mixed.safetensors"))
    assert {v.dtype for k, v in found.items() if k.startswith("model.")} == {torch.bfloat16}
    assert {v.dtype for k, v in found.items() if k.startswith("first_stage")} == {torch.float32}


def test_value_beyond_float16_is_named(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "large"))
    (weights,) = (folder / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"][0] = 7e4
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"first_stage_model\.decoder\.conv_out\.bias: holds a value that float16"):
        export(folder, tmp_path / "out.safetensors", torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["large"]
    export(folder, tmp_path / "out.safetensors", torch.bfloat16)


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x: two weights have this name"):
        write_tensors([("x", torch.zeros(1)), ("x", torch.ones(1))], tmp_path / "out.safetensors", {})


def test_written_tensors_are_read_back_whatever_their_kind(tmp_path: Path) -> None:
    values = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "long": torch.tensor([[7, 8]]),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "empty": torch.zeros(0),
    }
    assert write_tensors(values.items(), tmp_path / "deeper" / "out.safetensors", {"a": "ö"}) == 6
    found = load_file(tmp_path / "deeper" / "out.safetensors")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def lora_file(folder: Path, module: str, magnitude: bool = False) -> Path:
    """A LoRA on one layer of the tiny model, as save_lora_weights writes it, without peft's configuration."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"unet.{module}.lora_A.weight": torch.randn(2, 16, generator=generator),
        f"unet.{module}.lora_B.weight": torch.randn(16, 2, generator=generator),
    }
    if magnitude:
        tensors[f"unet.{module}.lora_magnitude_vector"] = torch.rand(16, generator=generator)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dora", [False, True])
def test_merge_is_the_equation(model: Path, tmp_path: Path, scale: float, dora: bool) -> None:
    lora = lora_file(tmp_path, LAYER, magnitude=dora)
    parts = load_file(lora)
    down, up = (parts[f"unet.{LAYER}.lora_{side}.weight"].double() for side in "AB")
    before = pipeline_of(model).unet.state_dict()
    merged = SDXLExport(ModelConfig(str(model)), None, lora, scale).pipeline.unet.state_dict()
    expected = before[f"{LAYER}.weight"].double() + scale * up @ down
    if dora:
        magnitude = parts[f"unet.{LAYER}.lora_magnitude_vector"].double()
        expected = magnitude[:, None] * expected / expected.norm(dim=1, keepdim=True)
    assert merged.keys() == before.keys()
    torch.testing.assert_close(merged[f"{LAYER}.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    others = [name for name in before if not torch.equal(merged[name], before[name])]
    assert others == [f"{LAYER}.weight"]


def test_merge_into_half_precision_rounds_once(model: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(model, tmp_path / "half"))
    (weights,) = (half / "unet").glob("*.safetensors")
    stored = {name: value.half() for name, value in load_file(weights).items()}
    save_file(stored, weights, {"format": "pt"})
    lora = lora_file(tmp_path, LAYER)
    parts = load_file(lora)
    delta = parts[f"unet.{LAYER}.lora_B.weight"] @ parts[f"unet.{LAYER}.lora_A.weight"]
    merged = SDXLExport(ModelConfig(str(half)), None, lora, 1.0).pipeline.unet.state_dict()
    assert {value.dtype for value in merged.values()} == {torch.float16}
    assert torch.equal(merged[f"{LAYER}.weight"], (stored[f"{LAYER}.weight"].float() + delta).half())


def test_lora_that_arrives_in_part_is_refused(model: Path, tmp_path: Path) -> None:
    lora = lora_file(tmp_path, LAYER)
    tensors = load_file(lora)
    for side in "AB":
        tensors[f"unet.no_such_layer.lora_{side}.weight"] = tensors[f"unet.{LAYER}.lora_{side}.weight"].clone()
    save_file(tensors, lora)
    with pytest.raises(UserError, match="of its 4 tensors diffusers loads 2"):
        SDXLExport(ModelConfig(str(model)), None, lora, 1.0)


def test_file_that_is_no_lora_is_named(model: Path, tmp_path: Path) -> None:
    save_file({"unet.x.lora_A.weight": torch.zeros(1), "other": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("no")
    save_file({}, tmp_path / "c.safetensors")
    for name, found in (("a", "holds other"), ("b", "cannot be read"), ("c", "holds nothing")):
        with pytest.raises(UserError, match=found):
            SDXL_KIND.lora_parts(tmp_path / f"{name}.safetensors")
