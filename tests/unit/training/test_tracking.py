"""Windows of metrics, and the warning about LPL's share."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import torch

from lpl.base.errors import TrainingStoppedError
from lpl.training.tracking import MetricWindow, Tracker


class Recorder:
    """Stands for accelerate's engine."""

    device = torch.device("cpu")
    process_index, num_processes = 0, 1

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))


def test_window_averages_over_micro_batches() -> None:
    window = MetricWindow()
    for value in (1.0, 2.0, 6.0):
        window.add({"diffusion_loss": torch.tensor(value), "lpl/weighted_loss": value}, 0)
    assert window.read() == {"diffusion_loss": 3.0, "lpl/weighted_loss": 3.0}
    assert window.read() == {}


def test_window_weighs_what_describes_gated_samples_by_their_number() -> None:
    window = MetricWindow()
    parts = [(3, 10.0, 0.5, 7.0), (1, 2.0, 0.1, 90.0)]
    for samples, value, low, high in parts:
        metrics: dict[str, Any] = {
            "lpl/loss": torch.tensor(value),
            "lpl/features/layer_0/distance": torch.tensor(value),
            "lpl/snr_mean": torch.tensor(value),
            "lpl/snr_min": torch.tensor(low),
            "lpl/snr_max": torch.tensor(high),
            "lpl/application_ratio": samples / 4,
        }
        window.add(metrics, samples)
    window.add({"lpl/application_ratio": 0.0}, 0)
    found = window.read()
    mean = (3 * 10 + 2) / 4
    assert found["lpl/loss"] == found["lpl/features/layer_0/distance"] == found["lpl/snr_mean"] == mean
    assert (found["lpl/snr_min"], found["lpl/snr_max"]) == (pytest.approx(0.1), 90.0)
    assert found["lpl/application_ratio"] == pytest.approx(1 / 3)


def metrics(lpl_square: float, diffusion_square: float, gated: float = 1.0, weight: float = 2.0) -> dict[str, Any]:
    return {
        "diffusion_loss": torch.tensor(3.0),
        "lpl/weighted_loss": torch.tensor(1.0),
        "lpl/weight": weight,
        "lpl/application_ratio": gated,
        "lpl/gradient_square": torch.tensor(lpl_square),
        "diffusion/gradient_square": torch.tensor(diffusion_square),
    }


def test_tracker_logs_shares() -> None:
    engine = Recorder()
    tracker = Tracker(engine, 4, "")  # type: ignore[arg-type]
    tracker.start(10)
    tracker.window.add(metrics(1.0, 16.0), 1)
    tracker.window.add(metrics(7.0, 128.0), 1)
    logged = tracker.log(12, {"learning_rate": 0.1})
    assert engine.logged == [(12, logged)]
    assert logged["lpl/gradient_share"] == pytest.approx(2 / (2 + math.sqrt(72)))
    assert logged["lpl/loss_share"] == pytest.approx(0.25)
    assert logged["train_loss"] == 4.0
    assert logged["learning_rate"] == 0.1
    assert logged["samples_per_second"] > 0
    assert not any("square" in name for name in logged)


@pytest.mark.parametrize(
    ("lpl_square", "expected"), [(2.7e-3, "idles"), (16.5, "dominates"), (2.8e-3, None), (15.5, None)]
)
def test_share_outside_5_to_80_percent_warns_once_by_name(
    caplog: pytest.LogCaptureFixture, lpl_square: float, expected: str | None
) -> None:
    tracker = Tracker(Recorder(), 4, "--lpl_weight 2.0 --lpl_norm_type shared")  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "lpl"):
        for step in range(1, 20):
            tracker.window.add(metrics(lpl_square, 1.0, gated=0.5), 2)
            tracker.log(step, {})
            # Two gated samples a step, and 32 before anything is said.
            assert len(caplog.records) == (1 if expected and step >= 16 else 0)
    if expected:
        text = caplog.records[0].getMessage()
        assert f"LPL {expected}: " in text
        assert "--lpl_weight 2.0 --lpl_norm_type shared" in text


