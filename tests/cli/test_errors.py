"""Bad input: one line that names the flag or file, a non-zero exit, before weights load, and nothing is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpl.base.errors import UserError
from lpl.cli import OTHERS_WAIT_S
from lpl.presets import presets

Refused = Callable[..., str]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def refused(
    run_cli: Any, as_flags: Any, base_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Runs `lpl train`; returns the one line that it must end with, before any weights load."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")

    def load(*_: Any) -> None:
        raise UserError("weights were about to load")

    def run(*argv: str, **options: Any) -> str:
        before = contents(out)
        with monkeypatch.context() as patch:
            patch.setattr("lpl.training.trainer.load_family", load)
            code, stdout, stderr = run_cli(["train", *argv, *as_flags({"output_dir": out, **base_options, **options})])
        assert code == 2, stderr
        assert stdout == ""
        lines = [line for line in stderr.splitlines() if line and "%|" not in line and " examples [" not in line]
        assert len(lines) == 1, stderr
        assert lines[0].startswith("error: ")
        assert contents(out) == before
        return lines[0].removeprefix("error: ")

    return run


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


# --- options


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--lpl_wieght", "2"], ["--lpl_wieght", "did you mean lpl_weight"]),
        (["--max_train_step", "2"], ["--max_train_step", "did you mean max_train_steps"]),
        (["--zzz"], ["unknown option --zzz"]),
        (["--no_lpl_weight"], ["--no_lpl_weight"]),
        (["--use_lpl", "True"], ["--use_lpl takes no value", "--no_use_lpl"]),
        (["--use_lpl=false"], ["--use_lpl takes no value", "--no_use_lpl"]),
        (["--no_use_lpl", "True"], ["--no_use_lpl takes no value"]),
        (["surplus"], ["surplus"]),
        (["--max_train_steps", "many"], ["--max_train_steps", "'many'"]),
        (["--max_train_steps"], ["--max_train_steps"]),
        (["--lpl_weight", "heavy"], ["--lpl_weight", "'heavy'", "auto"]),
        (["--lpl_norm_type", "chanel"], ["--lpl_norm_type", "'chanel'", "channel_detached"]),
        (["--mixed_precision", "fp8"], ["--mixed_precision", "'fp8'", "bf16"]),
        (["--local_rank", "0"], ["--local_rank is not taken", "accelerate launch"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_flag_that_cannot_be_read(run_cli: Any, argv: list[str], expected: list[str]) -> None:
    code, out, err = run_cli(["train", *argv])
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    for part in expected:
        assert part in err
    assert "helptext" not in err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lpl_t_threshold": 1001}, "--lpl_t_threshold 1001 lies outside the model's schedule of 1000 timesteps"),
        ({"lpl_sigma_threshold": 3.0}, "contradictory gates: --lpl_t_threshold 700, --lpl_sigma_threshold 3.0"),
        (
            {"lpl_t_threshold": None, "lpl_sigma_threshold": 3.0, "lpl_snr_threshold": 1.0},
            "contradictory gates: --lpl_snr_threshold 1.0, --lpl_sigma_threshold 3.0",
        ),
        ({"lpl_weight": -0.5}, "--lpl_weight must be auto, or be 0 or more, not -0.5"),
        ({"lpl_target_share": 0.4}, "--lpl_target_share acts with --lpl_weight auto only"),
        ({"lpl_chunk": 0}, "--lpl_chunk must be auto, or be at least 1, not 0"),
        ({"lpl_crop": 10}, "--lpl_crop 10 must be a multiple of the VAE's 4 pixels per latent and smaller than"),
        ({"lpl_crop": 16}, "--lpl_crop 16 must be a multiple of the VAE's 4 pixels per latent and smaller than"),
        ({"learning_rate": "nan"}, "--learning_rate must be positive"),
        ({"resolution": 18}, "--resolution 18 is no multiple of the VAE's 4"),
        ({"resolution": 4}, "--resolution must lie in 8..4096, not 4"),
        ({"dataset_name": "a/b"}, "--train_data_dir and --dataset_name are all given"),
        ({"center_crop": True, "crop_variants": 2}, "--crop_variants needs random crops"),
        ({"lr_scheduler": "piecewise_constant"}, "--lr_scheduler piecewise_constant needs --lr_step_rules"),
        ({"lr_power": 2.0}, "--lr_power 2.0 acts with --lr_scheduler polynomial only"),
        ({"lr_scheduler": "cosine", "lr_step_rules": "1:2,3"}, "--lr_step_rules 1:2,3 acts with --lr_scheduler"),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_begin": 5, "timestep_bias_end": 5},
            "--timestep_bias_begin 5 must be 0 or more and lie below --timestep_bias_end 5",
        ),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_end": 1001},
            "--timestep_bias_end 1001 lies outside the model's 1000 timesteps",
        ),
        ({"report_to": "comet_ml"}, "--report_to comet_ml: comet_ml is not installed: pip install comet_ml"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs an accelerator; on a CPU use bf16 or no"),
        ({"use_8bit_adam": True}, "--use_8bit_adam needs a GPU"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint checkpoint-7: no complete checkpoint"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_option_that_contradicts_the_run(refused: Refused, options: dict[str, Any], expected: str) -> None:
    assert expected in refused(**options)


@pytest.mark.parametrize("gate", [{"lpl_snr_threshold": 1e9}, {"lpl_sigma_threshold": 1e-6}])
def test_gate_that_no_timestep_passes(refused: Refused, gate: dict[str, float]) -> None:
    text = refused(lpl_t_threshold=None, **gate)
    assert f"--{next(iter(gate))}" in text
    assert "no timestep" in text


def test_gate_that_the_timestep_bias_never_passes(refused: Refused) -> None:
    bias = {"timestep_bias_strategy": "range", "timestep_bias_begin": 0, "timestep_bias_end": 700}
    text = refused(**bias, timestep_bias_multiplier=0.0)
    assert "no timestep" in text


def test_malformed_step_rules(refused: Refused) -> None:
    assert "--lr_step_rules" in refused(lr_scheduler="piecewise_constant", lr_step_rules="fast:then,slow")


# --- --config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lpl_wieght: 2\n", "unknown key lpl_wieght; did you mean lpl_weight?"),
        ("local_rank: 0\n", "local_rank is not taken"),
        ("lpl_weight: [1, 2]\n", "lpl_weight takes a single value"),
        ("- lpl_weight\n", "expected lines of `option: value`"),
        ("lpl_weight: 'x\n", "not YAML"),
        ("lpl_start: late\n", "--lpl_start"),
        ("use_lpl: perhaps\n", "use_lpl: expected true or false, not 'perhaps'"),
        ("lpl_num_blocks: -1\n", "--lpl_num_blocks must lie in 0..100, not -1"),
    ],
)
def test_config_file_with_a_fault(refused: Refused, tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    found = refused("--config", str(file))
    assert expected in found


def test_config_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    text = refused("--config", "sdxl-lorra")
    assert f"--config sdxl-lorra: neither a file nor a preset; presets: {', '.join(presets())}" in text
    assert "--config" in refused("--config")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "binary.yaml" in refused("--config", str(tmp_path / "binary.yaml"))


# --- data


def test_data_that_is_missing(refused: Refused, tmp_path: Path) -> None:
    assert "--train_data_dir" in refused(train_data_dir=None)
    assert f"--train_data_dir {tmp_path / 'none'}: no such folder" in refused(train_data_dir=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert f"--train_data_dir {tmp_path / 'empty'}: no images in it" in refused(train_data_dir=tmp_path / "empty")


def test_column_that_is_not_there(refused: Refused, data: Path, tmp_path: Path) -> None:
    text = refused(caption_column="caption")
    assert "no key caption; its keys: file_name, text" in text
    assert "--caption_column" in text
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    table = tmp_path / "table"
    table.mkdir()
    (table / "train.jsonl").write_text("\n".join(json.dumps({"picture": "0.png", **row}) for row in rows))
    text = refused(train_data_dir=None, dataset_name=table, cache_dir=tmp_path / "hf")
    assert text.startswith("--image_column image: ")
    assert "it has: picture, file_name, text" in text
    text = refused(train_data_dir=None, dataset_name=table, cache_dir=tmp_path / "hf", image_column="picture",
                   caption_column="label")  # fmt: skip
    assert text.startswith("--caption_column label: ")
    assert "it has: picture, file_name, text" in text


# --- model


def test_model_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    flag = "--pretrained_model_name_or_path"
    assert f"{flag} is missing" in refused(pretrained_model_name_or_path=None)
    assert f"{flag} {tmp_path / 'no'}: no such folder" in refused(pretrained_model_name_or_path=tmp_path / "no")
    assert f"{flag} some/model: no such folder, and the Hub" in refused(pretrained_model_name_or_path="some/model")
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "notes.txt").write_text("x")
    text = refused(pretrained_model_name_or_path=tmp_path / "wrong")
    assert "no model_index.json" in text
    assert "it holds notes.txt" in text


def test_model_says_all_that_is_missing_in_it(refused: Refused, broken: Path) -> None:
    shutil.rmtree(broken / "tokenizer_2")
    (broken / "unet" / "config.json").unlink()
    (broken / "scheduler" / "scheduler_config.json").unlink()
    for file in (broken / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    text = refused(pretrained_model_name_or_path=broken)
    assert text.startswith(f"--pretrained_model_name_or_path {broken}: missing in it: ")
    for part in ("tokenizer_2", "unet/config.json", "scheduler/scheduler_config.json", "vae/*.safetensors (only .bin"):
        assert part in text
    assert "text_encoder" not in text


def test_variant_that_is_not_there(refused: Refused) -> None:
    text = refused(variant="fp16")
    assert "missing in it: unet/*.safetensors" in text


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "--prediction_type v_prediction"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction type flow is not trained here"),
        ("unet/config.json", {"in_channels": 9}, "inpainting model (9 input channels)"),
        ("unet/config.json", {"in_channels": 8}, "the UNet takes 8 channels, the VAE's latents have 4"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type text_time"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ("model_index.json", {"requires_aesthetics_score": True}, "refiner"),
        ("model_index.json", {"text_encoder": [None, None]}, "refiner"),
        ("model_index.json", {"_class_name": "KandinskyPipeline"}, "KandinskyPipeline"),
    ],
)
def test_model_that_is_not_trained_right_here(
    refused: Refused, broken: Path, file: str, changes: dict[str, Any], expected: str
) -> None:
    edit(broken / file, **changes)
    text = refused(pretrained_model_name_or_path=broken)
    assert str(broken) in text
    assert expected in text


def test_zero_terminal_snr_is_taken_with_v_prediction(refused: Refused, broken: Path) -> None:
    edit(broken / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    text = refused(pretrained_model_name_or_path=broken, prediction_type="v_prediction")
    assert text == "weights were about to load"
    edit(broken / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    text = refused(pretrained_model_name_or_path=broken, prediction_type="epsilon")
    assert "--prediction_type v_prediction" in text


def test_model_with_a_cut_config(refused: Refused, broken: Path) -> None:
    file = broken / "unet" / "config.json"
    file.write_text(file.read_text()[:100])
    text = refused(pretrained_model_name_or_path=broken)
    assert "unet/config.json" in text


def test_weights_that_are_cut_short(refused: Refused, broken: Path) -> None:
    (file,) = (broken / "unet").glob("*.safetensors")
    whole = file.read_bytes()
    for length in (0, 4, 400, len(whole) - 1):
        file.write_bytes(whole[:length])
        text = refused(pretrained_model_name_or_path=broken)
        assert text == f"--pretrained_model_name_or_path {broken}: missing in it: the end of unet/{file.name}"


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"])
def test_weights_of_another_shape(train: Any, model: Path, broken: Path, flag: str) -> None:
    """Seen only when they load; still one line that names the flag, and no claim on the output folder."""
    (file,) = (broken / "vae").glob("*.safetensors")
    weights = load_file(file)
    save_file(weights | {"encoder.conv_in.weight": torch.zeros(3, 3, 3, 3)}, file, metadata={"format": "pt"})
    folder = broken if flag == "pretrained_model_name_or_path" else broken / "vae"
    failed = train(**{flag: folder}, expect_error=True)
    (line,) = failed.errors
    assert line.startswith(f"error: --{flag} {folder}: ")
    assert not failed.folder.exists()


def test_vae_of_a_hub_that_cannot_be_reached(train: Any) -> None:
    flag = "pretrained_vae_model_name_or_path"
    (line,) = train(**{flag: "nobody/vae"}, expect_error=True).errors
    assert line == f"error: --{flag} nobody/vae: no such folder, and the Hub cannot be reached for config.json"


def test_vae_that_does_not_fit(refused: Refused, model: Path, tmp_path: Path) -> None:
    flag = "--pretrained_vae_model_name_or_path"
    assert f"{flag} {tmp_path / 'no'}: no such folder" in refused(pretrained_vae_model_name_or_path=tmp_path / "no")
    assert f"{flag} {tmp_path}: no config.json" in refused(pretrained_vae_model_name_or_path=tmp_path)
    vae = Path(shutil.copytree(model / "vae", tmp_path / "vae"))
    edit(vae / "config.json", latent_channels=16)
    assert f"{flag} {vae}: 16 latent channels, the denoiser takes 4" in refused(pretrained_vae_model_name_or_path=vae)
    edit(vae / "config.json", _class_name="AutoencoderTiny")
    assert f"{flag} {vae}: AutoencoderTiny" in refused(pretrained_vae_model_name_or_path=vae)
    (file,) = vae.glob("*.safetensors")
    edit(vae / "config.json", _class_name="AutoencoderKL")
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{flag} {vae}: {file.name} is cut short" in refused(pretrained_vae_model_name_or_path=vae)
    file.unlink()
    assert f"{flag} {vae}: no .safetensors in it" in refused(pretrained_vae_model_name_or_path=vae)


# --- single files


def test_pickled_checkpoint_is_refused(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"\x80\x02")
    text = refused(pretrained_model_name_or_path=file)
    assert f"{file}: .ckpt files are pickles and are not read; convert it to .safetensors" in text


def test_safetensors_that_is_no_sdxl(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    assert f"{file}: no such file" in refused(pretrained_model_name_or_path=file)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}, file)
    assert f"{file}: not an SDXL checkpoint" in refused(pretrained_model_name_or_path=file)
    save_file({"conditioner.embedders.0.model.ln_final.weight": torch.zeros(4)}, file)
    assert f"{file}: an SDXL refiner" in refused(pretrained_model_name_or_path=file)
    sdxl = "conditioner.embedders.1.model.ln_final.weight"
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({sdxl: torch.zeros(4), unet: torch.zeros(8, 9, 3, 3)}, file)
    assert "inpainting model (9 input channels)" in refused(pretrained_model_name_or_path=file)
    save_file({sdxl: torch.zeros(4), unet: torch.zeros(8, 4, 3, 3)}, file)
    whole = file.read_bytes()
    for length in (0, 4, 40, len(whole) - 1):
        file.write_bytes(whole[:length])
        text = refused(pretrained_model_name_or_path=file)
        assert f"{file}: not a safetensors file, or cut short" in text
    file.write_bytes(b"not a safetensors file at all")
    assert f"{file}: not a safetensors file, or cut short" in refused(pretrained_model_name_or_path=file)


def test_single_file_config_that_is_no_model(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    parts = ("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.transformer.")
    tensors = {f"{part}weight": torch.zeros(4) for part in (*parts, "conditioner.embedders.1.model.ln_final.")}
    save_file(tensors, file)
    text = refused(pretrained_model_name_or_path=file, single_file_config=tmp_path / "none")
    assert f"--single_file_config {tmp_path / 'none'}: no model_index.json" in text
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model_index.json").write_text("{}")
    text = refused(pretrained_model_name_or_path=file, single_file_config=tmp_path / "half")
    assert "unet/config.json" in text


# --- output folder


def test_output_of_another_configuration_is_left_alone(refused: Refused, train: Any, tmp_path: Path) -> None:
    train(checkpointing_steps=1)
    options = {"learning_rate": 2e-3, "lpl_weight": 0.5, "checkpointing_steps": 1}
    text = refused(**options)
    assert text.startswith(f"--output_dir {tmp_path / 'out'} holds a run of another configuration: ")
    assert "--learning_rate 0.001 -> 0.002" in text
    assert "--lpl_weight 1.0 -> 0.5" in text
    assert "checkpointing_steps" not in text
    assert "max_train_steps" not in text


def test_output_that_is_in_the_way(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert f"--output_dir {tmp_path / 'file'}: a file is in the way" in refused(output_dir=tmp_path / "file")


@pytest.mark.parametrize("text", ["a: [1\n", "- a\n", "shape: round\n"])
def test_config_yaml_of_something_else_is_not_overwritten(refused: Refused, tmp_path: Path, text: str) -> None:
    (tmp_path / "out" / "config.yaml").write_text(text)
    assert f"{tmp_path / 'out' / 'config.yaml'}" in refused()


# --- a loss that is not finite


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nan_in_one_sample_stops_with_step_sample_and_term(
    train: Any, monkeypatch: pytest.MonkeyPatch, accumulation: int, tmp_path: Path
) -> None:
    from lpl.training.step import TrainingStep

    options = {"max_train_steps": 4, "train_batch_size": 2, "checkpointing_steps": 2, "log_every": 4, "use_lpl": False}
    options["gradient_accumulation_steps"] = accumulation
    seen: list[list[str]] = []
    original = TrainingStep.__call__

    def poisoned(self: TrainingStep, denoiser: Any, batch: Any, *rest: Any) -> Any:
        seen.append(batch.sample_ids)
        if len(seen) == 3 * accumulation:
            batch.text["pooled"][1] = float("nan")
        return original(self, denoiser, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", poisoned)
        failed = train(**options, expect_error=True)
    assert failed.code == 3
    (line,) = failed.errors
    culprit = seen[3 * accumulation - 1][1]
    assert f"the diffusion loss was not finite at step 3 (samples {culprit})" in line
    assert f"{failed.folder / 'checkpoint-2'} is the last checkpoint" in line
    assert f"load_file('{failed.folder / 'nonfinite-step-3.safetensors'}')" in line
    assert sorted(p.name for p in failed.folder.glob("checkpoint-*")) == ["checkpoint-2"]
    assert not (failed.folder / "unet").exists()
    again = train(**options)
    clean = train(**options, output="clean")
    assert all(torch.equal(v, clean.unet()[k]) for k, v in again.unet().items())


def test_nan_of_lpl_is_told_from_nan_of_the_diffusion_loss(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lpl.perceptual.objective import PerceptualObjective

    original = PerceptualObjective.__call__

    def poisoned(self: Any, *args: Any, **options: Any) -> Any:
        term = original(self, *args, **options)
        return term._replace(loss=term.loss * float("nan"))

    monkeypatch.setattr(PerceptualObjective, "__call__", poisoned)
    failed = train(train_batch_size=2, expect_error=True)
    (line,) = failed.errors
    assert failed.code == 3
    assert "error: LPL was not finite at step 1 (samples " in line
    assert "diffusion" not in line
    assert "no checkpoint was written yet" in line


def test_model_with_nan_weights(train: Any, model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "nan"))
    (file,) = (broken / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_in.weight"] = weights["conv_in.weight"].clone().fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})
    failed = train(pretrained_model_name_or_path=broken, expect_error=True)
    (line,) = failed.errors
    assert "error: the diffusion loss " in line
    assert " not finite at step 1 (samples " in line
    assert not (failed.folder / "unet").exists()


def test_image_that_cannot_be_decoded(train: Any, data: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(data, tmp_path / "data"))
    (copied / "3.png").write_bytes((copied / "3.png").read_bytes()[:60])
    failed = train(train_data_dir=copied, max_bad_fraction=0, expect_error=True)
    assert failed.errors[0].startswith(f"error: --train_data_dir {copied}: 1 of 6 images cannot be used, first ")
    assert str(copied / "3.png") in failed.errors[0]
    assert [path.name for path in failed.folder.iterdir()] == ["bad_files.jsonl"]


# --- in a process of its own


def test_error_is_the_only_line_of_a_real_process(model: Path, data: Path, tmp_path: Path) -> None:
    """Without torch: what preflight says comes at once."""
    code = (
        "import sys\n"
        "from lpl.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    argv = ["train", f"--pretrained_model_name_or_path={model}", f"--train_data_dir={data}"]
    argv += [f"--output_dir={tmp_path / 'out'}", "--resolution=16", "--lpl_t_threshold=2000"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: --lpl_t_threshold 2000 lies outside the model's schedule of 1000 timesteps"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("argv", "expected"), [(["trian"], "did you mean train?"), (["nothing"], "known: train")])
def test_unknown_command(run_cli: Any, argv: list[str], expected: str) -> None:
    code, out, err = run_cli(argv)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: unknown command")
    assert expected in err


def test_other_processes_of_a_launch_speak_too_after_the_first(run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first has not failed nobody else would say what is wrong."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    said = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        said[rank] = run_cli(["trian"])
    assert said["1"] == said["0"]
    assert said["1"][2].startswith("error: unknown command")
    assert waited == [OTHERS_WAIT_S]
