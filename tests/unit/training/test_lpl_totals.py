"""The line that a run ends with: what LPL did, or why nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_models import tiny_vae

from lpl import LatentPerceptualLoss, PerceptualObjective
from lpl.training.saving import next_commands
from lpl.training.tracking import LPLTotals, Tracker, shown


class Engine:
    """Stands for accelerate's engine."""

    device, process_index, num_processes = torch.device("cpu"), 0, 1

    def log(self, metrics: dict[str, float], step: int) -> None:
        pass


def objective(weight: Any = 4.2, **options: Any) -> PerceptualObjective:
    return PerceptualObjective(LatentPerceptualLoss(tiny_vae(), num_blocks=0), DDPMScheduler(), weight, **options)


def metrics(lpl: float, diffusion: float, gated: float) -> dict[str, Any]:
    squares = {"lpl/gradient_square": torch.tensor(lpl), "diffusion/gradient_square": torch.tensor(diffusion)}
    return {"diffusion_loss": 1.0, "lpl/weight": 4.2, "lpl/application_ratio": gated, **squares}


def followed(*steps: dict[str, Any], log_every: int = 1, step: int = 0, tracker: Tracker | None = None) -> Tracker:
    tracker = tracker or Tracker(Engine(), 4, "")  # type: ignore[arg-type]
    tracker.start(step)
    for number, found in enumerate(steps, step + 1):
        tracker.window.add(found, 1)
        if number % log_every == 0 or number == step + len(steps):
            tracker.log(number, {})
    return tracker


WITHOUT = {"diffusion_loss": 1.0}
STEPS = [metrics(1.0, 9.0, 0.75), metrics(0.0, 1.0, 0.0), metrics(3.0, 2.0, 1.0), metrics(4.0, 24.0, 0.25)]
"""Roots of the mean squares 8 / 4 and 36 / 4: sqrt(2) / (sqrt(2) + 3), half of the samples."""
SAID = f"LPL had {100 * math.sqrt(2) / (math.sqrt(2) + 3):.0f} % of the gradient on 50 % of the samples"


@pytest.mark.parametrize("log_every", [1, 3])
def test_share_samples_and_weight_of_the_whole_run(log_every: int) -> None:
    assert SAID == "LPL had 32 % of the gradient on 50 % of the samples"
    said = followed(*STEPS, log_every=log_every).totals.line(objective(), 4)
    assert said == f"{SAID}, weight 4.2"


@pytest.mark.parametrize("log_every", [1, 2, 5])
def test_steps_before_lpl_started_do_not_count(log_every: int) -> None:
    """Also where a log falls between; the weight is that of the last step, of a ramp that has not ended."""
    tracker = followed(WITHOUT, WITHOUT, WITHOUT, *STEPS, log_every=log_every)
    said = tracker.totals.line(objective(lpl_start=3, lpl_warmup_steps=5), 7)
    assert said == f"{SAID} since step 3, weight {4.2 * 4 / 6:.3g}"


def test_a_continued_run_speaks_of_all_of_it_or_says_since_when() -> None:
    first = followed(*STEPS[:2])
    state = json.loads(json.dumps(first.state_dict()))
    second = Tracker(Engine(), 4, "")  # type: ignore[arg-type]
    second.load_state_dict(state)
    assert followed(*STEPS[2:], step=2, tracker=second).totals.line(objective(), 4) == f"{SAID}, weight 4.2"
    del state["lpl"]  # a checkpoint of a former version
    third = Tracker(Engine(), 4, "")  # type: ignore[arg-type]
    third.load_state_dict(state)
    said = followed(*STEPS[2:], step=2, tracker=third).totals.line(objective(), 4)
    assert said == "LPL had 34 % of the gradient on 62 % of the samples since step 2, weight 4.2"


