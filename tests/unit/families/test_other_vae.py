"""--pretrained_vae_model_name_or_path is looked at before anything loads, in every family alike."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import tiny_flux, tiny_sdxl

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.families import model_configs

FLAG = "--pretrained_vae_model_name_or_path"


@pytest.fixture(scope="module", params=[tiny_sdxl, tiny_flux])
def model(request, tmp_path_factory):
    return Path(request.param(tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture
def vae(model, tmp_path):
    return shutil.copytree(model / "vae", tmp_path / "vae")


def configs_of(model, vae):
    return model_configs(ModelConfig(str(model), pretrained_vae_model_name_or_path=str(vae)))


def test_its_config_takes_the_place_of_the_models_own(model, vae):
    own = model_configs(ModelConfig(str(model)))["vae"]
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"sample_size": 4321}))
    found = configs_of(model, vae)["vae"]
    assert found["sample_size"] == 4321 != own.get("sample_size")


def test_one_on_the_hub_that_cannot_be_had_is_refused(model):
    with pytest.raises(UserError, match=f"{FLAG} some/vae: no such folder, and the Hub cannot be reached for config"):
        configs_of(model, "some/vae")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latent_channels": 5}, "5 latent channels, the denoiser takes"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny; this trainer needs AutoencoderKL"),
    ],
)
def test_one_of_another_kind_is_refused(model, vae, change, said):
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=f"{FLAG} {vae}: {said}"):
        configs_of(model, vae)


def test_one_without_its_weights_is_refused(model, vae):
    for file in vae.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=f"{FLAG} {vae}: no .safetensors in it"):
        configs_of(model, vae)
