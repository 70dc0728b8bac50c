"""UNets trained by flow matching: the schedule of the model decides the step, and what cannot be right is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_flow, tiny_images, tiny_sd

from lpl.base.errors import UserError
from lpl.base.tensor_file import write_tensors
from lpl.config import DiffusionConfig, ModelConfig
from lpl.data.dataset import Batch
from lpl.families import check_export, kind_of, load_family, model_configs, plan_configs
from lpl.families.sampling import check_sampler, load_for_sampling
from lpl.families.schedulers import compare_lora
from lpl.families.sdxl_export import SDXLExport
from lpl.training.step import TrainingStep

CPU, LORA, UNET = torch.device("cpu"), "pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors"
CLASSES = (
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "SASolverScheduler",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_flow(tmp_path_factory.mktemp("flow") / "model"))


def scheduler_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return found


def sampled(pipeline: Any, steps: int = 3) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae_scale_factor = 4
    with torch.no_grad():
        options: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": steps, "output_type": "latent"}
        found: torch.Tensor = pipeline("a hare", generator=torch.Generator().manual_seed(1), **options).images
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_every_scheduler_of_flow_sigmas_is_known(name: str, tmp_path: Path) -> None:
    config = ModelConfig(str(tiny_flow(tmp_path / "model", name=name, shift=5.0)))  # a key of other classes
    assert model_configs(config)["scheduler"]["_class_name"] == name
    schedule = load_family(config, CPU, torch.float32).schedule
    assert (schedule.is_flow, schedule.prediction_type, schedule.shift) == (True, "flow", 2.0)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),  # which the pipelines cannot call
        ("EulerDiscreteScheduler", {}),  # which ignores use_flow_sigmas
        ("DPMSolverMultistepScheduler", {"prediction_type": "epsilon"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),  # which go before sigmas of flow matching
        ("DPMSolverMultistepScheduler", {"use_dynamic_shifting": True}),  # by a number that the pipelines do not give
        ("DPMSolverMultistepScheduler", {"num_train_timesteps": 500}),
        ("NoScheduler", {}),
    ],
)
@pytest.mark.parametrize("build", [None, tiny_sd], ids=["sdxl", "sd"])
def test_a_scheduler_that_does_not_sample_it_is_refused(name: str, more: Any, build: Any, tmp_path: Path) -> None:
    own = {} if build is None else {"build": build}
    config = ModelConfig(str(tiny_flow(tmp_path / "model", name=name, **own, **more)))
    for look in (model_configs, plan_configs):
        with pytest.raises(
            UserError, match=f"its scheduler, {name}, does not sample a UNet of flow matching"
        ) as caught:
            look(config)
        assert "\n" not in str(caught.value)


def test_a_flow_shift_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    for build, message in ((None, "flow_shift"), (tiny_sd, "the model's scheduler config makes no DPMSolver")):
        own = {} if build is None else {"build": build}
        model = tiny_flow(tmp_path / message[:4], flow_shift="much", **own)
        with pytest.raises(UserError, match=message) as caught:
            model_configs(ModelConfig(str(model)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "v_prediction"}, "--prediction_type v_prediction: the model is trained by flow matching"),
        ({"rescale_betas_zero_snr": True}, "--rescale_betas_zero_snr True: the model is trained by flow matching"),
        ({"loss_weighting": "debiased"}, "--loss_weighting debiased: the model is trained by flow matching: drop it"),
        ({"timestep_bias_strategy": "later"}, "--timestep_bias_strategy later: the model is trained by flow matching"),
    ],
)
def test_options_of_a_discrete_schedule_are_refused_by_name(
    train: Any, folder: Path, options: dict[str, Any], message: str
) -> None:
    run = train(pretrained_model_name_or_path=folder, **options, expect_error=True)
    assert message in run.errors[0]


def test_options_of_flow_matching_are_refused_without_it(train: Any, model: Path) -> None:
    run = train(pretrained_model_name_or_path=model, timestep_shift=3.0, expect_error=True)
    assert "--timestep_shift 3.0: the model has a discrete schedule, no flow matching: drop it" in run.errors[0]


@pytest.mark.parametrize("build", [None, tiny_sd], ids=["sdxl", "sd"])
def test_step_by_hand(build: Any, tmp_path: Path) -> None:
    """The target is noise - latents of x = (1 - sigma) x0 + sigma eps; the UNet's time is 1000 sigma, the shift 2."""
    own = {} if build is None else {"build": build}
    family: Any = load_family(ModelConfig(str(tiny_flow(tmp_path / "model", **own))), CPU, torch.float32)
    step = TrainingStep(family, DiffusionConfig(), None, seed=3)
    raw = torch.randn((3, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    text = family.encode_text(["a", "b", "a hare"])
    batch = Batch(["a", "b", "c"], [0, 1, 0], raw, text, {"sizes": torch.full((3, 6), 16.0)})
    seen: list[torch.Tensor] = []
    unet = family.denoiser.eval()
    unet.register_forward_hook(lambda _, given, out: seen.extend([*given[:2], out[0]]))
    out = step(unet, batch, CPU, False, 0)
    noise, levels = step.draw(batch)
    u = levels / (2 - levels)  # sigma = 2 u / (1 + u)
    assert bool(((u > 0) & (u < 1)).all())
    latents, s = family.latent_space.from_raw(raw), levels.float().view(-1, 1, 1, 1)
    torch.testing.assert_close(seen[0], (1 - s) * latents + s * noise)
    torch.testing.assert_close(seen[1], 1000 * levels.float())
    wanted = (seen[2] - (noise - latents)).square().flatten(1).mean(1)
    torch.testing.assert_close(out.diffusion_per_sample, wanted.detach())
    assert float(out.loss.detach()) == pytest.approx(float(wanted.detach().mean()))


def test_without_lpl_the_run_is_the_plain_objective(train: Any, folder: Path) -> None:
    """LPL of weight 0 changes nothing, bit for bit; of weight 1 it sees the same draws at the first step."""
    options = {
        "pretrained_model_name_or_path": folder,
        "max_train_steps": 3,
        "train_batch_size": 4,
        "lpl_t_threshold": None,
    }
    off = train(**options, use_lpl=False, lpl_weight=None, lpl_norm_type=None, output="off")
    none, on = train(**options, lpl_weight=0.0, output="none"), train(**options, output="on")
    one, other = (load_file(run.folder / UNET) for run in (off, none))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], value) for name, value in load_file(on.folder / UNET).items())
    losses = [run.losses()["diffusion_loss"] for run in (off, on)]
    assert losses[0][1] == losses[1][1]