def test_processes_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One has no gated sample."""
    other = {name: (float(value), 1.0) for name, value in metrics(0.0, 2.0, 0.0).items()}
    monkeypatch.setattr("lpl.training.tracking.gather_object", lambda mine: [*mine, other])
    said = followed(metrics(8.0, 2.0, 1.0)).totals.line(objective(), 1)
    assert said == "LPL had 59 % of the gradient on 50 % of the samples, weight 4.2"


@pytest.mark.parametrize(
    ("options", "steps", "said"),
    [
        ({"weight": 0.0}, STEPS, "acted on no sample: --lpl_weight is 0; give a number above 0, or auto"),
        (
            {"lpl_t_threshold": 2},
            [metrics(0.0, 1.0, 0.0)] * 3,
            "acted on no sample: none of 12 passed the gate t < 2, though 0.20% do on average; give a wider gate, or "
            "train longer",
        ),
        ({"lpl_start": 9}, [WITHOUT], "acted on no sample: --lpl_start 9 is not reached in 1 steps; start earlier"),
        (
            {"weight": "auto"},
            [metrics(0.0, 1.0, 0.5)],
            "acted on no sample: the run ended before --lpl_weight auto had a weight; train longer, or give a number",
        ),
        (
            {},
            [metrics(0.0, 1.0, 0.5)],
            "acted on no sample: its gradient was 0 for all that passed the gate; look at masks and sample weights",
        ),
        (
            {},
            [{name: value for name, value in STEPS[0].items() if "square" not in name}],
            "acted on 75 % of the samples, weight 4.2; its share of the gradient was not measured",
        ),
        ({}, [metrics(1e-8, 1.0, 0.004)], "had 0.01 % of the gradient on 0.4 % of the samples, weight 4.2"),
    ],
)
def test_what_kept_lpl_from_acting_is_said(options: dict[str, Any], steps: list[Any], said: str) -> None:
    assert followed(*steps).totals.line(objective(**options), len(steps)) == f"LPL {said}"


def test_a_run_that_measured_nothing_says_nothing() -> None:
    """Continued at its end from a checkpoint without sums."""
    assert followed(step=5).totals.line(objective(), 5) is None


@pytest.mark.parametrize(
    ("gated", "found", "said"),
    [
        (None, {}, "loss 0.12"),
        (0.0, {"lpl/weight": 0.0}, "loss 0.12, LPL: no sample passed yet"),
        (3.0, {"lpl/weight": 0.0}, "loss 0.12, LPL without a weight yet"),
        (3.0, {"lpl/application_ratio": 0.0}, "loss 0.12, LPL: no sample passed lately"),
        (3.0, {}, "loss 0.12, LPL 0.034 with a share of 25 %"),
    ],
)
def test_what_the_bar_shows(gated: float | None, found: dict[str, float], said: str) -> None:
    usual = {"lpl/weight": 4.2, "lpl/application_ratio": 0.5, "lpl/weighted_loss": 0.034, "lpl/gradient_share": 0.25}
    values = {"train_loss": 0.12} | ({} if gated is None else usual | found)
    assert shown(values, LPLTotals(gated=gated or 0.0)) == said


def test_the_last_line_says_what_to_do_next(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    told = next_commands(folder, None, "models/checkpoints")
    assert told.startswith(f"`lpl export '{folder}' --output 'my run.safetensors'` for ComfyUI's models/checkpoints; ")
    assert next_commands(folder, None) == f"`lpl report '{folder}'` for a page of losses and images"
    (folder / "pytorch_lora_weights.safetensors").touch()
    assert next_commands(folder, "diffusers") == f"`lpl report '{folder}'` for a page of losses and images"
    (folder / "my run_kohya.safetensors").touch()
    told = next_commands(folder, "diffusers")
    assert told.startswith(f"copy '{folder / 'my run_kohya.safetensors'}' into ComfyUI's models/loras; ")
    told = next_commands(folder, "diffusers, ComfyUI")
    assert told.startswith(f"copy '{folder / 'pytorch_lora_weights.safetensors'}' into ComfyUI's models/loras; ")
