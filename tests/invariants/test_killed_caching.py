"""A cache that was being filled when it was killed ends up as if nothing had happened, byte for byte.

LPL_KILLS says how many runs are killed at calls that change what is on disk, spread over all of them, and how many at
random moments: half a dozen each, and 500 in `make soak`.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killed_caching import BATCH, Caching, contents, finished, kill_after

from lpl.data.prepare import Processes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

KILLS = int(os.environ.get("LPL_KILLS", "6"))
SHARED = 4
"""Crops that several pieces have in common, which two processes may both encode."""


@pytest.fixture(scope="module")
def caching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caching]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Caching(tmp_path_factory.mktemp("caching"), 36, monkeypatch)


@pytest.fixture(scope="module")
def undisturbed(caching: Caching) -> dict[str, int]:
    """What a run does that nobody kills; its cache stays in `undisturbed`."""
    return caching.run(caching.root / "undisturbed")


def check(caching: Caching, cache: Path, undisturbed: dict[str, int], before: dict[str, int], kills: int) -> None:
    """A run to the end leaves the cache of the undisturbed run, and has lost one batch a kill at most."""
    caching.run(cache)
    found, expected = contents(cache), contents(caching.root / "undisturbed")
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    done = {name: value - before[name] for name, value in caching.counted().items()}
    assert undisturbed["images"] <= done["images"]
    assert undisturbed["captions"] <= done["captions"]
    lost = done["images"] - undisturbed["images"] + done["captions"] - undisturbed["captions"]
    assert lost <= kills * BATCH
    shutil.rmtree(cache)
    cache.with_suffix(".jsonl").unlink()


def test_the_undisturbed_run_has_much_to_lose(caching: Caching, undisturbed: dict[str, int]) -> None:
    files = contents(caching.root / "undisturbed")
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len([name for name in shards if name.startswith("latents")]) > 10
    assert len([name for name in shards if name.startswith("text")]) > 4
    assert undisturbed["calls"] > 300
    assert (undisturbed["images"], undisturbed["captions"]) == (76, 102)
    assert caching.run(caching.root / "undisturbed")["images"] == 0
    assert contents(caching.root / "undisturbed") == files


def test_killed_at_a_call(caching: Caching, undisturbed: dict[str, int]) -> None:
    calls = undisturbed["calls"]
    kills = min(KILLS, calls)
    for kill_at in range(calls, 0, -(calls // kills))[:kills]:
        before = caching.counted()
        cache = caching.root / f"at{kill_at}"
        assert not finished(caching.start(cache, kill_at)), kill_at
        check(caching, cache, undisturbed, before, kills=1)


def test_killed_at_random_moments_again_and_again(caching: Caching, undisturbed: dict[str, int]) -> None:
    draw = random.Random(KILLS)
    killed = 0
    while killed < KILLS:
        before, cache = caching.counted(), caching.root / f"after{killed}"
        kills = 0
        for _ in range(draw.randint(1, 4)):
            kills += not kill_after(caching.start(cache), draw.uniform(0, undisturbed["ns"] / 1e9))
        check(caching, cache, undisturbed, before, kills)
        killed += kills


def test_runs_started_together_wait_for_each_other(caching: Caching, undisturbed: dict[str, int]) -> None:
    before, cache = caching.counted(), caching.root / "together"
    runs = [caching.start(cache) for _ in range(3)]
    assert [finished(run) for run in runs] == [True] * 3
    check(caching, cache, undisturbed, before, kills=0)


def test_a_run_that_waits_goes_on_where_the_other_was_killed(caching: Caching, undisturbed: dict[str, int]) -> None:
    before, cache = caching.counted(), caching.root / "succession"
    killed = caching.start(cache, kill_at=undisturbed["calls"] // 2)
    while caching.counted()["images"] == before["images"]:
        time.sleep(0.001)
    waiting = caching.start(cache)
    assert not finished(killed)
    assert finished(waiting)
    check(caching, cache, undisturbed, before, kills=1)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_killed(caching: Caching, undisturbed: dict[str, int], rank: int) -> None:
    """Which of them stores what both need depends on the kill: the entries are the same, the shards need not be."""
    before, cache = caching.counted(), caching.root / f"two{rank}"
    kills = range(20, 220, 100)
    for kill_at in kills:
        assert not caching.run_two(cache, (kill_at, None) if rank == 0 else (None, kill_at))
    assert caching.run_two(cache)
    lost = caching.counted()["images"] - before["images"] - undisturbed["images"]
    expected = caching.prepare(caching.root / "undisturbed", Processes())
    before = caching.counted()
    found = caching.prepare(cache, Processes())
    assert caching.counted() == before
    assert lost <= SHARED + 2 * len(kills) * BATCH
    assert found.samples.digest() == expected.samples.digest()
    assert cache.with_suffix(".jsonl").read_bytes() == (caching.root / "undisturbed.jsonl").read_bytes()
    for index in range(len(expected)):
        draws = [(index, count) for count in range(8)]
        one, other = found.batch(draws), expected.batch(draws)
        assert torch.equal(one.raw_latents, other.raw_latents)
        assert all(torch.equal(one.text[name], other.text[name]) for name in other.text)