def test_share_is_judged_by_samples_however_seldom_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(Recorder(), 4, "")  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "lpl"):
        for _ in range(8):
            tracker.window.add(metrics(1e-9, 1.0), 4)
        tracker.log(8, {})
    assert "idles" in caplog.text


def test_gradient_of_exactly_0_stops_once_it_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all gated samples of all micro-batches and processes that should have one; it is no metric of its own."""

    def counts(with_loss: float, without: float) -> dict[str, Any]:
        pair = {"lpl/samples_with_loss": with_loss, "lpl/samples_without_gradient": without}
        return metrics(0.0, 1.0) | {name: torch.tensor(value) for name, value in pair.items()}

    def log(*parts: dict[str, Any], elsewhere: dict[str, Any] | None = None) -> dict[str, float]:
        tracker = Tracker(Recorder(), 4, "--lpl_weight 2.0")  # type: ignore[arg-type]
        for part in parts:
            tracker.window.add(part, 3)
        other = {name: (float(value), 1.0) for name, value in (elsewhere or {}).items()}
        monkeypatch.setattr("lpl.training.tracking.gather_object", lambda mine: [*mine, other])
        return tracker.log(5, {})

    for right in (
        [counts(3, 1), counts(2, 2)],  # some have one
        [counts(0, 0)],  # none should
        [metrics(0.0, 1.0)],  # none was gated
    ):
        assert not any("samples_with" in name for name in log(*right))
    log(counts(3, 3), elsewhere=counts(3, 2))
    for wrong in ([counts(3, 3), counts(0, 0)], [counts(1, 1), metrics(0.0, 1.0)]):
        with pytest.raises(TrainingStoppedError, match=r"^step 5: .* exactly 0 .*\(--lpl_weight 2\.0\)$"):
            log(*wrong, elsewhere=counts(2, 2))


def test_weight_0_is_no_idling(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(Recorder(), 64, "")  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "lpl"):
        tracker.window.add(metrics(0.0, 1.0, weight=0.0), 64)
        tracker.log(1, {})
    assert caplog.records == []


def test_window_comes_back_from_a_checkpoint_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand((9, 2), generator=generator)
    parts: list[dict[str, Any]] = [
        {"diffusion_loss": a, "lpl/weighted_loss": 0.1 * n, "lpl/snr_min": b} for n, (a, b) in enumerate(numbers)
    ]
    whole, first, second = MetricWindow(), MetricWindow(), MetricWindow()
    for part in parts:
        whole.add(part, 1)
    for part in parts[:5]:
        first.add(part, 1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), torch.device("cpu"))
    for part in parts[5:]:
        second.add(part, 1)
    assert second.read() == whole.read()


def test_windows_of_two_processes_are_added_up_in_one() -> None:
    both, one = MetricWindow(), MetricWindow()
    for value in (1.0, 5.0):
        own = MetricWindow()
        for window in (own, both):
            window.add({"diffusion_loss": torch.tensor(value), "lpl/snr_max": torch.tensor(value)}, 1)
        one.load_state_dict(own.state_dict(), torch.device("cpu"))
    assert one.read() == both.read() == {"diffusion_loss": 3.0, "lpl/snr_max": 5.0}


def test_what_the_warning_stands_on_outlives_a_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    """Sixteen gated samples before and sixteen after: only together are they enough to judge."""
    trackers = []
    for _ in range(2):
        tracker = Tracker(Recorder(), 4, "--lpl_weight 2.0")  # type: ignore[arg-type]
        if trackers:
            tracker.load_state_dict(json.loads(json.dumps(trackers[0].state_dict())))
        tracker.start(4 * len(trackers))
        trackers.append(tracker)
        for step in range(4):
            tracker.window.add(metrics(1e-9, 1.0), 4)
            tracker.log(4 * (len(trackers) - 1) + step + 1, {})
        assert len(caplog.records) == len(trackers) - 1
