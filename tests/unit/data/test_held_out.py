"""Which samples are held out, and what becomes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lpl.base.errors import UserError
from lpl.data.dataset import TrainingData
from lpl.data.sampler import BatchOrder


def add(folder: Path, picture: Callable[..., Image.Image], numbers: range) -> None:
    for n in numbers:
        picture(100 + n, 32, 32).save(folder / f"m{n}.png")
        (folder / f"m{n}.txt").write_text(f"more {n}")


def held(data: TrainingData) -> set[str]:
    return {data.samples[index].id for index in data.split.held_out.tolist()}


def test_added_images_take_the_place_of_few(folder: Path, encode: Any, picture: Any) -> None:
    add(folder, picture, range(15))
    before = held(encode(validation_samples=6))
    add(folder, picture, range(15, 17))
    after = held(encode(validation_samples=6))
    new = {f"m{n}.png" for n in (15, 16)}
    assert len(before) == len(after) == 6
    assert len(before - after) == len(after & new) <= 2
    others = held(encode(seed=1, validation_samples=6))
    assert others != after


def test_more_held_out_are_the_same_and_more(encode: Any) -> None:
    sets = [held(encode(validation_samples=n)) for n in range(1, 5)]
    assert [len(own) for own in sets] == [1, 2, 3, 4]
    assert all(less < more for less, more in pairwise(sets))


def test_names_do_not_enter_and_copies_go_along(folder: Path, encode: Any) -> None:
    (before,) = held(encode(validation_samples=1))
    for suffix in (".png", ".txt"):
        shutil.copy((folder / before).with_suffix(suffix), folder / f"a_copy{suffix}")
        shutil.copy((folder / before).with_suffix(suffix), folder / f"z_copy{suffix}")
    data = encode(validation_samples=1)
    assert len(data.split.held_out) == 1
    assert data.split.copies == 2
    left = {data.samples[int(index)].id for index in np.flatnonzero(data.repeats)}
    assert left == {data.samples[n].id for n in range(len(data.samples))} - {before, "a_copy.png", "z_copy.png"}
    assert len(data) == len(left) == 4


def test_repeats_are_of_what_is_left(folder: Path, encode: Any, picture: Any) -> None:
    """Balanced: the folder of one is drawn as often as what is left of the four at the root."""
    add(folder / "sub", picture, range(1))
    for seed in range(20):
        data = encode(seed=seed, validation_samples=2, repeats="balanced")
        sub = np.array([data.samples[n].group == "sub" for n in range(len(data.samples))])
        assert not data.repeats[data.split.held_out].any()
        if (data.repeats * sub).any():
            assert (
                data.repeats[sub].sum()
                == data.repeats[~sub].sum()
                == max((data.split.trained & own).sum() for own in (sub, ~sub))
            )
    order = BatchOrder(0, data.buckets, data.repeats, 1)
    drawn = {order.batch(step)[0][0] for step in range(50)}
    assert drawn == set(np.flatnonzero(data.split.trained).tolist())


def test_the_hash_of_the_data_says_what_is_held_out(encode: Any) -> None:
    none, one, two = (encode(validation_samples=n) for n in range(3))
    assert none.digest() == none.samples.digest()
    assert len({none.digest(), one.digest(), two.digest()}) == 3
    assert one.digest() == encode(validation_samples=1).digest()


def test_a_fixed_batch_is_the_first_crop_and_the_whole_caption(encode: Any) -> None:
    options = {"validation_samples": 1, "proportion_empty_prompts": 0.9, "random_flip": True, "crop_variants": 3}
    data, plain = encode(**options), encode()
    index = int(data.split.held_out[0])
    first, again, other = (data.batch([(index, count)], fixed=True) for count in (0, 0, 1))
    assert torch.equal(first.raw_latents, again.raw_latents)
    assert not torch.equal(first.raw_latents, other.raw_latents)
    for batch in (first, other):
        assert torch.equal(batch.text["pooled"], plain.batch([(index, 0)]).text["pooled"])
        assert torch.equal(batch.extra["sizes"], plain.batch([(index, 0)]).extra["sizes"])
    assert (first.raw_latents - plain.batch([(index, 0)]).raw_latents).abs().max() < 1.5  # posterior noise alone


def test_without_captions_at_all_validation_has_none(encode: Any, encoder: Any) -> None:
    data = encode(validation_samples=1, proportion_empty_prompts=1.0)
    assert encoder.captions == [""]
    index = int(data.split.held_out[0])
    assert torch.equal(data.batch([(index, 0)], fixed=True).text["pooled"], encoder.encode_text([""])["pooled"])


def test_everything_held_out_is_refused(encode: Any) -> None:
    with pytest.raises(UserError, match=r"^--validation_samples 5: leaves none of the 5 training images"):
        encode(validation_samples=5)


@pytest.mark.parametrize("own", [False, True])
def test_the_report_counts_what_is_left(folder: Path, run_cli: Any, tmp_path: Path, own: bool) -> None:
    flags = ["--validation_samples=2"]
    if own:
        shutil.copytree(folder / "sub", tmp_path / "held")
        flags = [f"--validation_data_dir={tmp_path / 'held'}"]
    argv = [
        "data",
        f"--train_data_dir={folder}",
        "--resolution=32",
        f"--output_dir={tmp_path / 'out'}",
        "--num_shown=0",
    ]
    code, out, err = run_cli([*argv, *flags])
    assert code == 0, err
    left = 4 if own else 3
    assert f"held out     {5 - left} for validation" in out
    assert f"epoch        {left} draws" in out
    found = json.loads((tmp_path / "out" / "data-report" / "data.json").read_text())
    assert (found["left_out"], found["epoch"]["draws"]) == (5 - left, left)
