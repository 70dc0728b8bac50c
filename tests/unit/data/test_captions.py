"""Which text a draw sees: choice, order of tags, trigger words, dropout; and that the cache holds all of it."""

from __future__ import annotations

import time
from itertools import permutations
from typing import Any

import pytest

from lpl.config import DataConfig
from lpl.data.captions import CaptionRules
from lpl.diffusion.draws import keyed_uniform

TAGS = "1girl, solo, red hair, smile, hat, rain, night, city"


def rules(seed: int = 0, **options: Any) -> CaptionRules:
    return CaptionRules(DataConfig(**options), seed)


def orders(text: str) -> list[str]:
    return text.split(", ")


def test_one_caption_and_no_option_is_the_caption_as_it_is() -> None:
    for caption in (" spaces,  and,, commas ", "", "a fox"):
        assert rules().variants("a", [caption]) == [caption]
        assert [rules().draw("a", [caption], count) for count in range(3)] == [caption] * 3


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_dropout_is_keyed_by_seed_sample_and_draw(share: float) -> None:
    """The same draws as before captions had rules: reference runs depend on them."""
    dropping = rules(7, proportion_empty_prompts=share)
    for sample in ("a.png", "sub/b.png"):
        found = [dropping.draw(sample, ["c"], count) for count in range(1000)]
        dropped = [keyed_uniform(7, "dropout", sample, count) < share for count in range(1000)]
        assert [text == "" for text in found] == dropped
        assert abs(sum(dropped) / 1000 - share) < 0.04
        assert set(found) <= {"", "c"}


def test_several_captions_are_drawn_alike_and_anew_each_time() -> None:
    captions, three, four = ["a", "b", "c"], rules(3), rules(4)
    found = [three.draw("x", captions, count) for count in range(3000)]
    assert found == [captions[int(keyed_uniform(3, "caption", "x", count) * 3)] for count in range(3000)]
    assert all(abs(found.count(caption) / 3000 - 1 / 3) < 0.04 for caption in captions)
    assert found != [three.draw("y", captions, count) for count in range(3000)]
    assert found != [four.draw("x", captions, count) for count in range(3000)]


def test_first_caption_only() -> None:
    first = rules(caption_choice="first")
    assert {first.draw("x", ["a", "b"], count) for count in range(50)} == {"a"}
    assert first.variants("x", ["a", "b"]) == ["a"]


def test_choice_and_dropout_do_not_depend_on_each_other() -> None:
    plain, dropping = rules(), rules(proportion_empty_prompts=0.5)
    for count in range(200):
        text = dropping.draw("x", ["a", "b"], count)
        assert text in ("", plain.draw("x", ["a", "b"], count))


def test_every_epoch_sees_another_order_until_all_have_been_seen() -> None:
    shuffled = rules(shuffle_caption=True, caption_variants=8)
    found = [shuffled.draw("x", [TAGS], count) for count in range(24)]
    assert len(set(found[:8])) == 8
    assert found[:8] == found[8:16] == found[16:]
    assert all(sorted(orders(text)) == sorted(orders(TAGS)) for text in found)
    assert len({orders(text)[0] for text in found}) > 2


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_kept_tags_stay_and_the_others_move(keep: int) -> None:
    shuffled = rules(shuffle_caption=True, keep_tokens=keep, caption_variants=30)
    found = [orders(text) for text in shuffled.variants("x", [TAGS])]
    assert len(found) == 30
    assert all(tags[:keep] == orders(TAGS)[:keep] for tags in found)
    for place in range(keep, 8):
        assert len({tags[place] for tags in found}) >= 3


def test_all_orders_are_equally_likely() -> None:
    shuffled = rules(shuffle_caption=True, caption_variants=1)
    found = [shuffled.draw(str(sample), ["a,b,c"], 0) for sample in range(6000)]
    for order in permutations("abc"):
        assert abs(found.count(", ".join(order)) / 6000 - 1 / 6) < 0.02


@pytest.mark.parametrize(
    ("caption", "keep", "number"),
    [
        ("a, b, c", 0, 6),
        ("a, b, c", 1, 2),
        ("a, b, c", 2, 1),
        ("a, b, c", 9, 1),
        ("a, a, b", 0, 3),
        ("a, a, a", 0, 1),
        ("a", 0, 1),
        ("a, b, c, d", 0, 8),
        ("a, a, b, b, c", 0, 8),
    ],
)
def test_no_more_orders_than_there_are(caption: str, keep: int, number: int) -> None:
    shuffled = rules(shuffle_caption=True, keep_tokens=keep)
    found = shuffled.variants("x", [caption])
    assert len(found) == len(set(found)) == number
    draws = [shuffled.draw("x", [caption], count) for count in range(5 * number)]
    assert draws == found * 5


