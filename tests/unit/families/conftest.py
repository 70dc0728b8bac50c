"""A model deeper and with longer captions than the tiny one, and both of them loaded with options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import randomize
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lpl.config import ModelConfig
from lpl.families import load_family
from lpl.families.sdxl import SDXL

DEPTHS = {"text_encoder": 4, "text_encoder_2": 3}


def force_zeros(folder: Path, value: bool) -> Path:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": value}))
    return folder


@pytest.fixture(scope="session")
def deep(model: Path, shared: Path) -> Path:
    """The tiny SDXL with text encoders of four and three layers and tokenizers of SDXL's 77; no caption is zeros."""
    folder = force_zeros(Path(shutil.copytree(model, shared / "deep")), False)
    for n, (part, cls) in enumerate(zip(DEPTHS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True)):
        config = json.loads((folder / part / "config.json").read_text())
        config |= {"num_hidden_layers": DEPTHS[part], "max_position_embeddings": 77}
        torch.manual_seed(n)
        encoder = randomize(cls(CLIPTextConfig.from_dict(config)), n)
        shutil.rmtree(folder / part)
        encoder.save_pretrained(folder / part)  # type: ignore[operator]
    for part in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / part, model_max_length=77)
        shutil.rmtree(folder / part)
        tokenizer.save_pretrained(folder / part)
    return folder


@pytest.fixture(scope="session")
def family_of(model: Path, deep: Path) -> Callable[..., SDXL]:
    """Loads "tiny" (tokenizers of 32) or "deep" (of 77) with options, each once."""
    loaded: dict[Any, SDXL] = {}

    def load(which: str, **options: Any) -> SDXL:
        key = (which, *sorted(options.items()))
        if key not in loaded:
            path = str({"tiny": model, "deep": deep}[which])
            loaded[key] = load_family(ModelConfig(path, **options), torch.device("cpu"), torch.float32)
        return loaded[key]

    return load
