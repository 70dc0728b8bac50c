"""What the model, its files and the user say of the schedule acts, wherever a scheduler is made."""

from __future__ import annotations

import ast
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lpl
from lpl.base.errors import UserError
from lpl.base.tensor_file import write_tensors
from lpl.config import ModelConfig
from lpl.config.model_commands import ExportConfig
from lpl.families import check_export, load_family, model_configs, plan_configs, schedulers
from lpl.families.export import resolve
from lpl.families.sampling import check_sampling, load_for_sampling
from lpl.families.schedulers import build_scheduler
from lpl.families.sdxl_export import SDXLExport

CPU = torch.device("cpu")
ASKED = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
LORA = "pytorch_lora_weights.safetensors"


def said(scheduler: Any) -> tuple[Any, ...]:
    return tuple(scheduler.config.get(key) for key in (*ASKED, "timestep_spacing"))


V = ("v_prediction", True, "trailing")


@pytest.fixture(scope="module")
def lean(model: Path, shared: Path) -> Path:
    """The tiny model with a scheduler_config.json that says as little as one can."""
    folder = Path(shutil.copytree(model, shared / "lean"))
    file = folder / "scheduler" / "scheduler_config.json"
    kept = ("_class_name", "beta_start", "beta_end", "beta_schedule")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k in kept}))
    return folder


@pytest.fixture(scope="module")
def single(model: Path, shared: Path) -> Path:
    """The tiny model as one file that says nothing of its schedule."""
    file = shared / "facts.safetensors"
    tensors, _ = SDXLExport(ModelConfig(str(model)), None, None, 1.0).single_file("x")
    write_tensors(tensors, file, {})
    return file


