"""A model that lacks a weight is refused by name: it must never train on random numbers."""

import shutil

import pytest
from safetensors.torch import load_file, save_file


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
