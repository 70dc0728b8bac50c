"""Values that no model has are refused by key, before anything loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.families import load_family, model_configs


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("vae/config.json", "scaling_factor", 0),
        ("vae/config.json", "latents_std", [0]),
        ("vae/config.json", "block_out_channels", []),
        ("vae/config.json", "down_block_types", ["DownEncoderBlock2D"]),
        ("unet/config.json", "cross_attention_dim", "x"),
        ("unet/config.json", "layers_per_block", 10**9),
        ("unet/config.json", "freq_shift", None),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "1000"),
        ("scheduler/scheduler_config.json", "beta_start", 0),
        ("text_encoder_2/config.json", "num_hidden_layers", -1),
        ("text_encoder/config.json", "eos_token_id", None),
        ("model_index.json", "text_encoder", 3),
    ],
)
def test_a_config_with_an_impossible_value(model: Path, tmp_path: Path, file: str, key: str, value: Any) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    found = json.loads((broken / file).read_text())
    (broken / file).write_text(json.dumps(found | {key: value}))
    with pytest.raises(UserError, match=rf"--pretrained_model_name_or_path {broken}: {file}: .*{key}"):
        model_configs(ModelConfig(str(broken)))


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "\x00", '{"a": '])
def test_a_config_that_is_none(model: Path, tmp_path: Path, content: str) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    (broken / "vae" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"vae/config\.json: (not a? ?JSON|lists or objects)"):
        model_configs(ModelConfig(str(broken)))


def test_a_tokenizer_of_other_length_or_no_rules(model: Path, tmp_path: Path) -> None:
    """Without model_max_length a tokenizer pads to 10^30 tokens; faults of its rules are of no class of their own."""
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    file = broken / "tokenizer" / "tokenizer_config.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in found.items() if key != "model_max_length"}))
    with pytest.raises(UserError, match=r"tokenizer makes 1e\+30 tokens of a text"):
        load_family(ModelConfig(str(broken)), torch.device("cpu"), torch.float32)
    file.write_text(json.dumps(found))
    rules = json.loads((broken / "tokenizer" / "tokenizer.json").read_text())
    rules["model"]["merges"][0] = ["no", "such"]
    (broken / "tokenizer" / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(UserError, match=r"--pretrained_model_name_or_path .* out of vocabulary"):
        load_family(ModelConfig(str(broken)), torch.device("cpu"), torch.float32)
