"""A model that lacks a weight is refused by name: it must never train on random numbers."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.families.loading import load_whole
from lpl.families.sdxl_check import SDXL_KIND
from lpl.families.sdxl_export import SDXLExport


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "unet", "vae"])
def test_missing_weight_is_named(train, model, tmp_path, part):
    broken = shutil.copytree(model, tmp_path / "broken")
    (file,) = (broken / part).glob("*.safetensors")
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("weight"))
    save_file({k: v.clone() for k, v in tensors.items() if k != key}, file, metadata={"format": "pt"})
    run = train(pretrained_model_name_or_path=broken, expect_error=True)
    assert len(run.errors) == 1
    assert f"{part} lacks the weights" in run.errors[0]


def test_only_a_variant_is_there(train, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    (file,) = (broken / "unet").glob("*.safetensors")
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    run = train(pretrained_model_name_or_path=broken, expect_error=True)
    assert "give its --variant" in run.errors[0]


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "text_encoder lacks the weights"),
        ("conditioner.embedders.1.model.text_projection", "text_encoder_2 lacks the weights"),
        ("first_stage_model.decoder.conv_in.weight", "lacks weights of a network"),
        ("model.diffusion_model.out.2.weight", "lacks weights of a network"),
    ],
)
def test_single_file_that_lacks_a_weight(model, tmp_path, key, told):
    tensors, _ = SDXLExport(ModelConfig(str(model)), None, None, 1.0).single_file("x")
    kept = {name: value.contiguous().clone() for name, value in tensors if name != key}
    save_file(kept, tmp_path / "part.safetensors")
    config = ModelConfig(str(tmp_path / "part.safetensors"), single_file_config=str(model))
    with pytest.raises(UserError, match=told):
        load_whole(SDXL_KIND, config)


def test_single_file_without_configs_says_what_to_give(model, tmp_path):
    tensors, _ = SDXLExport(ModelConfig(str(model)), None, None, 1.0).single_file("x")
    save_file({name: value.contiguous().clone() for name, value in tensors}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="give a folder by --single_file_config"):
        load_whole(SDXL_KIND, ModelConfig(str(tmp_path / "a.safetensors"), cache_dir=str(tmp_path)))
