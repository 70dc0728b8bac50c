"""Which weights are used: EMA's options, weights every N steps, the result, schedule-free's own average, compiling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

import lpl.families.sdxl as sdxl
from lpl.config import OptimConfig
from lpl.training.weights import Average, Weights


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def averaged(config: OptimConfig, values: list[float]) -> tuple[Average, list[float]]:
    """The average of one parameter that takes these values after its first, and what it was after each."""
    parameter = nn.Parameter(torch.tensor([values[0]]))
    average, found = Average([parameter], config), []
    for step, value in enumerate(values[1:], 1):
        parameter.data.fill_(value)
        average.after_step(step, [parameter])
        found.append(float(average.shadow_params[0]))
    return average, found


VALUES = [0.0, 1.0, -1.0, 2.0, 0.5, 3.0]


@pytest.mark.parametrize(
    ("options", "decay"),
    [
        ({}, lambda t: (1 + t) / (10 + t)),
        ({"ema_warmup": True}, lambda t: 1 - (1 + t) ** (-2 / 3)),
        ({"ema_warmup": True, "ema_inv_gamma": 2.0, "ema_power": 0.75}, lambda t: 1 - (1 + t / 2) ** -0.75),
        ({"ema_decay": 0.2}, lambda t: min(0.2, (1 + t) / (10 + t))),
        ({"ema_min_decay": 0.5}, lambda t: max(0.5, (1 + t) / (10 + t))),
        ({"ema_device": "cpu"}, lambda t: (1 + t) / (10 + t)),
    ],
)
def test_average_follows_its_equation(options: dict[str, Any], decay: Any) -> None:
    _, found = averaged(OptimConfig(use_ema=True, **options), VALUES)
    expected, shadow = [], VALUES[0]
    for update, value in enumerate(VALUES[1:], 1):
        d = decay(update - 1) if update > 1 else 0.0
        shadow = d * shadow + (1 - d) * value
        expected.append(shadow)
    assert found == pytest.approx(expected, rel=1e-6)


def test_average_begins_late_and_skips_steps() -> None:
    _, found = averaged(OptimConfig(use_ema=True, ema_update_after_step=3), VALUES)
    assert found[:4] == VALUES[1:5]
    assert found[4] == pytest.approx(2 / 11 * 0.5 + 9 / 11 * 3.0)
    _, found = averaged(OptimConfig(use_ema=True, ema_update_every=2, ema_min_decay=0.5), VALUES)
    assert found == pytest.approx([0.0, -1.0, -1.0, -0.25, -0.25])


def test_defaults_are_those_of_diffusers() -> None:
    average, _ = averaged(OptimConfig(), VALUES)
    theirs = EMAModel([nn.Parameter(torch.zeros(1))], foreach=True).state_dict()
    ours = average.numbers() | {"optimization_step": 0}
    assert ours == {key: value for key, value in theirs.items() if key != "shadow_params"}


def test_state_goes_on_with_this_runs_options() -> None:
    source, _ = averaged(OptimConfig(ema_decay=0.9), VALUES)
    target, _ = averaged(OptimConfig(ema_decay=0.5, ema_warmup=True), VALUES[:2])
    target.load(source.numbers(), [tensor.clone() for tensor in source.shadow_params])
    assert (target.optimization_step, target.decay, target.use_ema_warmup) == (5, 0.5, True)
    assert torch.equal(target.shadow_params[0], source.shadow_params[0])


def test_an_average_elsewhere_is_fed_with_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The average is where the weights are not, as on the CPU of a GPU's machine; here the meta device is elsewhere."""
    parameter = nn.Parameter(torch.ones(2))
    average = Average([parameter], OptimConfig(ema_device="cpu", ema_min_decay=0.5))
    passed: list[Any] = []
    monkeypatch.setattr(EMAModel, "step", lambda _, parameters: passed.extend(parameters))
    average.shadow_params = [torch.empty(2, device="meta")]
    average.after_step(1, [parameter])
    assert passed[0].device.type == "meta"
    assert passed[0].requires_grad
    assert passed[0] is not parameter
    average.shadow_params = [torch.zeros(2)]
    average.after_step(2, [parameter])
    assert passed[1] is parameter


def test_average_on_the_cpu_of_a_run_is_the_same_and_resumes(train: Any) -> None:
    options = {"use_ema": True, "ema_warmup": True, "ema_power": 0.75, "ema_update_every": 2, "checkpointing_steps": 3}
    whole = train(**options, max_train_steps=6, output="whole")
    train(**options, max_train_steps=3)
    resumed = train(**options, max_train_steps=6, ema_device="cpu")  # may be changed: the same numbers
    assert same(whole.checkpoint(6, "ema"), resumed.checkpoint(6, "ema"))
    assert same(whole.unet(), resumed.unet())
    states = [json.loads((run.folder / "checkpoint-6" / "state.json").read_text())["ema"] for run in (whole, resumed)]
    assert states[0] == states[1]
    assert states[0]["optimization_step"] == 3
    every = train(**options | {"ema_update_every": 1}, max_train_steps=6, output="every")
    assert not same(every.checkpoint(6, "ema"), whole.checkpoint(6, "ema"))


