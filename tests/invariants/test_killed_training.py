"""A run that is killed, however often and wherever, ends as the undisturbed run: weights, average, moments, losses.

LPL_KILLS says how many kills fall at random moments, and how many at calls that change what is on disk: 1 each, and 100
in `make soak`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_training import Training, finished
from tiny_models import tiny_images

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

KILLS = int(os.environ.get("LPL_KILLS", "1"))
STEPS = 14
OPTIONS = {
    "max_train_steps": STEPS,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 1,
    "log_every": 2,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lpl_weight": "auto",
    "lpl_random_depth": True,
    "buckets": True,
    "bucket_step": 8,
    "random_flip": True,
    "crop_variants": 2,
    "proportion_empty_prompts": 0.2,
    "use_ema": True,
    "ema_decay": 0.9,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
}


class Killed:
    """The runs of this module, and what the undisturbed one has left."""

    def __init__(self, training: Training, root: Path, read: Callable[[Path], Any]) -> None:
        self.training, self.root, self.read = training, root, read
        started = time.perf_counter()
        child = training.start(root / "undisturbed")
        assert training.wait_for_step(child)
        first = time.perf_counter()
        assert finished(child)
        self.seconds, self.calls = time.perf_counter() - first, training.calls
        self.loading = first - started

    def check(self, folder: Path) -> None:
        """Runs to the end and compares."""
        assert finished(self.training.start(folder))
        found, expected = self.read(folder), self.read(self.root / "undisturbed")
        assert [p.name for p in folder.glob(".tmp*")] == []
        assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-12"]
        for part in ("model", "ema", "optimizer"):
            assert same(found.checkpoint(12, part), expected.checkpoint(12, part)), part
        states = [json.loads((r.folder / "checkpoint-12" / "state.json").read_text()) for r in (found, expected)]
        assert states[0] == states[1]
        assert same(found.unet(), expected.unet())
        assert found.losses() == expected.losses()
        assert list(found.losses()["train_loss"]) == [1, *range(2, STEPS + 1, 2)]
        assert found.counts() == expected.counts()
        shutil.rmtree(folder)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory, run_cli: Any, as_flags: Any, base_options: Any, read_run: Any
) -> Killed:
    torch.set_num_threads(1)  # threads do not survive a fork
    root = tmp_path_factory.mktemp("killed")
    options = base_options | OPTIONS | {"train_data_dir": tiny_images(root / "data", count=6)}

    def main(argv: list[str]) -> None:
        code, _, err = run_cli(argv)
        assert code == 0, err

    return Killed(Training(main, as_flags(options)), root, read_run)


def test_killed_at_random_moments_again_and_again(killed: Killed) -> None:
    draw = random.Random(KILLS)
    kills = runs = 0
    while kills < KILLS:
        folder = killed.root / f"after{runs}"
        runs += 1
        for _ in range(draw.randint(1, 4)):
            child = killed.training.start(folder)
            if not killed.training.wait_for_step(child):
                break
            time.sleep(draw.uniform(0, killed.seconds))
            os.kill(child, 9)
            if finished(child):
                break
            kills += 1
        killed.check(folder)


def test_killed_at_a_call(killed: Killed) -> None:
    """Before every rename, sync and removal of a checkpoint, in turn."""
    assert killed.calls > 60
    kills = min(KILLS, killed.calls)
    for i in range(kills):
        folder = killed.root / f"at{i}"
        assert not finished(killed.training.start(folder, 1 + (i * killed.calls) // kills))
        killed.check(folder)