def test_saved_pipeline_keeps_its_schedule_and_samples_as_it_did(train: Any, folder: Path) -> None:
    run = train(
        pretrained_model_name_or_path=folder,
        learning_rate=1e-2,
        validation_prompt="a hare",
        validation_samples=1,
        validation_steps=1,
    )
    kept, said = scheduler_of(run.folder), scheduler_of(folder)
    assert {name: kept[name] for name in said} == said
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(run.folder)
    family: Any = load_family(ModelConfig(str(run.folder)), CPU, torch.float32)
    family.steps, family.guidance = 3, 5.0
    family.prepare_prompt("a hare")
    raw = family.sample(family.denoiser.eval(), "a hare", "", seed=1, resolution=16)
    torch.testing.assert_close(raw, family.latent_space.to_raw(sampled(pipeline)), rtol=1e-4, atol=1e-4)
    before = sampled(diffusers.StableDiffusionXLPipeline.from_pretrained(folder))
    assert (sampled(pipeline) - before).abs().max() > 1e-3
    rows = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    assert all(row["diffusion_loss"] > 0 for row in rows)


def test_lora_says_what_it_was_trained_by(
    train: Any, folder: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(pretrained_model_name_or_path=folder, rank=2)
    file = run.folder / LORA
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["lpl.prediction_type"] == "flow_prediction"
    assert "modelspec.prediction_type" not in metadata
    caplog.clear()
    compare_lora(file, scheduler_of(folder))
    assert caplog.messages == []
    compare_lora(file, scheduler_of(model))
    assert "was trained on flow_prediction; the model it is merged into predicts epsilon" in caplog.text
    load_for_sampling(ModelConfig(str(folder)), torch.float32, CPU, file)


def test_eval_samples_with_the_flow(folder: Path, tmp_path: Path) -> None:
    unipc = ModelConfig(str(tiny_flow(tmp_path / "model", name="UniPCMultistepScheduler")))
    check_sampler(unipc, "dpmsolver++", "model")
    scheduler = load_for_sampling(unipc, torch.float32, CPU, scheduler="dpmsolver++").pipeline.scheduler
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert (scheduler.config.use_flow_sigmas, scheduler.config.flow_shift) == (True, 2.0)
    with pytest.raises(UserError, match="--timestep_spacing trailing: it was trained by flow matching, which has none"):
        check_sampler(ModelConfig(str(folder)), "model", "trailing")


def test_single_file_is_of_flow_matching_only_where_its_config_says_so(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    config = ModelConfig(str(folder))
    with pytest.raises(UserError, match="the model predicts flow_prediction, which a single file cannot say"):
        check_export(config, True, None)
    tensors, metadata = SDXLExport(ModelConfig(str(model)), None, None, 1.0).single_file("a title")
    weights = dict(tensors)
    for file, said in ((tmp_path / "said.safetensors", metadata), (tmp_path / "silent.safetensors", {})):
        write_tensors(weights.items(), file, said)
    silent = ModelConfig(str(tmp_path / "silent.safetensors"), single_file_config=str(folder))
    assert kind_of(silent).is_flow(model_configs(silent))
    family = load_family(silent, CPU, torch.float32)
    assert (family.schedule.is_flow, family.schedule.shift) == (True, 2.0)
    assert not kind_of(silent).is_flow(model_configs(ModelConfig(str(tmp_path / "silent.safetensors"))))
    said = ModelConfig(str(tmp_path / "said.safetensors"), single_file_config=str(folder))
    with pytest.raises(
        UserError, match="says prediction_type epsilon, --single_file_config that it is of flow matching"
    ):
        model_configs(said)


def test_single_file_of_stable_diffusion_is_refused_before_it_loads(tmp_path: Path) -> None:
    config = ModelConfig(str(tiny_flow(tmp_path / "model", build=tiny_sd)))
    with pytest.raises(UserError, match="the model predicts flow_prediction, which a single file cannot say"):
        check_export(config, True, None)


def test_check_plan_and_eval_take_it(
    run_cli: Any, as_flags: Any, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = {"pretrained_model_name_or_path": folder, "resolution": 16}
    given: dict[str, dict[str, Any]] = {
        "check": {"train_data_dir": data, "output_dir": tmp_path / "check"},
        "plan": {},
        "eval": {
            "reference_dir": tiny_images(tmp_path / "reference", count=10, size=16), "output_dir": tmp_path / "eval",
            "num_samples": 10, "num_inference_steps": 2, "scheduler": "dpmsolver++", "num_bootstrap": 100,
        },
    }  # fmt: skip
    for command, options in given.items():
        code, _, err = run_cli([command, *as_flags(base | options)])
        assert code == 0, err
