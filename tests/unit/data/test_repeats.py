"""--repeats, and how often each folder's images come for it."""

import logging

import numpy as np
import pytest

from lpl.base.errors import UserError
from lpl.data.sampler import parse_repeats

FOLDERS = ["", "dogs", "dogs/small", "dogs/small/old", "dogsled", "cats"]


def repeats_of(text: str | None, groups: list[str]) -> np.ndarray:
    """By the folder of each sample."""
    return parse_repeats(text, *np.unique(groups, return_inverse=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [1, 1, 1, 1, 1, 1]),
        ("dogs=10,cats=2.5", [1, 10, 10, 10, 1, 2.5]),
        ("dogs=10,dogs/small=3", [1, 10, 3, 3, 1, 1]),
        ("dogs/small=3,dogs=10", [1, 10, 3, 3, 1, 1]),
        (" dogs/ = 2. , /dogs/small/old=.5 ", [1, 2, 2, 0.5, 1, 1]),
        ("dogs=0", [1, 0, 0, 0, 1, 1]),
        ("dogs=0,dogs/small=1", [1, 0, 1, 1, 1, 1]),
    ],
)
def test_named_folders(text: str | None, expected: list[float]) -> None:
    repeats = repeats_of(text, FOLDERS)
    assert repeats.dtype == np.float64
    assert repeats.tolist() == expected


def test_a_folder_above_without_images_of_its_own() -> None:
    assert repeats_of("a=2,a/b/c=3", ["a/b", "a/b/c", "d"]).tolist() == [2, 3, 1]


def test_a_name_with_an_equals_sign() -> None:
    assert repeats_of("x=y=2", ["x=y", "x"]).tolist() == [2, 1]


def test_balanced_folders_come_equally_often() -> None:
    groups = ["b", "a", "b", "", "b", "a", "c/d", "c", "b"]
    repeats = repeats_of("balanced", groups)
    assert repeats.tolist() == [1, 2, 1, 4, 1, 2, 4, 4, 1]
    assert repeats_of("balanced", ["a"] * 7 + ["b"] * 3)[-1] == pytest.approx(7 / 3)


def test_names_that_begin_with_a_number() -> None:
    groups = ["10_dogs", "10_dogs/small", "10_dogs/3_old", "10_dogs/3_old/x", "cats", "2.5_x", "3d", "07", "", "a/0_b"]
    assert repeats_of("names", groups).tolist() == [10, 10, 3, 3, 1, 1, 1, 7, 1, 0]


@pytest.mark.parametrize("text", [None, "dogs=10,cats=2.5", "balanced", "names"])
def test_folders_without_images_change_nothing(text: str | None) -> None:
    names = ["empty", "dogs", "5_birds", "cats"]
    inverse = np.array([3, 1, 1, 2, 3, 1, 3, 3])
    with np.errstate(all="raise"):
        found = parse_repeats(text, names, inverse)
    np.testing.assert_array_equal(found, repeats_of(text, [names[number] for number in inverse]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("birds=2", "--repeats birds: no image lies in a folder of that name; there are the root itself, cats, dogs,"),
        ("dog=2", "--repeats dog: no image lies in a folder of that name"),
        ("small=2", "--repeats small: no image lies in a folder of that name"),
        ("dogs=-1", "--repeats dogs=-1: give a number of 0 or more"),
        ("dogs=", "--repeats dogs=: give a number of 0 or more"),
        ("dogs=nan", "--repeats dogs=nan: give a number of 0 or more"),
        ("dogs=1e3", "--repeats dogs=1e3: give a number of 0 or more"),
        ("dogs=1_0", "--repeats dogs=1_0: give a number of 0 or more"),
        ("dogs", "--repeats dogs: found 'dogs'; give folder=number"),
        ("", "--repeats : found ''; give folder=number"),
        ("=2", "--repeats =2: found '=2'; give folder=number"),
        ("dogs=2,", "--repeats dogs=2,: found ''; give folder=number"),
        ("Balanced", "--repeats Balanced: found 'Balanced'; give folder=number"),
        ("dogs=2,dogs/=3", "--repeats dogs=2,dogs/=3: names dogs twice"),
        ("dogs=9999999999", "--repeats dogs=9999999999: an epoch would have 3e+10 draws"),
        ("dogs=" + "9" * 400, "an epoch would have inf draws"),
    ],
)
def test_what_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        repeats_of(text, FOLDERS)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "folder"), [("a=0", "a"), ("names", "0_a")])
def test_nothing_left_to_draw(text: str, folder: str) -> None:
    with pytest.raises(UserError, match=f"--repeats {text}: leaves no image to draw"):
        repeats_of(text, [folder] * 3)


def test_a_folder_without_images() -> None:
    with pytest.raises(UserError, match=r"--repeats empty: no image lies in a folder of that name; there are cats$"):
        parse_repeats("empty=2", ["empty", "cats"], np.array([1, 1]))


def test_a_long_list_of_folders_is_cut_short() -> None:
    with pytest.raises(UserError, match=r"there are f00, f01, .*, f09, 15 more$"):
        repeats_of("x=2", [f"f{number:02}" for number in range(25)])


@pytest.mark.parametrize(("text", "groups"), [("balanced", ["a", "a"]), ("names", ["a", "b"])])
def test_what_has_no_effect_is_said(text: str, groups: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lpl"):
        assert repeats_of(text, groups).tolist() == [1, 1]
    assert f"--repeats {text}: has no effect" in caplog.text
    caplog.clear()
    repeats_of(text, ["2_a", "b"])
    assert not caplog.text
