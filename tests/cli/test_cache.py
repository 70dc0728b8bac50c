"""`lpl cache`: filling beforehand, verifying, pruning."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def arguments(model: Path, data: Path, tmp_path: Path) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={data}",
        f"--latent_cache_dir={tmp_path / 'cache'}",
        f"--output_dir={tmp_path / 'out'}",
        "--resolution=16",
    ]


def test_a_run_after_it_encodes_nothing(
    run_cli: Any, arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lpl")
    assert run_cli(["cache", *arguments, "--random_flip"])[0] == 0
    assert "6 samples; 12 crops and 6 captions encoded" in caplog.text
    assert not (tmp_path / "out").exists()
    step = ["--max_train_steps=1", "--report_to=none"]
    others = ["--no_use_lpl", "--train_batch_size=3", "--learning_rate=1e-3", f"--output_dir={tmp_path / 'other'}"]
    for options in (["--random_flip"], others, ["--seed=5", f"--output_dir={tmp_path / 'seed'}"]):
        caplog.clear()
        assert run_cli(["train", *arguments, *step, *options])[0] == 0
        assert "6 samples; 0 crops and 0 captions encoded" in caplog.text


def test_verify_and_prune(run_cli: Any, arguments: list[str], tmp_path: Path) -> None:
    assert run_cli(["cache", *arguments])[0] == 0
    folder = f"--latent_cache_dir={tmp_path / 'cache'}"
    code, out, _ = run_cli(["cache", "verify", folder])
    assert (code, out) == (0, f"{tmp_path / 'cache'}: 5 files, 0 damaged\n")
    shard = next((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, err = run_cli(["cache", "verify", folder])
    assert code == 2
    assert err.startswith("error: cache ")
    code, out, _ = run_cli(["cache", "prune", folder, "--days=0"])
    assert code == 0
    assert "removed" in out
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cache", "prun"], "unknown command cache 'prun'; did you mean prune?"),
        (["cache", "prune", "--days=-1"], "--days must be 0 or more"),
        (["cache", "verify", "--latent_cache_dir=nowhere"], "--latent_cache_dir nowhere: no such folder"),
        (["cache"], "--pretrained_model_name_or_path"),
    ],
)
def test_errors_are_one_line(run_cli: Any, argv: list[str], message: str) -> None:
    code, _, err = run_cli(argv)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
