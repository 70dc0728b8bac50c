"""--dry_run at full size, from configs alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# stabilityai/stable-diffusion-xl-base-1.0, as published.
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 128, "in_channels": 4, "out_channels": 4,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024,
    "scaling_factor": 0.13025, "force_upcast": True,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
PARAMETERS = {"unet": 2_567_463_684, "vae": 83_653_863}


@pytest.fixture
def full_size(tmp_path: Path) -> Path:
    """A folder with SDXL's configs and weight files without weights."""
    folder = tmp_path / "sdxl"
    scheduler = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon",
                 "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # fmt: skip
    index = {"_class_name": "StableDiffusionXLPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    files = {
        "model_index.json": index,
        "unet/config.json": UNET,
        "vae/config.json": VAE,
        "text_encoder/config.json": {},
        "text_encoder_2/config.json": {},
        "tokenizer/vocab.json": {},
        "tokenizer_2/vocab.json": {},
        "scheduler/scheduler_config.json": scheduler,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    import torch
    from safetensors.torch import save_file

    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        save_file({"w": torch.zeros(1)}, folder / name / "model.safetensors")
    return folder


@pytest.fixture
def plan(full_size: Path, data: Path, run_cli: Any, tmp_path: Path) -> Callable[..., dict[str, str]]:
    def run(*argv: str) -> dict[str, str]:
        base = ["--dry_run", f"--pretrained_model_name_or_path={full_size}", f"--train_data_dir={data}"]
        code, out, err = run_cli(["train", *base, f"--output_dir={tmp_path / 'out'}", *argv])
        assert code == 0, err
        assert not (tmp_path / "out").exists()
        return {line[:25].strip(): line[25:].strip() for line in out.splitlines()} | {"text": out}

    return run


def test_full_fine_tune_of_sdxl(plan: Callable[..., dict[str, str]]) -> None:
    found = plan("--use_ema", "--gradient_checkpointing", "--max_train_steps", "7")
    text = found["text"]
    assert f"trains       {PARAMETERS['unet']:,} parameters (the whole UNet)" in text
    assert "6 samples at 1024 px, latents 4 x 128 x 128" in text
    for name, size in (("UNet weights", 4), ("gradients", 4), ("AdamW state", 8), ("EMA", 4)):
        assert found[name] == f"{PARAMETERS['unet'] * size / 2**30:.2f} GiB"
    assert found["VAE, float32"] == f"{PARAMETERS['vae'] * 4 / 2**20:.1f} MiB"
    for tap in (
        "tap mid     512 x 128 x 128, weight 1",
        "tap up_0    512 x 256 x 256, weight 0.5",
        "tap up_1    512 x 512 x 512, weight 0.25",
        "tap up_2    256 x 1024 x 1024, weight 0.125",
        "tap up_3    128 x 1024 x 1024, weight 0.125",
    ):
        assert tap in text


def size_of(text: str) -> float:
    value, unit = text.split()
    return float(value) * (2**30 if unit == "GiB" else 2**20)


def test_what_saves_memory_saves_it_in_the_plan(plan: Callable[..., dict[str, str]]) -> None:
    common = ["--resolution", "256", "--max_train_steps", "7"]
    full = plan(*common)
    lean = plan(*common, "--gradient_checkpointing", "--mixed_precision", "bf16", "--rank", "16")
    assert f"(LoRA of rank 16 on {PARAMETERS['unet']:,})" in lean["text"]
    for row in ("UNet activations", "LPL, one gated sample", "gradients", "AdamW state", "UNet weights"):
        assert size_of(lean[row]) < size_of(full[row]), row
    # Half the bytes of the base, and a few float32 adapters.
    assert size_of(lean["UNet weights"]) == pytest.approx(PARAMETERS["unet"] * 2, rel=0.03)
