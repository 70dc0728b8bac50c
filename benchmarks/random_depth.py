"""The variance and the cost of stopping LPL's decoder at a random depth (lpl_random_depth), and the best probabilities.

    python benchmarks/random_depth.py

For each decoder: the gradient of every layer's term, the squared norms from which the probabilities are derived
(best_reach), and the variance of the gradient over samples and depths, relative to the full loss's over samples. Costs
are counted on the meta device at 1024 px. Draws docs/random_depth.png.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lpl import LatentPerceptualLoss
from lpl.demo.weights import load_pipeline
from lpl.perceptual.budget import depth_profile
from lpl.perceptual.random_depth import REACH

sys.path.insert(0, str(Path(__file__).parent))
from loss_cost import DOCS, count_lpl, decode_flops, sdxl_vae

SAMPLES, CELLS, BUDGET = 4, 8, 1.3
ERRORS = (0.05, 0.3)
"""Errors of the clean-latent estimate, in standard deviations of the latents."""


def best_reach(squares: Sequence[float], costs: Sequence[float], budget: float | None = None) -> list[float]:
    """The probabilities with the least mean squared gradient at a mean cost: p_l = min(1, t sqrt(c_l / k_l)), falling.

    Neighbours that would rise are pooled: they share sqrt(sum c / sum k).

    Args:
        squares: c_l above, averaged over samples.
        costs: k_l above, in any unit.
        budget: the mean cost, between the first cost and their sum, which decides t; None: the t at which the product
            of mean squared gradient and mean cost is least, p_0 being just 1.
    """
    shape = depth_profile(costs, [max(square, 0.0) for square in squares])
    if budget is None:
        return shape
    low, high = 1.0, 1 / min(shape)
    for _ in range(60):
        t = (low * high) ** 0.5
        cost = mean_cost([min(1.0, t * p) for p in shape], costs)
        low, high = (low, t) if cost > budget else (t, high)
    return [min(1.0, low * p) for p in shape]


def mean_cost(reach: Sequence[float], costs: Sequence[float]) -> float:
    """sum_l k_l p_l."""
    return sum(p * k for p, k in zip(reach, costs, strict=True))


def mean_square(reach: Sequence[float], squares: Sequence[float]) -> float:
    """sum_l c_l / p_l."""
    return sum(c / p for p, c in zip(reach, squares, strict=True))


def layer_gradients(vae, error, **options):
    """dL/dlatents of each layer's weighted term, (layers, samples, values), float64."""
    generator = torch.Generator().manual_seed(0)
    shape = (SAMPLES, vae.config.latent_channels, CELLS, CELLS)
    target = torch.randn(shape, generator=generator)
    pred = (target + error * torch.randn(shape, generator=generator)).requires_grad_()
    loss_fn = LatentPerceptualLoss(vae, **options)
    weights, found = loss_fn.weights, []
    for i in range(len(weights)):
        loss_fn.weights = [w if i == j else 0.0 for j, w in enumerate(weights)]
        found.append(loss_fn(pred, target).gradient.flatten(1).double())
    return torch.stack(found)


def squares_of(gradients):
    """c_l, the full gradient's mean square, and the square of its mean over samples (estimated without bias)."""
    rest = gradients.flip(0).cumsum(0).flip(0)
    norms = [*rest.square().sum(-1).mean(1).tolist(), 0.0]
    full = gradients.sum(0)
    pairs = len(full) * (len(full) - 1)
    of_mean = float(full.sum(0).square().sum() - full.square().sum()) / pairs
    return [a - b for a, b in itertools.pairwise(norms)], norms[0], of_mean


def costs():
    """The cost of reaching each tap from the one before, in plain decodes."""
    decode = decode_flops(sdxl_vae("meta"), 1024)
    cumulative = [count_lpl(1024, num_blocks=n)[0] / decode for n in range(5)]
    return [b - a for a, b in itertools.pairwise([0.0, *cumulative])]


def main():
    per_tap = costs()
    print("cost of each tap, in decodes:", *(f"{k:.2f}" for k in per_tap), f"; all: {sum(per_tap):.2f}\n")
    print(
        f"| decoder | norm | error | c_l / sum | variance at {mean_cost(REACH, per_tap):.2f} decodes with the shipped "
        f"probabilities | best probabilities at {BUDGET} | their variance |\n|---|---|---|---|---|---|---|"
    )
    curves = {}
    decoders = {"SDXL's shape, random weights": sdxl_vae("cpu"), "the demo's, trained": load_pipeline().vae}
    for (name, vae), norm, error in itertools.product(decoders.items(), ("shared", "channel", "own"), ERRORS):
        squares, norm_square, of_mean = squares_of(layer_gradients(vae, error, norm_type=norm))
        variance = norm_square - of_mean

        def ratio(reach, squares=squares, variance=variance, of_mean=of_mean):
            return (mean_square(reach, squares) - of_mean) / variance

        best = best_reach(squares, per_tap, BUDGET)
        print(
            f"| {name} | {norm} | {error} | {' '.join(f'{c / norm_square:.2f}' for c in squares)} | {ratio(REACH):.2f} "
            f"| {' '.join(f'{p:.2f}' for p in best)} | {ratio(best):.2f} |",
            flush=True,
        )
        if error == 0.3:
            budgets = [0.6 + 0.1 * i for i in range(23)]
            reaches = [best_reach(squares, per_tap, b) for b in budgets]
            curves[f"{name}, {norm}"] = (
                [mean_cost(r, per_tap) for r in reaches],
                [ratio(r) for r in reaches],
                ratio(REACH),
            )
    draw(curves, per_tap)


def draw(curves, per_tap):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for name, (cost, variance, shipped) in curves.items():
        (line,) = axis.plot(cost, variance, label=name)
        axis.plot(mean_cost(REACH, per_tap), shipped, "o", color=line.get_color())
    axis.axhline(1.5, color="gray", linestyle=":")
    axis.set(xlabel="mean cost, plain decodes (dots: the shipped probabilities)", ylabel="gradient variance, full = 1")
    axis.set_ylim(0.9, 3)
    axis.legend()
    figure.savefig(DOCS / "random_depth.png", dpi=80)


if __name__ == "__main__":
    main()
