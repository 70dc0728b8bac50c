"""Configs for a plan: known, or read from a model without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.families import model_configs, plan_configs
from lpl.families.sdxl_configs import NAME, PUBLISHED


def test_sdxl_base_is_known_and_so_is_no_model_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert plan_configs(ModelConfig()) == PUBLISHED
    assert plan_configs(ModelConfig(NAME)) == PUBLISHED


def test_a_folder_needs_no_weights(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")))
    assert plan_configs(ModelConfig(str(folder))) == model_configs(ModelConfig(str(model)))
    with pytest.raises(UserError, match="missing in it"):
        model_configs(ModelConfig(str(folder)))


@pytest.mark.parametrize("parameters", [2_567_463_684, 1000])
def test_a_file_of_sdxls_size_is_sdxl(tmp_path: Path, parameters: int) -> None:
    """Only the header is written, and the file's length: no disk is used."""
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    text, vae = "conditioner.embedders.0.transformer.text_model.", "first_stage_model."
    size = 4 * parameters
    small = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    entries = {
        "conditioner.embedders.1.model.ln_final.weight": small,
        f"{text}final_layer_norm.weight": small,
        f"{vae}decoder.conv_out.weight": small,
        unet: {"dtype": "F32", "shape": [parameters // 4, 4], "data_offsets": [4, 4 + size]},
    }
    header = json.dumps(entries).encode()
    file = tmp_path / "sdxl.safetensors"
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + 4 + size)
    config = ModelConfig(str(file))
    if parameters == 1000:
        with pytest.raises(UserError, match=r"1,000 parameters.*--single_file_config"):
            plan_configs(config)
    else:
        assert plan_configs(config) == PUBLISHED


def test_what_is_no_sdxl_is_refused(model: Path, tmp_path: Path) -> None:
    cases = {
        str(tmp_path / "none"): "no such folder",
        "mine": "no such folder",
    }
    other = tmp_path / "other.safetensors"
    save_file({"w": zeros(1)}, other)
    cases[str(other)] = "not an SDXL checkpoint"
    folder = Path(shutil.copytree(model, tmp_path / "refiner"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    cases[str(folder)] = "refiner"
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            plan_configs(ModelConfig(name))
        assert "\n" not in str(caught.value)
