"""Models by their ids on the Hub, whose HTTP interface a server of this process stands in for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, serve_hub
from tiny_models import tiny_flux, tiny_sd

SCRIPT = """
import contextlib, io, json, sys
import huggingface_hub.constants
from lpl.cli import main
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096  # a download goes on by whole chunks, and these weights are small
found = []
for argv in json.loads(sys.argv[1]):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            main(argv)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    found.append([code, said.getvalue()])
print(json.dumps(found))
"""


def called(hub: Hub, calls: list[list[str]], home: Path) -> Any:
    """The code and the words of each call of `lpl` against a Hub."""
    with serve_hub(hub):
        given = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        environment = os.environ | given | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", SCRIPT, json.dumps(calls)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_model_is_trained_by_its_id_and_what_cannot_be_had_is_one_line(data: Path, tmp_path: Path) -> None:
    """Files of a revision come over a connection that breaks; gated models and absent revisions say what to do."""
    first, second = tiny_sd(tmp_path / "first"), tiny_sd(tmp_path / "second", seed=1)
    weights = "diffusion_pytorch_model.safetensors"
    hub = Hub(
        {("me/tiny", "main"): first, ("me/tiny", "v2"): second, ("me/gated", "main"): first}, {"me/gated"}, {weights}
    )
    options = ["--train_data_dir", str(data), "--resolution=16", "--max_train_steps=1", "--no_use_lpl"]
    train = ["train", *options, "--output_dir", str(tmp_path / "run"), "--pretrained_model_name_or_path"]
    calls = [
        [*train, "me/gated"],
        [*train, "me/nowhere"],
        [*train, "me/tiny", "--revision=v3"],
        [*train, "me/tiny", "--revision=v2"],
    ]
    gated, nowhere, absent, trained = called(hub, calls, tmp_path / "home")
    flag = "--pretrained_model_name_or_path"
    for (code, said), words in (
        (gated, f"{flag} me/gated: the Hub gives it only to those who have accepted its terms: accept them at https:"),
        (nowhere, f"{flag} me/nowhere: no such folder, and no model that may be read on the Hub: check the name"),
        (absent, "--revision v3: the Hub has none of this name of me/tiny"),
    ):
        assert code == 2
        assert said.count("error:") == 1
        assert f"error: {words}" in said
    assert trained[0] == 0, trained[1]
    commit, _ = hub.find("me/tiny", "v2") or ("", None)
    whole = [asked for asked in hub.asked if asked.path.endswith(f"unet/{weights}") and asked.method == "GET"]
    assert {asked.path.split("/")[4] for asked in whole} <= {"v2", commit}  # and of no other revision
    assert not hub.breaks
    assert [asked.range for asked in hub.asked if asked.range]  # what had come was not asked for again
    from safetensors.torch import load_file

    told = json.loads((tmp_path / "run" / "model_index.json").read_text())
    assert told["_class_name"] == "StableDiffusionPipeline"
    vae = [load_file(folder / "vae" / weights) for folder in (tmp_path / "run", second, first)]
    assert all((vae[0][name] == vae[1][name]).all() for name in vae[1])
    assert any((vae[0][name] != vae[2][name]).any() for name in vae[1])


@pytest.mark.slow
def test_a_transformers_file_is_trained_with_the_other_parts_of_a_model_by_its_id(data: Path, tmp_path: Path) -> None:
    folder, file = tiny_flux(tmp_path / "flux"), tmp_path / "flux.safetensors"
    hub = Hub({("me/flux", "main"): folder, ("me/gated", "main"): folder}, {"me/gated"}, set())
    options = ["--train_data_dir", str(data), "--resolution=16", "--max_train_steps=1", "--no_use_lpl", "--rank=2"]
    train = ["train", *options, "--output_dir", str(tmp_path / "run"), "--pretrained_model_name_or_path", str(file)]
    calls = [
        ["export", str(folder), "--output", str(file)],
        [*train, "--single_file_config=me/gated"],
        [*train, "--single_file_config=me/flux"],
    ]
    (exported, _), (code, said), trained = called(hub, calls, tmp_path / "home")
    assert exported == 0
    assert code == 2
    assert "error: --single_file_config me/gated: the Hub gives it only to those who have accepted" in said
    assert trained[0] == 0, trained[1]
    whole = [asked.path for asked in hub.asked if asked.path.endswith(".safetensors") and asked.method == "GET"]
    assert len({path.split("/")[-2] for path in whole}) == 3
    assert not any("/transformer/" in path for path in whole)
