"""The sequence of draws and how it is split."""

import pytest

from lpl.data.sampler import DrawOrder, positions


def test_every_epoch_holds_every_sample_once() -> None:
    order = DrawOrder(0, 7)
    epochs = [[order.draw(epoch * 7 + n) for n in range(7)] for epoch in range(4)]
    for epoch, draws in enumerate(epochs):
        assert sorted(index for index, _ in draws) == list(range(7))
        assert {count for _, count in draws} == {epoch}
    assert len({tuple(index for index, _ in draws) for draws in epochs}) > 1


def test_a_position_is_the_same_whenever_it_is_asked() -> None:
    order = DrawOrder(3, 11)
    forward = [order.draw(n) for n in range(50)]
    assert [DrawOrder(3, 11).draw(n) for n in (49, 3, 27)] == [forward[n] for n in (49, 3, 27)]
    assert [order.draw(n) for n in reversed(range(50))] == forward[::-1]
    assert [DrawOrder(4, 11).draw(n) for n in range(50)] != forward


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_step_covers_the_same_positions_however_it_is_split(batch_size: int) -> None:
    for step in range(3):
        taken = []
        for processes, accumulation in ((1, 8), (2, 4), (8, 1)):
            parts = [
                positions(step, micro, process, batch_size, accumulation, processes)
                for micro in range(accumulation)
                for process in range(processes)
            ]
            assert all(len(part) == batch_size for part in parts)
            taken.append([position for part in parts for position in part])
        size = 8 * batch_size
        assert taken == [list(range(step * size, (step + 1) * size))] * 3


def test_batches_run_on_across_epochs() -> None:
    order = DrawOrder(0, 5)
    drawn = [order.draw(p) for step in range(5) for m in range(2) for p in positions(step, m, 0, 2, 2, 1)]
    assert sorted(drawn) == [(index, count) for index in range(5) for count in range(4)]


@pytest.mark.parametrize("arguments", [(-1, 0, 0, 1, 1, 1), (0, 2, 0, 1, 2, 1), (0, 0, 1, 1, 2, 1)])
def test_shares_that_do_not_exist(arguments: tuple[int, int, int, int, int, int]) -> None:
    with pytest.raises(ValueError):
        positions(*arguments)


def test_no_samples() -> None:
    with pytest.raises(ValueError):
        DrawOrder(0, 0)
