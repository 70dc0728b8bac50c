"""The order of draws, bucket by bucket, and how a batch is split."""

import math
import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from lpl.data.sampler import BatchOrder, share
from lpl.diffusion.draws import keyed_generator

Draw = tuple[int, int]


def plain_draws(seed: int, size: int, count: int, *bucket: int) -> list[Draw]:
    """One bucket, repeats 1: whole permutations, one after the other."""
    epochs = -(-count // size)
    orders = [
        torch.randperm(size, generator=keyed_generator(seed, "order", e, *bucket)).tolist() for e in range(epochs)
    ]
    return [(index, epoch) for epoch, order in enumerate(orders) for index in order][:count]


def plain_order(size: int, batch_size: int, seed: int = 0) -> BatchOrder:
    return BatchOrder(seed, np.zeros(size, dtype=int), np.ones(size), batch_size)


def random_order(rng: random.Random) -> tuple[np.ndarray, np.ndarray, int, BatchOrder]:
    """Up to 30 samples in up to 5 buckets, numbered with gaps and not in order."""
    size, batch_size = rng.randint(1, 30), rng.randint(1, 9)
    numbers = rng.sample(range(20), rng.randint(1, 5))
    buckets = np.array([rng.choice(numbers) for _ in range(size)])
    repeats = np.array([rng.choice([0, 1, 1, 3, 0.25, 0.5, 2.5, 10 / 3]) for _ in range(size)])
    repeats[rng.randrange(size)] = 1
    return buckets, repeats, batch_size, BatchOrder(rng.randrange(100), buckets, repeats, batch_size)


def epoch_sizes(buckets: np.ndarray, repeats: np.ndarray) -> dict[int, int]:
    """Draws an epoch of each bucket: the rounded sum, with one extra draw at least where a sample needs it."""
    sizes = {}
    for bucket in set(buckets[repeats > 0].tolist()):
        own = [Fraction(r) for r in repeats[(buckets == bucket) & (repeats > 0)].tolist()]
        whole = sum(math.floor(r) for r in own)
        sizes[bucket] = max(math.floor(sum(own) + Fraction(1, 2)), whole + (min(own) < 1))
    return sizes


def bucket_sequences(order: BatchOrder, buckets: np.ndarray, steps: int) -> dict[int, list[list[Draw]]]:
    """Batches of each bucket in the first `steps` steps, each of one bucket only."""
    batches: dict[int, list[list[Draw]]] = {}
    for step in range(steps):
        batch = order.batch(step)
        (bucket,) = {int(buckets[index]) for index, _ in batch}
        batches.setdefault(bucket, []).append(batch)
    return batches


@pytest.mark.parametrize(("size", "batch_size"), [(1, 1), (1, 3), (5, 4), (7, 7), (11, 3), (4, 10), (40, 1)])
def test_one_bucket_without_repeats_is_one_permutation_after_the_other(size: int, batch_size: int) -> None:
    order = plain_order(size, batch_size, seed=3)
    steps = 4 * size // batch_size + 3
    drawn = [draw for step in range(steps) for draw in order.batch(step)]
    assert drawn == plain_draws(3, size, steps * batch_size)
    assert drawn != plain_draws(4, size, steps * batch_size) or size == 1


def test_the_order_is_this_one() -> None:
    """Runs that were begun must go on in the same order."""
    plain = plain_order(5, 4, seed=7)
    assert [plain.batch(step) for step in range(2)] == [
        [(0, 0), (2, 0), (1, 0), (3, 0)],
        [(4, 0), (4, 1), (1, 1), (2, 1)],
    ]
    order = BatchOrder(7, np.array([4, 9, 4, 9, 4]), np.array([1, 0.5, 1, 2.5, 1]), 2)
    assert [order.batch(step) for step in range(6)] == [
        [(3, 1), (1, 0)],
        [(0, 0), (2, 0)],
        [(4, 0), (2, 1)],
        [(3, 4), (3, 5)],
        [(4, 1), (0, 1)],
        [(3, 0), (3, 3)],
    ]


def test_a_long_permutation_is_torchs() -> None:
    """int32 holds the same permutation."""
    order = plain_order(70_000, 1000)
    expected = plain_draws(0, 70_000, 140_000)
    for step in (0, 69, 70, 139):
        assert order.batch(step) == expected[step * 1000 : (step + 1) * 1000]


def test_a_step_is_the_same_whenever_it_is_asked() -> None:
    rng = random.Random(0)
    for _ in range(40):
        buckets, repeats, batch_size, order = random_order(rng)
        again = BatchOrder(order.seed, buckets, repeats, batch_size)
        steps = list(range(40))
        forward = [order.batch(step) for step in steps]
        assert all(len(batch) == batch_size for batch in forward)
        rng.shuffle(steps)
        assert [again.batch(step) for step in steps] == [forward[step] for step in steps]
        late = BatchOrder(order.seed, buckets, repeats, batch_size)
        assert late.batch(39) == forward[39]


def test_seeds_draw_differently() -> None:
    buckets, repeats = np.array([0] * 20 + [1] * 20), np.array([1, 0.5] * 20)
    first, second = ([BatchOrder(seed, buckets, repeats, 4).batch(step) for step in range(7)] for seed in (0, 1))
    for bucket in (0, 1):
        of_first, of_second = (
            {d for b in batches for d in b if buckets[d[0]] == bucket} for batches in (first, second)
        )
        assert {index for index, _ in of_first if index % 2} != {index for index, _ in of_second if index % 2}
    assert first != second


def test_draws_are_plain_integers() -> None:
    order = BatchOrder(0, np.array([0, 1, 1]), np.array([1.5, 1, 2]), 2)
    assert {type(number) for step in range(6) for draw in order.batch(step) for number in draw} == {int}


@pytest.mark.parametrize("size", [7, 500])
def test_every_bucket_runs_through_its_own_permutations(size: int) -> None:
    rng = random.Random(5)
    buckets = np.array([rng.choice([7, 2]) for _ in range(size)])
    order = BatchOrder(5, buckets, np.ones(size), 3)
    batches = bucket_sequences(order, buckets, order.steps_through(12))
    assert set(batches) == {7, 2}
    for bucket, found in batches.items():
        members = np.flatnonzero(buckets == bucket).tolist()
        drawn = 12 * len(members) // 3 * 3
        sequence = [(members[rank], epoch) for rank, epoch in plain_draws(5, len(members), drawn, bucket)]
        assert sorted(found) == sorted(sequence[first : first + 3] for first in range(0, drawn, 3))


def test_a_bucket_that_is_left_out_does_not_count() -> None:
    """dogs=0 is the same as a folder without them."""
    left_out = BatchOrder(1, np.array([3, 3, 3, 8]), np.array([1, 1, 1, 0]), 2)
    assert [left_out.batch(step) for step in range(9)] == [plain_order(3, 2, seed=1).batch(step) for step in range(9)]


def test_epochs_take_the_batches_that_are_completed_in_them() -> None:
    rng = random.Random(1)
    for _ in range(60):
        buckets, repeats, batch_size, order = random_order(rng)
        sizes = epoch_sizes(buckets, repeats)
        assert order.epoch_size == sum(sizes.values())
        step = 0
        for epoch in range(6):
            through = {bucket: n * (epoch + 1) // batch_size for bucket, n in sizes.items()}
            expected = {b: through[b] - n * epoch // batch_size for b, n in sizes.items() if through[b]}
            count = sum(expected.values())
            assert order.steps_through(epoch) == step
            batches = [order.batch(step + n) for n in range(count)]
            found = Counter(int(buckets[batch[0][0]]) for batch in batches)
            assert found == Counter(expected)
            assert [order.epoch_of(step + n) for n in range(count)] == [epoch] * count
            step += count


def test_batches_of_buckets_are_mixed_within_an_epoch() -> None:
    buckets = np.repeat([0, 1], 200)
    order = BatchOrder(0, buckets, np.ones(400), 4)
    epochs = [[int(buckets[order.batch(step)[0][0]]) for step in range(100 * e, 100 * e + 100)] for e in range(2)]
    for drawn in epochs:
        assert sum(drawn) == 50
        changes = sum(a != b for a, b in pairwise(drawn))
        assert 30 < changes < 70
    assert epochs[0] != epochs[1]
    # nor do the batches of one bucket come in the order of its sequence
    first = plain_draws(0, 200, 200, 0)
    places = [first.index(draw) for step in range(100) if (draw := order.batch(step)[0])[0] < 200]
    assert sorted(places) == list(range(0, 200, 4))
    assert places != sorted(places)


def test_nothing_is_dropped_or_repeated_across_epochs() -> None:
    """Whole repeats: after e epochs each sample has had e r draws, but for what the unfinished batches hold back."""
    rng = random.Random(2)
    for _ in range(60):
        size, batch_size = rng.randint(1, 25), rng.randint(1, 9)
        buckets = np.array([rng.randrange(4) for _ in range(size)])
        repeats = np.array([rng.choice([1, 2, 5]) for _ in range(size)])
        order = BatchOrder(rng.randrange(100), buckets, repeats, batch_size)
        epochs = rng.randint(1, 12)
        drawn = [draw for step in range(order.steps_through(epochs)) for draw in order.batch(step)]
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= {(i, c) for i in range(size) for c in range(epochs * int(repeats[i]))}
        for bucket in set(buckets.tolist()):
            members = np.flatnonzero(buckets == bucket)
            due = epochs * int(repeats[members].sum())
            assert sum(int(index) in members for index, _ in drawn) == due - due % batch_size


def test_an_epoch_that_fits_batches_holds_each_sample_as_often_as_it_repeats() -> None:
    buckets, repeats = np.array([0, 1, 0, 1, 0]), np.array([1, 3, 2, 5, 1])
    order = BatchOrder(9, buckets, repeats, 4)
    assert (order.epoch_size, order.steps_through(1)) == (12, 3)
    for epoch in range(5):
        drawn = [draw for step in range(3 * epoch, 3 * epoch + 3) for draw in order.batch(step)]
        expected = [(i, epoch * r + copy) for i, r in enumerate(repeats.tolist()) for copy in range(r)]
        assert sorted(drawn) == expected


def test_counts_tell_all_draws_apart() -> None:
    rng = random.Random(3)
    for _ in range(60):
        _, repeats, _, order = random_order(rng)
        drawn = [draw for step in range(order.steps_through(12)) for draw in order.batch(step)]
        assert len(set(drawn)) == len(drawn)
        # epoch * ceil(r) + copy
        assert all(0 <= count < 12 * math.ceil(repeats[index]) for index, count in drawn)


def test_fractions_are_made_up_over_epochs() -> None:
    """At every epoch each sample is within 2.5 draws of its due; the sum is whole here, so nothing is rounded."""
    repeats = np.array([2.5] * 6 + [1] * 3 + [0.1] * 10 + [0.25] * 4)
    order = BatchOrder(0, np.zeros(23, dtype=int), repeats, 1)
    assert order.epoch_size == 20
    counts = np.zeros(23)
    for epoch in range(300):
        drawn = Counter(order.batch(step)[0][0] for step in range(20 * epoch, 20 * epoch + 20))
        times = np.array([drawn[index] for index in range(23)])
        assert ((times >= np.floor(repeats)) & (times <= np.ceil(repeats))).all()
        counts += times
        assert np.abs(counts - repeats * (epoch + 1)).max() < 2.5


def test_samples_of_equal_repeats_share_what_rounding_gives_their_bucket() -> None:
    """Bucket 0: 3 * 0.5 rounds to 2; 1: one draw of 0.3 at least; 2: 0.8 + 0.8 + 1.7 to 3; 3: 1.99 + 1.5 + 0.1 to 4."""
    buckets = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3])
    repeats = np.array([0.5, 0.5, 0.5, 0.3, 1, 0.8, 0.8, 1.7, 1.99, 1.5, 0.1])
    order = BatchOrder(2, buckets, repeats, 1)
    assert order.epoch_size == 2 + 2 + 3 + 4
    drawn = Counter(order.batch(step)[0][0] for step in range(order.steps_through(500)))
    average = np.array([drawn[index] for index in range(11)]) / 500
    less = 2 / 2.3  # two extra draws for fractions that sum to 2.3
    missing = 1 / 1.41  # two for three that sum to 1.59
    expected = [2 / 3, 2 / 3, 2 / 3, 1, 1, 0.8 * less, 0.8 * less, 1 + 0.7 * less]
    expected += [2 - 0.01 * missing, 2 - 0.5 * missing, 1 - 0.9 * missing]
    np.testing.assert_allclose(average, expected, atol=0.01)


@pytest.mark.parametrize("start", [0.0, 1 - 2**-53])
def test_fractions_that_all_but_fill_their_line(start: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding errors may neither draw a sample twice as an extra nor look beyond the last."""
    monkeypatch.setattr("lpl.data.sampler.keyed_uniform", lambda *key: start)
    for repeats in (np.full(1000, 1 - 1e-16), np.full(999, 1 - 1e-13), np.append(np.full(500, 1 - 1e-13), 0.4)):
        order = BatchOrder(0, np.zeros(len(repeats), dtype=int), repeats, 50)
        drawn = [draw for step in range(order.steps_through(20)) for draw in order.batch(step)]
        assert len(set(drawn)) == len(drawn)


def test_extra_draws_do_not_follow_the_order_of_the_samples() -> None:
    order = BatchOrder(0, np.zeros(100, dtype=int), np.full(100, 0.5), 50)
    assert 10 < sum(index % 2 for index, _ in order.batch(0)) < 40


def test_every_share_moves_on_with_the_epoch() -> None:
    """A tenth of a folder each epoch: all of it after some more than ten, none of it for ever."""
    order = BatchOrder(0, np.zeros(100, dtype=int), np.full(100, 0.1), 10)
    assert len({index for step in range(10) for index, _ in order.batch(step)}) > 85
    assert len({index for step in range(20) for index, _ in order.batch(step)}) == 100


def test_buckets_smaller_than_a_batch() -> None:
    """2 and 1 samples, batches of 8: most epochs complete no batch, and a batch runs over several epochs."""
    buckets = np.array([0, 1, 0])
    order = BatchOrder(0, buckets, np.ones(3), 8)
    assert [order.steps_through(epoch) for epoch in range(10)] == [0, 0, 0, 0, 1, 1, 1, 1, 3, 3]
    assert [order.epoch_of(step) for step in range(4)] == [3, 7, 7, 11]
    batches = [sorted(order.batch(step)) for step in range(3)]
    assert batches[0] == [(index, epoch) for index in (0, 2) for epoch in range(4)]
    both = [[(index, epoch) for index in (0, 2) for epoch in range(4, 8)], [(1, epoch) for epoch in range(8)]]
    assert sorted(batches[1:]) == both


def test_the_epoch_of_a_step_is_where_counting_finds_it() -> None:
    rng = random.Random(4)
    for _ in range(80):
        buckets, repeats, batch_size, order = random_order(rng)
        sizes = epoch_sizes(buckets, repeats).values()
        through = [sum(n * epoch // batch_size for n in sizes) for epoch in range(60)]
        assert [order.steps_through(epoch) for epoch in range(60)] == through
        for step in range(through[-1]):
            assert order.epoch_of(step) == next(e for e in range(60) if through[e + 1] > step)


def test_steps_far_out_cost_nothing() -> None:
    order = BatchOrder(0, np.array([0, 1, 1]), np.array([1, 1, 2.5]), 7)
    step = 10**12
    epoch = order.epoch_of(step)
    assert order.steps_through(epoch) <= step < order.steps_through(epoch + 1)
    assert len(order.batch(step)) == 7


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_is_the_same_however_it_is_split(batch_size: int) -> None:
    order = BatchOrder(0, np.array([0, 1] * 20), np.ones(40), 8 * batch_size)
    batch = order.batch(2)
    for processes, accumulation in ((1, 8), (2, 4), (8, 1)):
        parts = [
            share(batch, micro, process, batch_size, accumulation, processes)
            for micro in range(accumulation)
            for process in range(processes)
        ]
        assert all(len(part) == batch_size for part in parts)
        assert [draw for part in parts for draw in part] == batch
    assert share(list("abcdefgh"), 1, 0, 2, 2, 2) == ["e", "f"]


@pytest.mark.parametrize("arguments", [(-1, 0, 1, 2, 2), (2, 0, 1, 2, 2), (0, 2, 1, 2, 2), (0, -1, 1, 2, 2)])
def test_shares_that_do_not_exist(arguments: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no micro-batch"):
        share([0] * 4, *arguments)


def test_a_share_of_a_batch_of_another_size() -> None:
    with pytest.raises(ValueError, match="a batch of 5 is not 1 x 2 x 2"):
        share([0] * 5, 0, 0, 1, 2, 2)


@pytest.mark.parametrize(
    ("buckets", "repeats", "batch_size", "message"),
    [
        ([], [], 1, "no samples"),
        ([0, 0], [0, 0], 1, "no samples"),
        ([0], [1, 1], 1, "one length"),
        ([0, 0], [1, -1], 1, "0 or more"),
        ([0, 0], [1, math.nan], 1, "0 or more"),
        ([0, 0], [1, math.inf], 1, "0 or more"),
        ([0, 0], [2**30, 2**30], 1, "2147483648 draws"),
        ([0], [1], 0, "batch_size"),
    ],
)
def test_orders_that_cannot_be(buckets: list[int], repeats: list[float], batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchOrder(0, np.array(buckets, dtype=int), np.array(repeats), batch_size)


def test_negative_steps() -> None:
    for order in (plain_order(2, 1), BatchOrder(0, np.array([0, 1]), np.ones(2), 1)):
        with pytest.raises(ValueError, match="step must be 0 or more"):
            order.batch(-1)
        with pytest.raises(ValueError, match="step must be 0 or more"):
            order.epoch_of(-1)
