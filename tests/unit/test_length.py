"""How long a run is by its images, and what of it is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lpl.config import TrainConfig, declared
from lpl.config.command_line import parse_train
from lpl.config.length import length_of, on_the_way
from lpl.data.dataset import drawn_images
from lpl.presets import presets


@pytest.mark.parametrize(
    ("images", "epoch", "repeats", "steps", "draws", "by"),
    [
        (20, 20, 1.0, 750, 150, "--draws_per_image 150"),
        (20, 200, 10.0, 750, 150, "--draws_per_image 150"),  # every image ten times an epoch
        (20, 220, 1.0, 3000, 55, "--max_train_steps 3000"),  # with 200 regularisation images
        (2000, 2000, 1.0, 3000, 6, "--max_train_steps 3000"),
        (1, 1, 1.0, 38, 152, "--draws_per_image 150"),
    ],
)
def test_a_preset_takes_its_length_from_the_images(
    images: int, epoch: int, repeats: float, steps: int, draws: float, by: str
) -> None:
    found = length_of(parse_train(["--config", "sdxl-lora"]), 1, images, epoch, repeats)
    assert (found.steps, found.by) == (steps, by)
    assert found.draws == pytest.approx(draws, rel=0.02)


def test_it_is_said_in_words() -> None:
    config = parse_train(["--max_train_steps", "1", "--train_batch_size", "2"])
    assert str(length_of(config, 1, 4)) == (
        "1 step of 2 samples, which draws each of 4 images 0.5 times on average (by --max_train_steps 1)"
    )
    assert "once on average (by --num_train_epochs 1)" in str(length_of(parse_train(["--num_train_epochs=1"]), 1, 4))


def test_above_three_hundred_draws_it_warns() -> None:
    assert length_of(parse_train(["--num_train_epochs", "300"]), 1, 20).warning() is None
    told = length_of(parse_train(["--num_train_epochs", "301"]), 1, 20).warning()
    assert told is not None
    assert told.startswith("each image is drawn 301 times")


def test_draws_of_training_images_leave_regularisation_out() -> None:
    samples: Any = SimpleNamespace(prefixes=lambda: np.array(["", "", "", "reg/", "reg/"]))
    assert drawn_images(samples, np.array([2.0, 4.0, 0.0, 1.0, 1.0])) == (2, 3.0)
    assert drawn_images(samples, np.array([0.0, 0.0, 0.0, 1.0, 1.0])) == (2, 1.0)


@pytest.mark.parametrize("name", [name for name in presets() if name not in ("demo", "diffusers-lpl")])
def test_presets_fit_small_data(name: str) -> None:
    config = parse_train(["--config", name, "--validation_prompt", "x"])
    for images in (10, 20, 50):
        assert 100 <= length_of(config, 1, images).draws <= 200
    assert config.logging.validation_steps is not None
    assert config.model.rank is None or config.run.save_steps == config.logging.validation_steps
    assert config.data.random_flip
    assert not parse_train(["--config", name, "--instance_prompt", "sks"]).data.random_flip
    assert parse_train(["--config", name, "--instance_prompt", "sks", "--random_flip"]).data.random_flip


def test_every_preset_says_when_to_validate() -> None:
    for name in presets():
        assert parse_train(["--config", name, "--validation_samples=1"]).logging.validation_steps is not None, name


def test_what_a_preset_asks_for_and_cannot_act_is_left_out() -> None:
    assert parse_train(["--config", "sdxl-lora"]).logging.validation_steps is None
    assert parse_train(["--config", "sdxl-lora", "--validation_steps=7"]).logging.validation_steps == 7


@pytest.mark.parametrize(
    ("flags", "draws", "steps"),
    [
        (["--max_train_steps=9"], None, 9),
        (["--draws_per_image=9"], 9.0, None),
        (["--num_train_epochs=9"], None, None),
        (["--draws_per_image=9", "--max_train_steps=8"], 9.0, 8),
    ],
)
def test_a_flag_that_says_how_long_replaces_what_the_preset_says(
    flags: list[str], draws: float | None, steps: int | None
) -> None:
    run = parse_train(["--config", "sdxl-lora", *flags]).run
    assert (run.draws_per_image, run.max_train_steps) == (draws, steps)


def test_replacing_options_are_options() -> None:
    for name, facts in declared().items():
        unless = {wanted.partition("=")[0] for wanted in facts.preset_unless}
        assert {*facts.replaced_by, *unless} <= declared().keys(), name


def test_what_happens_on_the_way() -> None:
    told = dict(on_the_way(TrainConfig(), 400))
    assert told == {
        "saves": "the result at the end",
        "validates": "nothing (--validation_prompt draws images)",
        "mirrors": "no image",
    }
    config = parse_train(["--config", "sdxl-lora", "--validation_prompt", "x", "--validation_samples", "2"])
    assert dict(on_the_way(config, 750)) == {
        "saves": "a checkpoint every 500 steps, weights to use every 250, the result at the end",
        "validates": "both losses on held-out images and images of the prompts every 250 steps",
        "mirrors": "images at random (--random_flip)",
    }
