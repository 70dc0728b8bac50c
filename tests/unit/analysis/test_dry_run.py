"""--dry_run at full size, from configs alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lpl.families.sdxl_configs import PUBLISHED

PARAMETERS = {"unet": 2_567_463_684, "vae": 83_653_863}


@pytest.fixture
def full_size(tmp_path: Path) -> Path:
    """A folder with SDXL's configs and weight files without weights."""
    folder = tmp_path / "sdxl"
    index = {"_class_name": "StableDiffusionXLPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    files: dict[str, Any] = {
        "model_index.json": index,
        "tokenizer/vocab.json": {},
        "tokenizer_2/vocab.json": {},
        "scheduler/scheduler_config.json": PUBLISHED["scheduler"],
    }
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        files[f"{part}/config.json"] = PUBLISHED[part]
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
    # Weights, gradients, state, average, and as much as the weights for the square root of AdamW's second moment.
    peak = (PARAMETERS["unet"] * (4 + 4 + 8 + 4 + 4) + PARAMETERS["vae"] * 4) / 2**30
    assert found["optimizer step"] == f"{peak:.2f} GiB"
    assert f"memory       about {peak:.2f} GiB on the GPU at its peak (optimizer step)" in text
    assert "FLOPs        25.8 TFLOP a sample, LPL " in text
    for tap in (
        "tap mid     512 x 128 x 128, weight 1",
        "tap up_0    512 x 256 x 256, weight 0.5",
        "tap up_1    512 x 512 x 512, weight 0.25",
        "tap up_2    256 x 1024 x 1024, weight 0.125",
        "tap up_3    128 x 1024 x 1024, weight 0.125",
    ):
        assert tap in text


@pytest.mark.slow
def test_what_saves_memory_saves_it_in_the_plan(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(**options: Any) -> dict[str, float]:
        text = train("--dry_run", **options).stdout
        lines = (line.rsplit(maxsplit=2) for line in text.splitlines() if line.endswith("MiB"))
        return {name.strip(): float(value) for name, value, _ in lines}

    full = rows(resolution=128)
    lean = {"gradient_checkpointing": True, "mixed_precision": "bf16", "rank": 2}
    found = rows(resolution=128, **lean)
    assert found.keys() == full.keys()
    for row in ("UNet activations", "LPL, while it runs", "gradients", "AdamW state", "LPL", "backward pass"):
        assert found[row] < full[row], row
    # What `accelerate launch --mixed_precision bf16` tells its processes.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert rows(resolution=128, **lean | {"mixed_precision": None}) == found
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    failed = train("--dry_run", expect_error=True)
    assert failed.errors == ["error: ACCELERATE_MIXED_PRECISION is fp8: give --mixed_precision no, fp16 or bf16"]