def saved(folder: Path, kind: str) -> dict[str, Any]:
    return load_file(folder / kind / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(("choice", "final"), [("auto", "ema"), ("raw", "raw")])
def test_weights_every_so_many_steps_and_the_final_ones(train: Any, choice: str, final: str) -> None:
    options = {"use_ema": True, "ema_decay": 0.7, "max_train_steps": 4, "checkpointing_steps": 2}
    run = train(**options, save_steps=2, final_weights=choice)
    assert sorted(p.name for p in run.folder.glob("*saved-*")) == ["saved-2", "saved-4"]
    for step in (2, 4):
        folder = run.folder / f"saved-{step}"
        assert same(saved(folder, "raw"), run.checkpoint(step, "model"))
        assert same(saved(folder, "ema"), run.checkpoint(step, "ema"))
        contents = json.loads((folder / "weights.json").read_text())
        assert contents == {"step": step, "kinds": ["raw", "ema"], "final": final}
        loaded = UNet2DConditionModel.from_pretrained(folder / "ema", subfolder="unet", use_safetensors=True)
        assert same(dict(loaded.state_dict()), run.checkpoint(step, "ema"))
    assert same(run.unet(), saved(run.folder / "saved-4", final))
    finished = json.loads((run.folder / "finished.json").read_text())
    assert (finished["step"], finished["weights"]) == (4, final)
    quiet = train(**options, output="quiet")
    assert same(quiet.checkpoint(4, "model"), run.checkpoint(4, "model"))
    assert not list(quiet.folder.glob("saved-*"))


def test_both_kinds_are_shown_whatever_is_final(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdxl.SDXL, "steps", 1)
    shown: list[dict[str, Any]] = []
    original = sdxl.SDXL.sample

    def spy(self: Any, denoiser: Any, *args: Any) -> Any:
        shown.append({name: p.detach().clone() for name, p in denoiser.named_parameters()})
        return original(self, denoiser, *args)

    monkeypatch.setattr(sdxl.SDXL, "sample", spy)
    options = {"use_ema": True, "validation_prompt": "x", "num_validation_images": 1, "checkpointing_steps": 2}
    run = train(**options, final_weights="raw")
    assert len(shown) == 4
    assert same(shown[2], run.checkpoint(2, "model"))
    assert same(shown[3], run.checkpoint(2, "ema"))


def test_lora_is_saved_as_it_is_loaded(train: Any, model: Path) -> None:
    run = train(rank=2, use_ema=True, ema_decay=0.5, max_train_steps=3, save_steps=2, checkpointing_steps=2)
    files = [f"saved-2/{kind}/pytorch_lora_weights.safetensors" for kind in ("ema", "raw")]
    beside = [f"saved-2/{kind}/out-2-{kind}_kohya.safetensors" for kind in ("ema", "raw")]
    assert sorted(str(p.relative_to(run.folder)) for p in run.folder.glob("saved-*/*/*")) == sorted(files + beside)
    found = load_file(run.folder / files[1])
    checkpoint = run.checkpoint(2, "model")
    assert len(found) == len(checkpoint) > 0
    assert sorted(float(t.double().sum()) for t in found.values()) == sorted(
        float(t.double().sum()) for t in checkpoint.values()
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, add_watermarker=False)
    pipeline.load_lora_weights(run.folder / "saved-2" / "ema")
    assert any("lora" in name for name, _ in pipeline.unet.named_parameters())


def test_a_kill_while_weights_are_written_leaves_no_half_folder(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sdxl.SDXL, "save_denoiser", dying)
        folder = train(max_train_steps=2, save_steps=1, expect_error=True).folder
        assert not list(folder.glob("saved-*"))
    train(max_train_steps=2, save_steps=1)
    assert sorted(p.name for p in folder.iterdir() if "saved" in p.name) == ["saved-1", "saved-2"]


class Quadratic:
    """Schedule-free AdamW on a small problem."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.parameter = nn.Parameter(torch.randn(5))
        self.optimizer = schedulefree.AdamWScheduleFree([self.parameter], lr=0.1)
        self.optimizer.train()
        self.weights = Weights({"p": self.parameter}, self.optimizer, None, "auto")

    def step(self) -> None:
        self.parameter.grad = 2 * self.parameter.detach()
        self.optimizer.step()


def test_schedule_free_uses_its_average_and_trains_on_undisturbed() -> None:
    disturbed, quiet = Quadratic(), Quadratic()
    for _ in range(5):
        disturbed.step()
        quiet.step()
        y, z = disturbed.parameter.detach().clone(), disturbed.optimizer.state[disturbed.parameter]["z"].clone()
        with disturbed.weights.use("raw"):
            assert not disturbed.optimizer.param_groups[0]["train_mode"]
            # y = beta1 * x + (1 - beta1) * z
            assert torch.allclose(0.9 * disturbed.parameter + 0.1 * z, y)
        assert torch.equal(disturbed.parameter, y)
        assert disturbed.optimizer.param_groups[0]["train_mode"]
        assert torch.equal(disturbed.parameter, quiet.parameter)
    disturbed.weights.put("raw")
    assert not torch.equal(disturbed.parameter, quiet.parameter)


def test_schedule_free_run_saves_its_average(train: Any) -> None:
    options = {"optimizer": "schedulefree_adamw", "max_train_steps": 4, "checkpointing_steps": 4}
    run = train(**options, save_steps=2)
    in_training, z = run.checkpoint(4, "model"), run.checkpoint(4, "optimizer")
    result = run.unet()
    assert same(result, saved(run.folder / "saved-4", "raw"))
    assert not same(result, in_training)
    for name, y in in_training.items():
        candidates = [t for key, t in z.items() if key.endswith(".z") and t.shape == y.shape]
        assert any(torch.allclose(0.9 * result[name] + 0.1 * t, y, atol=1e-6) for t in candidates), name
    assert json.loads((run.folder / "finished.json").read_text())["weights"] == "raw"
    quiet = train(**options, output="quiet")
    assert same(quiet.checkpoint(4, "model"), in_training)


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile that traces, but takes no minutes to generate code; what it compiled."""
    compiled: list[Any] = []
    original = torch.compile

    def compile_quickly(function: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append(function)
        return original(function, *args, **kwargs | {"backend": "eager"})

    monkeypatch.setattr(torch, "compile", compile_quickly)
    monkeypatch.setattr("lpl.training.engine._can_compile", lambda kind: True)
    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize(("rank", "text"), [(None, True), (2, False)])
def test_compiled_denoiser_leaves_no_trace_in_files(
    train: Any, eager_backend: list[Any], rank: int | None, text: bool
) -> None:
    options = {"rank": rank, "train_text_encoder": text, "use_ema": True, "checkpointing_steps": 2}
    plain = train(**options, output="plain")
    assert eager_backend == []
    run = train(**options, save_steps=2, compile_denoiser=True)
    assert [type(function.__self__).__name__ for function in eager_backend] == ["UNet2DConditionModel"]
    for part in ("model", "ema"):
        a, b = plain.checkpoint(2, part), run.checkpoint(2, part)
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    files = list(run.folder.rglob("*.safetensors"))
    assert len(files) > 4
    assert [f for f in files if any("_orig_mod" in key for key in load_file(f))] == []
    assert plain.unet().keys() == run.unet().keys()


@pytest.mark.slow
def test_accelerates_own_compiling_leaves_no_trace_either(
    train: Any, eager_backend: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate config` may ask for it; its wrapper has _orig_mod in the names."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    for rank, text in ((None, False), (2, False), (2, True)):
        options = {"rank": rank, "train_text_encoder": text, "output": f"rank{rank}{text}"}
        run = train(**options, checkpointing_steps=2, save_steps=2)
        files = list(run.folder.rglob("*.safetensors"))
        assert len(files) >= 4
        assert [f for f in files if any("_orig_mod" in key for key in load_file(f))] == []
    assert eager_backend != []


def test_compiling_needs_a_compiler(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpl.training.engine._can_compile", lambda kind: False)
    run = train(compile_denoiser=True, expect_error=True)
    assert run.errors == ["error: --compile_denoiser needs a C++ compiler, which was not found: install it or drop the "
                          "option"]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"final_weights": "ema"}, "--final_weights ema needs --use_ema"),
        ({"use_ema": True, "ema_min_decay": 1.0}, "--ema_min_decay must lie in 0..0.9999"),
        ({"use_ema": True, "ema_power": 0.0}, "--ema_power must be positive"),
        ({"use_ema": True, "ema_update_every": 0}, "--ema_update_every must be at least 1"),
        ({"use_ema": True, "ema_update_after_step": -1}, "--ema_update_after_step must be 0 or more"),
        ({"save_steps": 0}, "--save_steps must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(train: Any, options: dict[str, Any], expected: str) -> None:
    run = train(**options, expect_error=True)
    assert len(run.errors) == 1
    assert expected in run.errors[0]
