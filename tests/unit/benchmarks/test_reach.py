import itertools

import pytest
import torch

from benchmarks.random_depth import best_reach, mean_cost, mean_square


def squares_and_costs():
    return (0.6, 0.19, 0.07, 0.06, 0.08), (0.36, 0.19, 0.79, 0.9, 0.64)


def test_best_reach_minimises_variance_times_cost():
    """No other falling sequence of a grid has a smaller product; the pooled neighbours share a value."""
    squares, costs = squares_and_costs()
    best = best_reach(squares, costs)
    assert best[0] == 1
    assert all(a >= b > 0 for a, b in itertools.pairwise(best))
    assert best[3] == best[4]
    product = mean_cost(best, costs) * mean_square(best, squares)
    grid = [0.05 * i for i in range(1, 21)]
    others = ((1.0, *rest) for rest in itertools.combinations_with_replacement(reversed(grid), 4))
    assert min(mean_cost(o, costs) * mean_square(o, squares) for o in others) >= product * (1 - 1e-9)


def test_best_reach_at_a_budget():
    squares, costs = squares_and_costs()
    best = best_reach(squares, costs, budget=1.3)
    assert mean_cost(best, costs) == pytest.approx(1.3, rel=1e-6)
    grid = [0.05 * i for i in range(1, 21)]
    others = ((1.0, *rest) for rest in itertools.combinations_with_replacement(reversed(grid), 4))
    assert min(mean_square(o, squares) for o in others if mean_cost(o, costs) <= 1.3) >= mean_square(best, squares)


def test_mean_square_is_that_of_the_estimator():
    """sum_l c_l / p_l against the squared norms of the estimates themselves, for gradients that are not orthogonal."""
    generator = torch.Generator().manual_seed(0)
    layers = torch.randn(5, 40, generator=generator) + torch.randn(40, generator=generator)
    reach = (1.0, 0.9, 0.5, 0.3, 0.2)
    rest = layers.flip(0).cumsum(0).flip(0).square().sum(1).tolist()
    squares = [a - b for a, b in itertools.pairwise((*rest, 0.0))]
    probability = [a - b for a, b in itertools.pairwise((*reach, 0.0))]
    estimates = (layers / torch.tensor(reach)[:, None]).cumsum(0).square().sum(1)
    assert mean_square(reach, squares) == pytest.approx(float((torch.tensor(probability) * estimates).sum()), rel=1e-5)
