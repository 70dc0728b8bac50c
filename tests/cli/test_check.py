"""`lpl check` through the command line, on the tiny model."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

import lpl.perceptual.precision
from lpl import cli
from lpl.analysis.check import cost, precision
from lpl.perceptual.decoders.autoencoder_kl import AutoencoderKLTaps


@pytest.fixture
def check(run_cli: Any, as_flags: Any, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `lpl check` on the six small pictures; returns (check.json, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*argv: str, code: int = 0, **options: Any) -> tuple[dict[str, Any], str, str]:
        base = {
            "pretrained_model_name_or_path": model,
            "train_data_dir": data,
            "output_dir": tmp_path / "out",
            "resolution": 16,
            "lpl_norm_type": "channel",
        }
        found, out, err = run_cli(["check", *argv, *as_flags(base | options)])
        assert found == code, err
        assert not (tmp_path / "cache").exists()
        file = tmp_path / "out" / "check-report" / "check.json"
        return json.loads(file.read_text()) if file.exists() else {}, out, err

    return run


def page_of(folder: Path) -> str:
    return (folder / "out" / "check-report" / "report.html").read_text()


def test_report_table_and_pictures(check: Any, tmp_path: Path) -> None:
    found, out, err = check()
    assert "error" not in err
    assert found["kind"] == "check"
    assert found["environment"]["torch"] == torch.__version__.split("+")[0] or found["environment"]["torch"]
    assert found["options"]["resolution"] == 16
    assert found["options"]["num_images"] == 32
    assert "hub_token" not in found["options"]
    assert list(found["components"]) == ["vae_encoder", "vae_decoder", "denoiser", "text_encoder", "text_encoder_2"]
    for by_dtype in found["components"].values():
        assert set(by_dtype) == {"float32", "bfloat16", "float16"}
        assert by_dtype["float32"]["finite"] is True
        assert by_dtype["float32"]["relative_error"] == 0
        assert 0 < by_dtype["bfloat16"]["relative_error"] < 0.5  # really in another precision
    assert 0 <= found["walk_equals_decode"] < 1e-3
    folder = tmp_path / "out" / "check-report"
    files = [found["reconstruction"]["file"], found["estimates"]["file"], *(row["file"] for row in found["maps"])]
    for name in files:
        with Image.open(folder / name) as picture:
            assert picture.width > 700
    assert {str(p.relative_to(folder)) for p in folder.rglob("[!.]*.*")} == {"check.json", "report.html", *files}
    page = (folder / "report.html").read_text()
    assert page.count("<img src=") == len(files)
    assert f"<code>--lpl_weight {found['suggestion']['lpl_weight']:.3g}</code>" in page
    assert str(folder / "report.html") in out
    taps = [layer["tap"] for layer in found["layers"]]
    assert taps == ["mid", "up_0", "up_1", "up_2"]
    assert {(row["tap"], row["in_gate"]) for row in found["maps"]} == {(t, g) for t in taps for g in (True, False)}
    assert [row["t_low"] for row in found["gradients"]] == list(range(0, 1000, 100))
    assert all(row["ratio"] > 0 and -1 <= row["cosine"] <= 1 and row["num"] == 6 for row in found["gradients"])
    assert all(b["distance"] > 0 for layer in found["layers"] for b in layer["bins"])
    assert found["suggestion"]["lpl_weight"] > 0
    assert found["step"]["peak_bytes"] > 0
    assert found["step"]["seconds"] > found["step"]["seconds_without_lpl"] > 0
    assert found["refused"] == ["only 6 images: 16 are the least for reliable figures"]
    assert found["faults"] == []
    first, *_ = out.splitlines()
    assert first.startswith(f"verdict      {found['verdict'][:60]}")
    assert found["verdict"].startswith({"acts": "LPL will act", "harms": "LPL will likely"}[found["outcome"]])
    assert found["verdict"] in html.unescape(page)
    for line in ("images       6 on cpu, ", "VAE          PSNR ", "step         ", "suggestion   "):
        assert f"\n{line}" in f"\n{out}"
    assert len(out.splitlines()) < 25  # the figures are on the page
    assert max(map(len, out.splitlines())) < 200


def test_a_second_check_replaces_the_first(check: Any, tmp_path: Path) -> None:
    check(lpl_num_blocks=1)
    left, mine = (tmp_path / "out" / "check-report" / "maps" / name for name in ("up_9-t0999.png", "mine.png"))
    for file in (left, mine):
        file.write_bytes(b"")
    first, _, _ = check(lpl_num_blocks=0)
    assert (left.exists(), mine.exists()) == (False, True)
    assert [layer["tap"] for layer in first["layers"]] == ["mid"]


@pytest.mark.slow
def test_weight_and_gate_are_the_runs_own(check: Any) -> None:
    found, _, _ = check(lpl_sigma_threshold=3.0, lpl_weight=1e-7, max_train_steps=50)
    assert found["gate"] == "noise/signal <= 3"
    assert found["suggestion"]["own_gate"]["gate"] == "noise/signal <= 3"
    assert found["outcome"] == "idles"
    assert found["verdict"].startswith("LPL will idle: --lpl_weight 1e-07 gives it ")


@pytest.mark.parametrize(
    "options",
    [
        {
            "rank": 2,
            "mixed_precision": "bf16",
            "snr_gamma": 5.0,
            "train_text_encoder": True,
            "gradient_checkpointing": True,
            "train_batch_size": 3,
        },
        {
            "lpl_crop": 12,
            "lpl_random_depth": True,
            "lpl_reduction": "gated",
            "lpl_max_samples": 1,
            "loss_type": "huber",
            "masked_loss": "alpha",
            "pyramid_noise_iterations": 2,
        },
        {
            "buckets": True,
            "bucket_step": 4,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "lpl_norm_type": "batch",
            "lpl_loss_type": "l1",
            "lpl_dtype": "bfloat16",
        },
    ],
    ids=lambda options: next(iter(options)),
)
def test_with_other_options(check: Any, options: dict[str, Any]) -> None:
    found, out, _ = check(**options, lpl_num_blocks=1)
    assert found["suggestion"]["lpl_weight"] > 0
    assert all(row["ratio"] > 0 for row in found["gradients"])
    assert found["step"]["seconds"] > 0
    assert len(found["components"]) == 5
    assert ("--lpl_crop 12: measured on whole images" in found["refused"]) == ("lpl_crop" in options)
    assert "suggestion   " in out


def test_a_walk_that_is_not_the_decoder_ends_with_an_error_after_the_report(
    check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Skips(AutoencoderKLTaps):
        def finish(self, x: torch.Tensor) -> torch.Tensor:
            return super().finish(x) + 0.5

    monkeypatch.setattr(lpl.perceptual.precision, "decoder_taps", Skips)
    found, out, err = check(code=2)
    assert found["walk_equals_decode"] == pytest.approx(0.5, abs=1e-4)
    assert "faults       LPL's walk" in out
    assert '<div class="tile bad"><p class="tile-label">Walked decoder' in page_of(tmp_path)
    assert "\nerror: LPL's walk through the decoder differs from vae.decode by 0.5" in f"\n{err}"


def test_a_model_that_is_not_finite_is_reported_and_no_further_measured(
    check: Any, model: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(model, tmp_path / "broken")
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, file)
    found, out, err = check(code=2, pretrained_model_name_or_path=broken)
    assert found["components"]["denoiser"]["float32"]["finite"] is False
    assert found["components"]["denoiser"]["float32"]["first_nonfinite"] == "conv_out"
    assert found["components"]["denoiser"]["float32"]["max_abs"] is None
    assert "suggestion" not in found
    assert "faults       denoiser is not finite" in out
    assert "<td>NOT FINITE</td>" in page_of(tmp_path)
    assert "error: denoiser is not finite in float32" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--num_images=8"], "--num_images must lie in 16..64, not 8"),
        (["--no_use_lpl"], "lpl check measures LPL: drop --no_use_lpl"),
        (["--num_image=20"], "unknown option --num_image; did you mean num_images?"),
        (["--pretrained_model_name_or_path=/nowhere/model"], "--pretrained_model_name_or_path /nowhere/model"),
        (["--lpl_t_threshold=2000"], "--lpl_t_threshold 2000 lies outside"),
    ],
)
def test_refusals(check: Any, argv: list[str], said: str) -> None:
    options = {} if "nowhere" not in argv[0] else {"pretrained_model_name_or_path": "/nowhere/model"}
    _, _, err = check(*argv, code=2, **options)
    assert err.startswith("error: ")
    assert said in err


def test_the_report_is_not_published_nor_taken_for_training_images(check: Any, data: Path) -> None:
    _, _, err = check(code=2, output_dir=data / "out")
    assert "lies in --train_data_dir" in err


@pytest.mark.slow
def test_a_gpu_without_room_for_a_float32_denoiser(
    check: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a GPU that holds the tiny denoiser once in bfloat16, and no step."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    size = sum(parameter.numel() for parameter in unet.parameters())
    monkeypatch.setattr(cost, "gpu_memory", lambda _device: 5 * size)
    found, _, err = check(mixed_precision="bf16")
    precisions = found["components"]["denoiser"]
    assert precisions["float32"]["finite"] is None
    assert precisions["bfloat16"]["finite"] is True
    assert precisions["bfloat16"]["relative_error"] is None
    assert found["step"]["seconds"] is None
    said = "\n".join(found["refused"])
    assert "the denoiser in other precisions than bf16: in float32 its weights take " in said
    assert "time of a step: it needs " in said
    assert "error" not in err
    chosen, _, _ = check("--lpl_dtype=auto", mixed_precision="bf16")
    assert chosen["options"]["lpl_dtype"] in ("float32", "bfloat16")  # as it is measured here
    offloaded, _, err = check("--rank=2", "--gradient_checkpointing", "--offload_blocks=1", mixed_precision="bf16")
    assert "--offload_blocks has no effect on a CPU" in err  # so they were
    assert offloaded["components"]["denoiser"]["bfloat16"] == precisions["bfloat16"]
    _, _, err = check(code=2)
    assert "error: --mixed_precision no: the denoiser does not fit: in float32 its weights take " in err


def test_a_quantized_base_is_measured_as_it_trains(check: Any) -> None:
    options = {"mixed_precision": "bf16", "rank": 2}
    distances = []
    for kind in (None, "nf4"):
        found, _, err = check(quantize_base=kind, **options)
        assert "error" not in err
        assert found["step"]["seconds"] > 0
        assert (found["components"]["denoiser"]["float32"]["finite"] is None) == (kind is not None)
        said = f"than bf16: --quantize_base {kind} is measured in the run's precision alone"
        assert any(said in line for line in found["refused"]) == (kind is not None)
        distances.append(torch.tensor([b["distance"] for layer in found["layers"] for b in layer["bins"]]))
    whole, coded = distances
    assert 0 < (coded - whole).abs().max() < 0.1 * whole.max()


@pytest.mark.slow
def test_a_step_is_timed_in_the_runs_precision_and_keeps_no_gradients(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    measure = cost.measure_step

    def watch(config: Any, step: Any, denoiser: Any, *others: Any) -> Any:
        result = measure(config, step, denoiser, *others)
        seen.extend((p.dtype, p.grad) for p in denoiser.parameters())
        return result

    monkeypatch.setattr(cost, "measure_step", watch)
    found, _, _ = check("--weights_dtype=bfloat16", "--optimizer=adafactor", mixed_precision="bf16", max_grad_norm=0)
    assert found["step"]["seconds"] > 0
    assert set(seen) == {(torch.bfloat16, None)}


def test_running_out_of_gpu_memory_is_one_line(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 3.00 MiB "
            "is free. Process 1 has 7 GiB memory in use."
        )

    monkeypatch.setattr(precision, "reconstruct", fail)
    _, _, err = check(code=3)
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    assert last.endswith("is free): `lpl plan` with the same options says what takes how much, and what would fit")


@pytest.mark.parametrize(("command", "more"), [("check", ""), ("train", "; the same command continues from the last")])
def test_an_interruption_promises_only_what_holds(
    command: str, more: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    with pytest.raises(SystemExit, match="130"):
        cli.main([command])
    assert capsys.readouterr().err.startswith(f"interrupted{more}" + ("" if more else "\n"))
