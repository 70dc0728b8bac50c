"""`lpl plan` through the command line, and its figures against real steps."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lpl.base.errors import UserError
from lpl.config.command_line import parse_options, parse_train
from lpl.config.commands import PlanConfig
from lpl.data import filling

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bare(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its weights."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    return Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def plan(run_cli: Any, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `lpl plan` on the tiny model, in an empty folder that must stay empty; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> str:
        code, out, err = run_cli(["plan", f"--pretrained_model_name_or_path={bare}", *argv])
        assert code == 0, err
        said = [part for part in err.replace("\r", "\n").splitlines() if part.strip() and "counting:" not in part]
        assert [part for part in said if "all tapped" not in part] == []
        assert len(said) <= 1  # once, though the loss is built many times
        assert list(tmp_path.iterdir()) == []
        return out

    return run


def table(text: str) -> dict[str, list[str]]:
    """The rows of alternatives: flags -> words after them."""
    lines = text.split("one change", 1)[1].splitlines()[1:]
    rows = [line.split("  ") for line in lines[: next(i for i, line in enumerate(lines) if line.startswith("TFLOP:"))]]
    return {row[0]: " ".join(row[1:]).split() for row in rows}


@pytest.mark.slow
def test_plan_states_the_choice_its_neighbours_and_what_fits(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "ENCODE_IMAGES", 1)  # else filling the cache would be this tiny model's peak
    text = plan("--resolution", "128", "--memory", "1")
    for part in (
        "trains       68,188 parameters (the whole UNet)",
        "run          128 px, batch 1 x 1, mixed precision no, gradient checkpointing off",
        "  tap mid     16 x 32 x 32, weight 1",
        "FLOPs        ",
        "memory       about ",
        f"  {'UNet weights':22}    0.3 MiB",
        "peaks        on the GPU:",
    ):
        assert part in text
    rows = table(text)
    assert list(rows) == [
        "as asked", "--no_use_lpl", "--lpl_checkpointing true", "--lpl_dtype bfloat16", "--gradient_checkpointing",
        "--mixed_precision bf16", "--rank 16", "--use_8bit_adam",
        "--optimizer adafactor", "--mixed_precision bf16 --weights_dtype bfloat16",
        "--fused_backward_pass --max_grad_norm 0", "--use_ema", "--train_batch_size 2",
    ]  # fmt: skip
    assert {row[-1] for row in rows.values()} == {"fits"}
    assert text.splitlines()[-1] == "fits 1 GiB"
    peaks = {flags: float(row[0]) for flags, row in rows.items()}
    asked = peaks["as asked"]
    assert peaks["--no_use_lpl"] < asked < peaks["--train_batch_size 2"]
    assert f"memory       about {asked} MiB" in text

    plain, asked = ("--resolution", "128", "--no_use_lpl"), peaks["--no_use_lpl"]
    tight = plan(*plain, "--memory", f"{asked} MiB")
    assert table(tight)["as asked"][-1] == "no"
    verdict = tight.splitlines()[-1]
    assert verdict.startswith("does not fit ")
    found = verdict.split("the cheapest change that does: ")[1].split(" (")[0]
    assert float(verdict.rsplit("(", 1)[1].split()[0]) <= 0.95 * asked
    monkeypatch.setattr("lpl.analysis.plan.neighbours", lambda _: [])
    again = plan(*plain, "--memory", f"{asked} MiB", *found.split())
    assert again.splitlines()[-1].startswith("fits ")

    none = plan("--resolution", "128", "--memory", "1MB", "--rank=2", "--mixed_precision=bf16", "--no_use_lpl")
    assert "does not fit 0.0009313 GiB, nor does --gradient_checkpointing --optimizer adafactor (" in none


@pytest.mark.slow
def test_without_a_model_it_is_sdxl_and_takes_its_resolution(run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpl.analysis.plan.neighbours", lambda _: [])
    code, out, _ = run_cli(["plan", "--no_use_lpl", "--memory", "80GB"])
    assert code == 0
    assert out.startswith("model        SDXL base 1.0\ntrains       2,567,463,684 parameters (the whole UNet)\n")
    assert "1024 px" in out
    # Weights, gradients, two moments and the square root of one: 20 bytes a parameter; the VAE is away without LPL.
    assert f"  optimizer step         {2_567_463_684 * 20 / 2**30:6.2f} GiB" in out
    assert out.endswith("fits 74.51 GiB\n")


def test_plan_takes_the_options_of_train() -> None:
    argv = ["--config", "sdxl", "--rank", "4"]
    assert parse_options(PlanConfig, argv, "lpl plan").train == parse_train(argv)


@pytest.mark.parametrize(
    ("given", "size"),
    [("24GiB", 24 * 2**30), ("24", 24 * 2**30), ("24GB", 24 * 10**9), ("11.5 gib", 23 * 2**29), ("512MiB", 2**29)],
)
def test_sizes_of_memory(given: str, size: int) -> None:
    assert parse_options(PlanConfig, ["--memory", given], "lpl plan").memory_bytes == size


@pytest.mark.parametrize("given", ["much", "24TB", "-1", "0", "24 GiB each"])
def test_what_is_no_size_is_refused(given: str, run_cli: Any) -> None:
    code, out, err = run_cli(["plan", f"--memory={given}"])
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: --memory {given}: expected a size such as ") or "--memory must be above 0" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--memroy", "8"], "unknown option --memroy; did you mean memory?"),
        (["--resolution", "30"], "--resolution 30 is no multiple of the VAE's 4 pixels per latent"),
        (["--lpl_t_threshold", "2000"], "--lpl_t_threshold 2000 lies outside"),
        (["--pretrained_model_name_or_path", "nowhere"], "--pretrained_model_name_or_path nowhere: no such folder"),
    ],
)
def test_faults_are_one_line(argv: list[str], message: str, run_cli: Any, bare: Path) -> None:
    code, out, err = run_cli(["plan", f"--pretrained_model_name_or_path={bare}", *argv])
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1


def test_train_has_no_memory_option() -> None:
    with pytest.raises(UserError, match="unknown option --memory"):
        parse_train(["--memory", "8"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures by Linux's VmHWM")
def test_predicted_peak_is_what_real_steps_take() -> None:
    """A small case of benchmarks/plan_check.py."""
    spec = importlib.util.spec_from_file_location("plan_check", BENCHMARKS / "plan_check.py")
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    case = check.Case(check.SMALL, check.HALF, "--resolution 128 --rank 16")
    command = [sys.executable, str(BENCHMARKS / "plan_check.py"), "--measure", json.dumps(case)]
    with subprocess.Popen(command, env=os.environ | check.ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        predicted, phase = check.predict(case)
        out, _ = process.communicate(timeout=300)
    measured = int(out.splitlines()[-1])
    assert phase == "LPL"
    assert measured > 2**28
    assert predicted == pytest.approx(measured, rel=check.TOLERANCE)


@pytest.mark.slow
def test_a_split_model_is_planned_for_the_gpus_it_is_split_over(plan: Any) -> None:
    base = ("--resolution", "128", "--mixed_precision", "bf16", "--num_processes", "4")
    whole, split = plan(*base), plan(*base, "--sharding", "fsdp2")
    assert "processes    4, each with the whole model" in whole
    assert "processes    4, split by FSDP2" in split
    assert "gathered blocks" in split
    assert "--optimizer adafactor" in table(whole)
    assert not {"--optimizer adafactor", "--use_8bit_adam", "--fused_backward_pass --max_grad_norm 0"} & set(
        table(split)
    )
    assert "WORLD_SIZE" not in os.environ


def test_what_cannot_be_split_is_refused(run_cli: Any, model: Path) -> None:
    argv = ["plan", f"--pretrained_model_name_or_path={model}", "--num_processes=2", "--sharding=fsdp2"]
    code, _, err = run_cli([*argv, "--optimizer=adafactor"])
    assert code == 2
    assert "--optimizer adafactor cannot be split by FSDP2" in err
