"""eval, check, export, report and launches of two processes, killed anywhere, end with the figures of undisturbed ones.

LPL_KILLS says how many kills each command gets, at calls that change what is on disk: 1, and more in `make soak`.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_training import CALLS, HANG_S, finished
from launching import launch
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

KILLS = int(os.environ.get("LPL_KILLS", "1"))
STEPS = 5
TIMES = ("seconds", "step")
"""What of check.json is measured in seconds."""


@contextmanager
def calls(kill_at: int | None = None) -> Iterator[list[int]]:
    """Counts calls that change what is on disk; before one of them the process kills itself."""
    count, before = [0], {name: getattr(os, name) for name in CALLS}

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name, function in before.items():
        setattr(os, name, watched(function))
    try:
        yield count
    finally:
        for name, function in before.items():
            setattr(os, name, function)


def forked(act: Callable[[], Any]) -> int:
    """Forks a process, the first of a group, that does something and ends; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        act()
        status = 0
    except BaseException:  # noqa: BLE001 - nothing may run on in the child
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(status)


def no_times(text: str, folder: Path) -> Any:
    content = json.loads(text.replace(str(folder), "OUT"))
    return {key: value for key, value in content.items() if key not in TIMES}


def read_json(folder: Path) -> Any:
    """Figures, and the bytes of all pictures."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}
    return found, [no_times(p.read_text(), folder) for p in sorted(folder.rglob("[!.]*.json"))]


def read_tensors(folder: Path) -> Any:
    files = sorted(folder.rglob("[!.]*.safetensors"))
    assert files
    assert list(folder.rglob("*tmp*")) == []
    return {str(p.relative_to(folder)): {k: v.tolist() for k, v in load_file(p).items()} for p in files}


def read_page(folder: Path) -> Any:
    text = (folder / "page.html").read_text()
    assert text.rstrip().endswith("</html>")
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d|\b[td]\d+\b", "", text)  # when it was written, and ids


@pytest.fixture(scope="module")
def commands(base_options: dict[str, Any], data: Path, train_in: Any, shared: Path, as_flags: Any) -> dict[str, Any]:
    """By name: the command line for a folder, and what it leaves there."""
    torch.set_num_threads(1)  # threads do not survive a fork
    run = train_in(shared / "killed-run", rank=2).folder
    options = {k: v for k, v in base_options.items() if k not in ("max_train_steps", "log_every")}
    drawn = {
        "pretrained_model_name_or_path": base_options["pretrained_model_name_or_path"],
        "reference_dir": data,
        "reference_cache_dir": shared / "killed-references",
        "prompts": shared / "killed-prompts.txt",
        "num_samples": 10,
        "resolution": 16,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "sample_batch_size": 5,
        "metrics": "kernel",
        "num_bootstrap": 0,
        "floor": False,
    }
    (shared / "killed-prompts.txt").write_text("a\nb\n")
    drawn["reference_dir"] = shared / "killed-data"
    from tiny_models import tiny_images

    tiny_images(shared / "killed-data", count=16)
    checked = {**options, "train_data_dir": shared / "killed-data"}
    return {
        "eval": (lambda out: ["eval", *as_flags({**drawn, "output_dir": out})], read_json),
        "check": (lambda out: ["check", *as_flags({**checked, "output_dir": out}), "--num_images=16"], read_json),
        "export": (lambda out: ["export", str(run), f"--output={out / 'x.safetensors'}"], read_tensors),
        "folder": (lambda out: ["export", str(run), "--to=diffusers", f"--output={out / 'x'}"], read_tensors),
        "report": (lambda out: ["report", str(run), f"--output={out / 'page.html'}"], read_page),
    }


@pytest.mark.parametrize(
    "name", ["eval", "export", "report", *(pytest.param(name, marks=pytest.mark.slow) for name in ("check", "folder"))]
)
def test_a_command_that_is_killed_and_run_again(commands: Any, name: str, run_cli: Any, tmp_path: Path) -> None:
    argv, read = commands[name]

    def run(folder: Path) -> None:
        code, _, err = run_cli(argv(folder))
        assert code == 0, err

    with calls() as count:
        run(tmp_path / "whole")
    whole, draw = read(tmp_path / "whole"), random.Random(KILLS)
    assert count[0]
    kills = min(KILLS, count[0])
    for i in range(kills):
        folder, kill_at = tmp_path / f"at{i}", 1 + draw.randrange(i * count[0] // kills, (i + 1) * count[0] // kills)

        def killed(folder: Path = folder, kill_at: int = kill_at) -> None:
            with calls(kill_at):
                run(folder)

        assert not finished(forked(killed))
        if not (folder / argv(folder)[-1].removeprefix("--output=")).exists() or name == "report":
            run(folder)  # an export that is there is whole, and is not written again
        assert read(folder) == whole


def in_processes(argv: list[str]) -> int:
    return forked(lambda: launch(argv, 2))


def by_torchrun(argv: list[str]) -> int:
    code = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lpl", *argv]
    return subprocess.Popen(code, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, start_new_session=True).pid


@pytest.mark.parametrize("start", [in_processes, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_two_processes_that_are_killed_go_on(
    base_options: Any, as_flags: Any, read_run: Any, tmp_path: Path, start: Callable[[list[str]], int]
) -> None:
    torch.set_num_threads(1)
    options = base_options | {"max_train_steps": STEPS, "checkpointing_steps": 2, "use_ema": True, "lpl_weight": "auto"}
    argv = lambda folder: ["train", *as_flags({**options, "output_dir": folder})]  # noqa: E731
    assert finished(start(argv(tmp_path / "whole")))
    whole, draw = read_run(tmp_path / "whole"), random.Random(KILLS)
    for i in range(KILLS):
        folder = tmp_path / f"at{i}"
        child, limit = start(argv(folder)), time.monotonic() + HANG_S
        while not (folder / "checkpoint-2").is_dir():
            assert time.monotonic() < limit, "a run hangs"
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        os.killpg(child, signal.SIGKILL)
        finished(child)
        assert finished(start(argv(folder)))
        found = read_run(folder)
        assert found.losses() == whole.losses()
        assert found.counts() == whole.counts()
        for part in ("model", "optimizer", "ema"):
            assert_equal(found.checkpoint(4, part), whole.checkpoint(4, part))
        assert_equal(found.unet(), whole.unet())


def assert_equal(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