def test_orders_are_drawn_for_seed_sample_and_caption() -> None:
    def found(seed: int, sample: str, caption: int) -> list[str]:
        captions = ["other"] * caption + [TAGS]
        texts = rules(seed, shuffle_caption=True).variants(sample, captions)
        return [text for text in texts if text != "other"]

    base = found(0, "x", 0)
    assert base == found(0, "x", 0)
    assert base != found(1, "x", 0)
    assert base != found(0, "y", 0)
    assert base != found(0, "x", 1)
    fewer = rules(0, shuffle_caption=True, caption_variants=3).variants("x", [TAGS])
    assert fewer == base[:3]


def test_orders_are_the_same_on_every_machine() -> None:
    assert rules(5, shuffle_caption=True, caption_variants=3).variants("a/b.png", ["a, b, c, d, e"]) == [
        "b, e, c, d, a",
        "a, e, c, b, d",
        "c, b, d, a, e",
    ]


@pytest.mark.parametrize(
    ("separator", "caption", "texts"),
    [
        (",", "b ,a,, ,", {"a, b", "b, a"}),
        (", ", "a, b", {"a, b", "b, a"}),
        ("|", "a, x|b", {"a, x| b", "b| a, x"}),
        (" ", "a  b", {"a b", "b a"}),
        (" ", "a a a", {"a a a"}),
        ("\n", "a\na a\n", {"a a a"}),
        (";", "a, b", {"a, b"}),
    ],
)
def test_tags_are_split_stripped_and_joined(separator: str, caption: str, texts: set[str]) -> None:
    shuffled = rules(shuffle_caption=True, caption_separator=separator)
    assert set(shuffled.variants("x", [caption])) == texts
    assert {shuffled.draw("x", [caption], count) for count in range(8)} == texts


@pytest.mark.parametrize(
    ("prefix", "caption", "text"),
    [
        ("sks dog", "on a beach", "sks dog on a beach"),
        (" sks ", "on a beach", "sks on a beach"),
        ("sks", "", "sks"),
        ("sks", " \n", "sks"),
        ("", " a", " a"),
        ("  ", "", ""),
    ],
)
def test_prefix_comes_before_every_caption(prefix: str, caption: str, text: str) -> None:
    before = rules(caption_prefix=prefix)
    assert before.draw("x", [caption], 4) == text
    assert before.variants("x", [caption]) == [text]


def test_prefix_is_not_put_before_a_dropped_caption() -> None:
    found = {rules(caption_prefix="sks", proportion_empty_prompts=0.5).draw("x", ["a"], n) for n in range(50)}
    assert found == {"", "sks a"}


def test_prefix_is_a_tag_that_does_not_move() -> None:
    shuffled = rules(shuffle_caption=True, caption_prefix="sks, dog", keep_tokens=1)
    assert set(shuffled.variants("x", ["k, a, b"])) == {"sks, dog, k, a, b", "sks, dog, k, b, a"}
    assert shuffled.variants("x", [" , "]) == ["sks, dog"]
    assert rules(shuffle_caption=True, caption_prefix="sks").variants("x", ["a"]) == ["sks, a"]


@pytest.mark.parametrize("captions", [["a"], [""], ["a", "a"], ["a, b", "", "b, a"], ["a,b,c", "d, e ,f, g", "h"]])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prefix", [None, "sks"])
@pytest.mark.parametrize("options", [
    {}, {"caption_choice": "first"}, {"shuffle_caption": True},
    {"shuffle_caption": True, "keep_tokens": 1, "caption_variants": 3},
    {"shuffle_caption": True, "caption_variants": 1},
])  # fmt: skip
def test_variants_are_exactly_what_draws_take(
    captions: list[str], share: float, prefix: str | None, options: dict[str, Any]
) -> None:
    found = rules(1, proportion_empty_prompts=share, caption_prefix=prefix, **options)
    texts = found.variants("x", captions)
    assert len(texts) == len(set(texts))
    drawn = {found.draw("x", captions, count) for count in range(800)}
    own = (
        share < 1 and prefix is None and any(not c for c in (captions[:1] if "caption_choice" in options else captions))
    )
    assert set(texts) == drawn - (set() if own else {""})
    assert ("" in drawn) == (share > 0 or own)


def test_settings_are_equal_where_variants_are() -> None:
    assert rules(0).settings == rules(1, keep_tokens=2, caption_variants=3, caption_separator="|").settings
    assert rules(0).settings == rules(0, proportion_empty_prompts=0.5, resolution=64, caption_prefix=" ").settings
    different = [
        rules(0),
        rules(0, caption_choice="first"),
        rules(0, caption_prefix="sks"),
        rules(0, proportion_empty_prompts=1.0),
        rules(0, shuffle_caption=True),
        rules(1, shuffle_caption=True),
        rules(0, shuffle_caption=True, keep_tokens=1),
        rules(0, shuffle_caption=True, caption_separator="|"),
        rules(0, shuffle_caption=True, caption_variants=7),
    ]
    assert len({found.settings for found in different}) == len(different)
    for found in different:
        assert all(isinstance(value, (str, int, bool, type(None))) for value in found.settings)


def test_a_million_captions_take_seconds() -> None:
    plain, best = rules(), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for sample in range(1000):
            plain.variants(str(sample), ["a caption"])
        best = min(best, time.perf_counter() - start)
    assert best / 1000 < 20e-6
