"""--rescale_betas_zero_snr: what is trained, refused and exported; nothing divides by the SNR of 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tiny_models import tiny_sdxl

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.families import model_configs, plan_configs, schedule_of_configs

V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def cumprod_of_paper() -> torch.Tensor:
    """Lin et al., algorithm 1, on SDXL's schedule: sqrt(alphas_cumprod) moved so that it ends at 0, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def test_schedule_is_the_papers(model: Path) -> None:
    configs = model_configs(ModelConfig(str(model), **V))
    schedule = schedule_of_configs(configs)
    torch.testing.assert_close(schedule.alpha.square(), cumprod_of_paper(), rtol=1e-3, atol=1e-6)
    assert schedule.alpha[-1] == 0
    assert schedule.prediction_type == "v_prediction"
    plain = schedule_of_configs(model_configs(ModelConfig(str(model)))).alpha.square()
    assert plain[-1] > 0.004
    assert plan_configs(ModelConfig(**V))["scheduler"]["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize("prediction_type", ["v_prediction", pytest.param("sample", marks=pytest.mark.slow)])
def test_training_at_the_last_timestep_is_finite(train: Any, prediction_type: str) -> None:
    """Every draw is the last timestep; the gate is open there, which no sample needs to be afraid of."""
    options = V | {"prediction_type": prediction_type, "timestep_bias_strategy": "range", "timestep_bias_begin": 0}
    options |= {"timestep_bias_end": 999, "timestep_bias_multiplier": 0.0, "lpl_t_threshold": 1000}
    for name, more in {
        "plain": {},
        "min_snr": {"snr_gamma": 5.0},
        "p2": {"loss_weighting": "p2"},
        "debiased": {"loss_weighting": "debiased"},
        "huber": {"loss_type": "huber"},
    }.items():
        run = train(**options, **more, train_batch_size=2, output=f"{name}")
        assert run.logged()["lpl/snr_max"][1] == 0.0
        losses = run.losses()
        assert all(np.isfinite(list(values.values())).all() for values in losses.values()), name
        assert losses["lpl/loss"][1] > 0
        weighted = name in ("min_snr", "p2", "debiased")
        assert (losses["diffusion_loss"][1] == 0) == weighted
        assert run.stderr.count("it is not learned") == weighted


def test_gate_by_noise_level_stays_shut_in_pure_noise(train: Any) -> None:
    run = train(**V, lpl_t_threshold=None, lpl_sigma_threshold=1e6, train_batch_size=4, timestep_bias_strategy="later",
                timestep_bias_portion=0.001, timestep_bias_multiplier=1e6)  # fmt: skip
    assert run.logged()["lpl/num_samples"] == {1: 0.0, 2: 0.0}


def test_exported_pipeline_says_so_and_samples_from_the_last_timestep(train: Any) -> None:
    run = train(**V, validation_prompt="a pattern", num_validation_images=1)
    config = json.loads((run.folder / "scheduler" / "scheduler_config.json").read_text())
    assert (config["rescale_betas_zero_snr"], config["timestep_spacing"]) == (True, "trailing")
    assert config["prediction_type"] == "v_prediction"
    pipeline = StableDiffusionXLPipeline.from_pretrained(run.folder, use_safetensors=True, add_watermarker=False)
    pipeline.scheduler.set_timesteps(10)
    assert float(pipeline.scheduler.timesteps[0]) == 999
    assert list(run.folder.glob("samples/*"))
    plain = train(prediction_type="v_prediction", output="plain")
    assert plain.losses()["diffusion_loss"] != run.losses()["diffusion_loss"]


def test_epsilon_is_refused_before_anything_loads(train: Any) -> None:
    failed = train(rescale_betas_zero_snr=True, expect_error=True)
    assert len(failed.errors) == 1
    assert failed.errors[0].startswith("error: --rescale_betas_zero_snr: the model predicts epsilon")
    assert not failed.folder.exists()


def test_scheduler_that_cannot_is_refused_by_name(tmp_path: Path) -> None:
    folder = Path(tiny_sdxl(tmp_path / "model"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "PNDMScheduler"}))
    with pytest.raises(UserError, match="the model's scheduler is PNDMScheduler"):
        model_configs(ModelConfig(str(folder), **V))


def test_lora_is_told_that_it_holds_no_schedule(train: Any) -> None:
    run = train(**V, rank=2)
    assert run.stderr.count("a LoRA's file does not hold the schedule") == 1