@pytest.fixture(autouse=True)
def _warns_anew() -> None:
    schedulers.warn.cache_clear()


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("to", [None, DDPMScheduler, DPMSolverMultistepScheduler])
def test_a_change_of_what_the_file_lacks_acts(cls: Any, to: Any) -> None:
    """diffusers' from_config drops it, which is the fault that this is about."""
    file = {"_class_name": cls.__name__, "beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "scaled_linear"}
    loaded = cls.from_config(file)
    changes = ASKED | {"timestep_spacing": "trailing"}
    assert said(cls.from_config(dict(loaded.config) | changes)) != V
    built = build_scheduler(to or cls, loaded.config, **changes)
    assert said(built) == V
    assert (built.config.beta_start, built.config.beta_end) == (0.001, 0.01)
    assert float(built.alphas_cumprod[-1]) < 1e-6
    assert said(build_scheduler(cls, built.config)) == V


def test_what_a_class_cannot_follow_is_refused_in_one_line() -> None:
    euler = EulerDiscreteScheduler(**ASKED).config
    for cls, config, changes, message in [
        (PNDMScheduler, euler, {}, "rescale_betas_zero_snr is to be True, but in a PNDMScheduler it is not known"),
        (PNDMScheduler, {}, {"rescale_betas_zero_snr": True}, "not known to it"),
        (DDPMScheduler, euler, {"no_such_key": 1}, "no_such_key is to be 1"),
        (DDPMScheduler, {"beta_schedule": "mine"}, {}, "makes no DDPMScheduler"),
        (DDPMScheduler, {"num_train_timesteps": "x"}, {}, "makes no DDPMScheduler"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            build_scheduler(cls, config, **changes)
        assert "\n" not in str(caught.value)
    # Another sampler's own settings are its own business.
    build_scheduler(DPMSolverMultistepScheduler, UniPCMultistepScheduler().config, algorithm_type="dpmsolver++")


def test_schedulers_are_built_in_one_place() -> None:
    found = []
    for file in Path(lpl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "from_config":
                whose = ast.unparse(node.value)
                if "cheduler" in whose or whose in ("cls", "type"):
                    found.append(f"{file.name}: {whose}")
    assert found == ["schedulers.py: cls"]


def test_options_act_on_every_way_to_load_a_lean_model(lean: Path) -> None:
    config = ModelConfig(str(lean), **ASKED)
    family = load_family(config, CPU, torch.float32)
    assert said(family.pipeline.scheduler) == V
    assert family.schedule.prediction_type == V[0]
    assert family.schedule.alpha[-1] == 0
    sampler = load_for_sampling(config, torch.float32, CPU, scheduler="dpmsolver++")
    assert type(sampler.pipeline.scheduler) is DPMSolverMultistepScheduler
    assert said(sampler.pipeline.scheduler) == V
    assert said(load_for_sampling(config, torch.float32, CPU).pipeline.scheduler) == V
    tensors, metadata = SDXLExport(config, None, None, 1.0).single_file("x")
    assert {"v_pred", "ztsnr"} <= dict(tensors).keys()
    assert metadata["modelspec.prediction_type"] == "v"


def altered(single: Path, file: Path, metadata: dict[str, str] | None = None, **more: Any) -> Path:
    """The single file with further tensors (None: without those whose names begin so)."""
    gone = tuple(name for name, value in more.items() if value is None)
    tensors = {k: v for k, v in load_file(single).items() if not (gone and k.startswith(gone))}
    save_file(tensors | {k: v for k, v in more.items() if v is not None}, file, metadata)
    return file


EMPTY = torch.zeros(0)


@pytest.mark.parametrize(
    ("more", "word", "expected"),
    [
        ({}, None, ("epsilon", False)),
        ({"v_pred": EMPTY}, None, ("v_prediction", False)),
        ({"v_pred": EMPTY, "ztsnr": EMPTY}, None, ("v_prediction", True)),
        ({}, "v", ("v_prediction", False)),
        ({}, "epsilon", ("epsilon", False)),
        ({"v_pred": EMPTY}, "epsilon", ("v_prediction", False)),
    ],
)
def test_a_single_file_says_its_schedule(
    single: Path, model: Path, lean: Path, tmp_path: Path, more: Any, word: Any, expected: Any
) -> None:
    file = altered(single, tmp_path / "a.safetensors", word and {"modelspec.prediction_type": word}, **more)
    for folder in (model, lean):
        config = ModelConfig(str(file), single_file_config=str(folder))
        for configs in (model_configs(config), plan_configs(config)):
            stated = configs["scheduler"]
            assert (stated.get("prediction_type", "epsilon"), stated.get("rescale_betas_zero_snr", False)) == expected
    family = load_family(config, CPU, torch.float32)
    assert (family.schedule.prediction_type, bool(family.schedule.alpha[-1] == 0)) == expected
    assert said(family.pipeline.scheduler)[:2] == expected
    assert (said(family.pipeline.scheduler)[2] == "trailing") == expected[1]


def test_the_option_goes_before_the_file_and_a_difference_is_said_once(
    single: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = altered(single, tmp_path / "a.safetensors", {"modelspec.prediction_type": "epsilon"}, v_pred=EMPTY)

    def warnings() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == "lpl" and r.levelno == logging.WARNING]
        caplog.clear()
        return found

    own = ModelConfig(str(file), single_file_config=str(model))
    model_configs(own)
    SDXLExport(own, None, None, 1.0)
    assert [text.rpartition(": ")[2] for text in warnings()] == ["the key counts", "the file counts"]
    config = ModelConfig(str(file), single_file_config=str(model), prediction_type="epsilon")
    assert model_configs(config)["scheduler"]["prediction_type"] == "epsilon"
    assert load_family(config, CPU, torch.float32).schedule.prediction_type == "epsilon"
    assert warnings() == [f"--prediction_type epsilon: {file} says v_prediction; the option counts"]


UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "conditioner."
LAYER = f"{UNET}input_blocks.0.0."


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"edm_vpred.sigma_max": torch.zeros(())}, "an EDM model (edm_vpred.sigma_max)"),
        ({"edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)}, "an EDM model (edm_mean, edm_std)"),
        ({"scaled_fp8": EMPTY.to(torch.float8_e4m3fn)}, "scaled fp8 (scaled_fp8)"),
        ({f"{LAYER}scale_weight": torch.zeros(())}, f"scaled fp8 ({LAYER}scale_weight)"),
        ({f"{LAYER}bias": torch.zeros(8, dtype=torch.int8)}, f"1 weights are no floating-point numbers ({LAYER}bias"),
        ({VAE: None}, "no VAE in it (first_stage_model....); give one with --pretrained_vae_model_name_or_path"),
        ({VAE: None, TEXT: None}, "a UNet or transformer alone"),
        ({UNET: None, TEXT: None}, "a VAE alone; give it with --pretrained_vae_model_name_or_path"),
        ({UNET: None}, "not an SDXL checkpoint (no UNet)"),
        ({f"{TEXT}embedders.0": None}, "not an SDXL checkpoint (no first text encoder)"),
        ({f"{TEXT}embedders.1": None}, "not an SDXL checkpoint (no second text encoder)"),
        ({UNET: None, VAE: None, TEXT: None, "lora_unet_x.lora_up.weight": torch.zeros(1)}, "a LoRA, not a model"),
        ({"ztsnr": EMPTY}, "ztsnr in it: the model predicts epsilon"),
        ({"metadata": {"modelspec.prediction_type": "other"}}, "modelspec.prediction_type is other: say what it is by"),
    ],
)
def test_a_file_that_is_not_trained_right_is_one_line_everywhere(
    single: Path, model: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    file = altered(single, tmp_path / "a.safetensors", **more)
    for folder in (str(model), None):
        config = ModelConfig(str(file), single_file_config=folder)
        for look in (
            model_configs,
            plan_configs,
            lambda config: check_export(config, True, None),
            lambda config: check_sampling(config, None),
        ):
            if folder is None and look is plan_configs and "ztsnr" in more:
                continue  # a plan asks first whose configs a file of unknown size has
            with pytest.raises(UserError) as caught:
                look(config)
            assert str(caught.value).startswith(f"--pretrained_model_name_or_path {file}: ")
            assert message in str(caught.value)
            assert "\n" not in str(caught.value)


def test_integer_weights_of_a_folder_are_refused(model: Path, tmp_path: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        folder = Path(shutil.copytree(model, tmp_path / part))
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("weight"))
        save_file(tensors | {name: tensors[name].to(torch.int8)}, file, {"format": "pt"})
        with pytest.raises(UserError, match=rf"{part}/{file.name}: quantised: 1 weights .*\({name} is I8\)"):
            model_configs(ModelConfig(str(folder)))
        if part == "vae":
            with pytest.raises(UserError, match=r"^--pretrained_vae_model_name_or_path .*quantised"):
                model_configs(ModelConfig(str(model), pretrained_vae_model_name_or_path=str(folder / part)))


def test_a_file_without_vae_takes_another(single: Path, model: Path, tmp_path: Path) -> None:
    file = altered(single, tmp_path / "a.safetensors", **{VAE: None})
    config = ModelConfig(str(file), single_file_config=str(model), pretrained_vae_model_name_or_path=str(model / "vae"))
    model_configs(config)
    own, expected = (load_family(c, CPU, torch.float32).vae.state_dict() for c in (config, ModelConfig(str(model))))
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)
    with pytest.raises(UserError, match=r"^--pretrained_vae_model_name_or_path .*/nix: no such folder"):
        model_configs(ModelConfig(str(file), pretrained_vae_model_name_or_path=str(tmp_path / "nix")))


@pytest.fixture(scope="module")
def lora_run(train_in: Any, lean: Path, shared: Path) -> Path:
    options = ASKED | {"rank": 2, "max_train_steps": 1, "checkpointing_steps": 1, "use_lpl": False}
    folder: Path = train_in(shared / "lora-v", pretrained_model_name_or_path=lean, **options).folder
    return folder


def merged(request: Any) -> tuple[Any, ...]:
    check_export(request.model, True, request.lora)
    return said(SDXLExport(request.model, None, request.lora, 1.0).pipeline.scheduler)


def test_a_lora_remembers_its_schedule(lora_run: Path, lean: Path, model: Path, tmp_path: Path) -> None:
    """Of the run, onto another base, as a file alone in either naming, and moved away from its config.yaml."""

    def ask(source: Path, **options: Any) -> Any:
        given = {name: str(value) for name, value in options.items()}
        return resolve(ExportConfig(str(source), output="-", **given))

    kohya = lora_run / "lora-v_kohya.safetensors"
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(lora_run / LORA, alone)
    requests = [
        ask(lora_run),
        ask(lora_run, base=model),
        ask(model, lora=lora_run),
        ask(lean, lora=kohya),
        ask(alone, base=lean),
    ]
    assert [merged(request) for request in requests] == [V] * len(requests)
    for file in (lora_run / LORA, kohya):
        with safe_open(file, "pt") as content:
            metadata = content.metadata()
        assert metadata["modelspec.prediction_type"] == "v"
        assert metadata["modelspec.resolution"] == "16x16"
        assert metadata["ss_zero_terminal_snr"] == "True"
        assert (metadata["ss_sd_model_name"], metadata["ss_num_train_images"], metadata["ss_steps"]) == (
            "lean",
            "6",
            "1",
        )
    assert metadata["ss_output_name"] == "lora-v_kohya"


def test_what_a_lora_took_from_its_base_is_the_next_bases_business(
    lora_run: Path, lean: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a LoRA of another program: the base decides, and a difference is said."""
    file = tmp_path / "theirs.safetensors"
    save_file(load_file(lora_run / "lora-v_kohya.safetensors"), file, {"modelspec.prediction_type": "v"})
    request = resolve(ExportConfig(str(lean), output="-", lora=str(file)))
    assert merged(request)[:2] == ("epsilon", False)
    assert [r.getMessage() for r in caplog.records if "was trained on" in r.getMessage()] == [
        f"{file}: was trained on v_prediction; the model it is merged into predicts epsilon, and so will the result"
    ]


def test_going_on_from_a_run_of_another_schedule_is_refused(lora_run: Path, train: Any, lean: Path) -> None:
    options = {"rank": 2, "max_train_steps": 2, "use_lpl": False, "pretrained_model_name_or_path": lean}
    options |= {"resume_from_checkpoint": lora_run / "checkpoint-1"}
    failed = train(**options, expect_error=True)
    assert "--prediction_type v_prediction -> None, --rescale_betas_zero_snr True -> False" in failed.errors[0]
    assert train(**options, **ASKED).code == 0
