"""What a run leaves behind: averages, validation images, logs, LoRA, and nothing secret."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import lpl.families.sdxl as sdxl
import lpl.perceptual.loss
from lpl.perceptual.input_checks import FirstCalls
from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.training.validation_images import NARROWEST

SDXL = sdxl.SDXL


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def quick_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdxl.SDXL, "steps", 2)


def test_average_is_validated_and_saved(train: Any, quick_sampling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    original = SDXL.sample

    def spy(self: Any, denoiser: Any, *args: Any) -> Any:
        assert not denoiser.training
        assert all(p.grad is None for p in denoiser.parameters())
        shown.append({name: p.detach().clone() for name, p in denoiser.named_parameters()})
        return original(self, denoiser, *args)

    monkeypatch.setattr(SDXL, "sample", spy)
    options = {"use_ema": True, "ema_decay": 0.7, "max_train_steps": 4, "checkpointing_steps": 2}
    run = train(**options, validation_prompt="a pattern", validation_steps=2, num_validation_images=2)
    assert len(shown) == 3 * 2 * 2
    for step in (2, 4):
        raw, again, average, _ = shown[2 * step : 2 * step + 4]
        assert same(raw, again)
        assert same(raw, run.checkpoint(step, "model"))
        assert same(average, run.checkpoint(step, "ema"))
        assert not same(raw, average)
    assert same(run.unet(), run.checkpoint(4, "ema"))
    names = sorted(p.name for p in (run.folder / "samples").iterdir())
    assert names == ["step-0000000.png", "step-0000002.png", "step-0000004.png"]
    assert Image.open(run.folder / "samples" / "step-0000004.png").width == NARROWEST
    # Validation does not disturb training.
    quiet = train(**options, output="quiet")
    assert same(quiet.checkpoint(4, "model"), run.checkpoint(4, "model"))
    assert not (quiet.folder / "samples").exists()
    without = train(max_train_steps=4, output="without")
    assert same(without.unet(), run.checkpoint(4, "model"))


def test_validation_each_epoch_and_at_the_end(train: Any, quick_sampling: None) -> None:
    """Six samples, two a step: an epoch is 3 steps; 7 steps end between two."""
    run = train(max_train_steps=7, train_batch_size=2, validation_prompt="x", num_validation_images=1, use_lpl=False)
    names = sorted(p.name for p in (run.folder / "samples").iterdir())
    assert names == [f"step-000000{step}.png" for step in (0, 3, 6, 7)]


def test_result_is_a_pipeline_that_loads_bit_for_bit(train: Any, model: Path) -> None:
    run = train(checkpointing_steps=2)
    pipeline = StableDiffusionXLPipeline.from_pretrained(run.folder, use_safetensors=True, add_watermarker=False)
    assert same(dict(pipeline.unet.state_dict()), run.checkpoint(2, "model"))
    base = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, add_watermarker=False)
    assert not same(dict(pipeline.unet.state_dict()), dict(base.unet.state_dict()))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert same(dict(getattr(pipeline, part).state_dict()), dict(getattr(base, part).state_dict()))
    finished = json.loads((run.folder / "finished.json").read_text())
    state = json.loads((run.folder / "checkpoint-2" / "state.json").read_text())
    assert finished == {"step": 2, "weights": "raw", "data": state["data"]}
    assert [p.name for p in run.folder.glob(".tmp*")] == []


def test_result_of_bf16_training_draws_pictures(train: Any, model: Path) -> None:
    """Frozen parts keep the weights they came with; what is saved is float32 throughout."""
    run = train(mixed_precision="bf16")
    assert {t.dtype for t in run.unet().values()} == {torch.float32}
    pipeline = StableDiffusionXLPipeline.from_pretrained(run.folder, use_safetensors=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a pattern", num_inference_steps=1, height=16, width=16, output_type="np").images.shape[0] == 1
    base = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, add_watermarker=False)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert same(dict(getattr(pipeline, part).state_dict()), dict(getattr(base, part).state_dict())), part


def test_metrics_of_a_step(train: Any) -> None:
    logged = train(train_batch_size=4, max_train_steps=1).logged()
    layers = [
        f"lpl/features/layer_{i}/{name}" for i in range(4) for name in ("distance", "outlier_ratio", "mean", "std")
    ]
    expected = {
        "diffusion_loss", "train_loss", "learning_rate", "gradient_norm", "samples_per_second",
        "lpl/loss", "lpl/weighted_loss", "lpl/loss_share", "lpl/gradient_share", "lpl/application_ratio",
        "lpl/num_samples", "lpl/weight", "lpl/snr_mean", "lpl/snr_min", "lpl/snr_max", *layers,
    }  # fmt: skip
    assert logged.keys() == expected
    value = {name: values[1] for name, values in logged.items()}
    assert value["train_loss"] == pytest.approx(value["diffusion_loss"] + value["lpl/weighted_loss"], rel=1e-6)
    assert value["lpl/loss_share"] == pytest.approx(value["lpl/weighted_loss"] / value["train_loss"], rel=1e-6)
    assert value["lpl/application_ratio"] == value["lpl/num_samples"] / 4 > 0
    assert value["lpl/snr_min"] <= value["lpl/snr_mean"] <= value["lpl/snr_max"]


def test_metrics_are_logged_every_n_steps_as_means(train: Any) -> None:
    fine = train(max_train_steps=5, output="fine").logged()
    coarse = train(max_train_steps=5, log_every=2, output="coarse").logged()
    assert list(coarse["diffusion_loss"]) == [1, 2, 4, 5]
    mean = (fine["diffusion_loss"][3] + fine["diffusion_loss"][4]) / 2
    assert coarse["diffusion_loss"][4] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(("weight", "expected"), [(1e-9, "LPL idles"), (1e6, "LPL dominates")])
def test_share_of_the_gradient_warns_once_by_name(train: Any, weight: float, expected: str) -> None:
    run = train(lpl_weight=weight, train_batch_size=12, lpl_t_threshold=1000, max_train_steps=5)
    warnings = [line for line in run.stderr.splitlines() if "% of the gradient" in line]
    assert len(warnings) == 1
    assert expected in warnings[0]
    assert f"--lpl_weight {weight}" in warnings[0]


def test_auto_weight_meets_its_share_without_a_warning(train: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = train(lpl_weight="auto", lpl_target_share=0.3, train_batch_size=12, lpl_t_threshold=1000, max_train_steps=5)
    share = run.logged()["lpl/gradient_share"]
    assert share[1] == 0.0  # nothing was measured yet
    assert all(0.2 < share[step] < 0.4 for step in (2, 3, 4, 5))
    assert "of the gradient" not in run.stderr
    last = r"LPL had 2\d % of the gradient on 100 % of the samples, weight [.\d]+"
    assert re.fullmatch(last, caplog.messages[-3])
    assert caplog.messages[-2].startswith(f"done: the result is in {run.folder} (raw weights)")
    assert f"`lpl report {run.folder}`" in caplog.messages[-1]


def test_a_run_begins_with_its_length_and_warns_where_it_is_too_long(
    train: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpl.config.length.MOST_DRAWS", 1)
    train(max_train_steps=None, draws_per_image=2, train_batch_size=6)
    said = "2 steps of 6 samples, which draw each of 6 images 2 times on average (by --draws_per_image 2)"
    assert any(line.startswith("training ") and line.endswith(said) for line in caplog.messages)
    assert any(line.startswith("each image is drawn 2 times, and above 1 a model") for line in caplog.messages)
    assert any(line.startswith("saves ") for line in caplog.messages)


def test_samples_that_the_gate_stops_cost_no_decoding(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    original = LatentPerceptualLoss.__call__

    def spy(self: Any, pred: Any, *args: Any, **options: Any) -> Any:
        decoded.append(len(pred))
        return original(self, pred, *args, **options)

    monkeypatch.setattr(LatentPerceptualLoss, "__call__", spy)
    run = train(lpl_t_threshold=1, max_train_steps=2, output="closed")
    assert decoded == []
    assert run.logged()["lpl/weighted_loss"] == {1: 0.0, 2: 0.0}
    train(lpl_t_threshold=1000, train_batch_size=3, lpl_max_samples=2, max_train_steps=2, output="open")
    assert decoded == [2, 2]


def test_decoder_of_lpl_runs_in_float32_outside_autocast(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    original = LatentPerceptualLoss.__call__

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.convolution.default:
                seen.append((args[0].dtype, out.dtype))
            return out

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        with Watch():
            return original(self, *args, **options)

    monkeypatch.setattr(LatentPerceptualLoss, "__call__", spy)
    train(mixed_precision="bf16", lpl_t_threshold=1000, max_train_steps=1)
    assert set(seen) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("weight", [1.0, "auto"])
def test_gradient_of_exactly_0_stops_the_run_in_one_line(
    train: Any, monkeypatch: pytest.MonkeyPatch, weight: Any
) -> None:
    """Found where metrics are logged: no call of the step looks at values on the device for it."""
    compare, due, looked = lpl.perceptual.loss.compare, FirstCalls.due, []

    def without_gradient(*args: Any) -> Any:
        found = compare(*args)
        return found._replace(gradient=torch.zeros_like(found.gradient))

    def spy(self: FirstCalls, check: str) -> bool:
        looked.append(due(self, check))
        return looked[-1]

    monkeypatch.setattr(lpl.perceptual.loss, "compare", without_gradient)
    monkeypatch.setattr(FirstCalls, "due", spy)
    run = train(lpl_weight=weight, lpl_t_threshold=1000, expect_error=True, max_train_steps=3)
    assert run.code == 3
    assert len(run.errors) == 1
    assert "step 1: LPL's gradient at the model's output is exactly 0" in run.errors[0]
    assert f"--lpl_weight {weight}" in run.errors[0]
    assert run.errors[0].endswith("no checkpoint was written yet")
    assert looked
    assert not any(looked)


def test_gradient_checkpointing_changes_no_number(train: Any) -> None:
    plain = train(lpl_t_threshold=1000, output="plain")
    saving = train(lpl_t_threshold=1000, gradient_checkpointing=True, output="saving")
    for name, value in plain.losses().items():
        assert list(saving.losses()[name].values()) == pytest.approx(list(value.values()), rel=1e-5), name


def test_prediction_type_is_trained_and_saved(train: Any) -> None:
    epsilon = train(use_lpl=False, output="epsilon")
    v = train(use_lpl=False, prediction_type="v_prediction", output="v")
    assert epsilon.losses()["diffusion_loss"] != v.losses()["diffusion_loss"]
    for run, expected in ((epsilon, "epsilon"), (v, "v_prediction")):
        config = json.loads((run.folder / "scheduler" / "scheduler_config.json").read_text())
        assert config["prediction_type"] == expected
    UNet2DConditionModel.from_pretrained(v.folder / "unet", use_safetensors=True)


def test_token_is_written_nowhere(train: Any) -> None:
    run = train("--hub_token", "hf_verysecret", validation_prompt=None)
    files = [p for p in run.folder.rglob("*") if p.is_file()]
    assert len(files) > 10
    assert not any(b"hf_verysecret" in p.read_bytes() for p in files)
    assert "hub_token" not in (run.folder / "config.yaml").read_text()
    assert "hf_verysecret" not in run.stderr


def test_options_that_cannot_act_are_named(train: Any) -> None:
    run = train(
        lr_warmup_steps=5,
        hub_model_id="a/b",
        timestep_bias_multiplier=2.0,
        use_lpl=False,
        lpl_start=1,
        lpl_norm_type="shared",
    )
    for flag in (
        "--lr_warmup_steps has no effect",
        "--hub_model_id has no effect",
        "--timestep_bias_multiplier has no",
    ):
        assert run.stderr.count(flag) == 1
    assert (
        "without LPL these have no effect: --lpl_weight, --lpl_t_threshold, --lpl_norm_type, --lpl_start" in run.stderr
    )


def test_random_depth_follows_seed_and_step(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The depth is a function of (seed, step), every micro-batch of a step has it, and layers log when reached."""
    depths: list[int] = []
    original = LatentPerceptualLoss.__call__

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        depths.append(options["depth"])
        return original(self, *args, **options)

    monkeypatch.setattr(LatentPerceptualLoss, "__call__", spy)
    options = {"lpl_random_depth": True, "lpl_weight": 1.0, "lpl_t_threshold": 1000, "max_train_steps": 8}
    train(**options, gradient_accumulation_steps=2, log_every=1, output="accumulated")
    assert depths[::2] == depths[1::2]
    first, depths[:] = depths[::2], []
    run = train(**options, log_every=1, output="plain")
    assert depths == first
    assert len(set(depths)) > 1
    logged = run.logged()
    for i in range(4):
        assert set(logged[f"lpl/features/layer_{i}/distance"]) == {n + 1 for n, d in enumerate(depths) if d > i}
    depths.clear()
    train(**options, seed=5, output="seed")
    assert depths != first


def test_windows_belong_to_the_draw_of_a_sample(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """--lpl_crop: a sample's window does not depend on the batch it is in, and is another the next time."""
    windows: list[Any] = []
    original = LatentPerceptualLoss.__call__

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        windows.extend(options["windows"].tolist())
        return original(self, *args, **options)

    monkeypatch.setattr(LatentPerceptualLoss, "__call__", spy)
    options = {"lpl_crop": 8, "lpl_weight": 1.0, "lpl_t_threshold": 1000}
    train(**options, max_train_steps=12, output="one")
    one = windows.copy()
    windows.clear()
    train(**options, train_batch_size=3, max_train_steps=4, output="three")
    assert windows == one
    assert len({tuple(w) for w in one}) == 12
