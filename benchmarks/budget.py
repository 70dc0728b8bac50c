"""The variance and the cost of LPL at a budget (lpl_budget): chosen by noise level, by depth, by both, or by neither.

    python benchmarks/budget.py

The demo's denoiser and decoder on its photographs, with every prefix of the taps for each sample: squared gradients of
the objective at the model's output, by half octave of noise/signal and by tap. The mean squared gradient of a sample
under each rule follows from them exactly. Costs are SDXL's at 1024 px, counted, and the demo's own. Draws
docs/budget.png.
"""

import random
import sys
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from lpl import LatentPerceptualLoss
from lpl.demo.photographs import random_crops, to_tensor
from lpl.demo.weights import load_pipeline
from lpl.diffusion.prediction import add_noise, expand, output_sensitivity, signal_to_noise, x0_from_output
from lpl.diffusion.schedule import schedule_of
from lpl.perceptual.budget import BINS, Budget, bins_of, tap_flops
from lpl.perceptual.gate import Gate, snr_scale

sys.path.insert(0, str(Path(__file__).parent))
from loss_cost import DOCS, sdxl_vae

SDXL_STEP = 20.6e12
"""FLOPs of a step of SDXL's UNet at 1024 px, as lpl plan counts them."""
BATCH, ROUNDS = 24, 12
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


@torch.no_grad()
def samples(pipeline):
    """(bins, (N, taps) c_l) of gated samples of the demo's model."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    schedule, loss_fn = schedule_of(scheduler), LatentPerceptualLoss(pipeline.vae)
    gated = Gate(schedule).table.nonzero().flatten()
    crops = random_crops(BATCH, random.Random(0))
    pixels = to_tensor([crop.image for crop in crops])
    latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    embeddings, _, pooled, _ = pipeline.encode_prompt([c.caption for c in crops], do_classifier_free_guidance=False)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * BATCH)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(ROUNDS):
        t = gated[torch.randint(len(gated), (BATCH,), generator=generator)]
        alpha, sigma = (x.float() for x in schedule.alpha_sigma(t))
        noise = torch.randn(latents.shape, generator=generator)
        noisy = add_noise(latents, noise, alpha, sigma)
        added = {"text_embeds": pooled, "time_ids": sizes}
        output = pipeline.unet(noisy, t, embeddings, added_cond_kwargs=added).sample
        pred = x0_from_output(output, noisy, alpha, sigma, "epsilon")
        factor = snr_scale(signal_to_noise(alpha, sigma), None) * output_sensitivity(alpha, sigma, "epsilon")
        prefixes = [torch.zeros_like(pred)]
        for depth in range(1, len(loss_fn.taps) + 1):
            with torch.enable_grad():
                gradient = loss_fn(pred.detach().requires_grad_(), latents, reach=(1.0,) * depth).gradient
            prefixes.append(expand(factor, gradient) * gradient)
        from_tap = [(prefixes[-1] - before).flatten(1).square().sum(1) for before in prefixes]
        c = torch.stack([a - b for a, b in pairwise(from_tap)], 1)
        found.append((bins_of(alpha, sigma), c))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def by_bin(bins, c):
    """Shares of the bins, (BINS,), and mean c_l in each, (BINS, taps), float64."""
    counts = torch.bincount(bins, minlength=BINS).double()
    sums = torch.zeros(BINS, c.shape[1], dtype=torch.float64).index_add_(0, bins, c.double())
    return counts / counts.sum(), sums / counts.clamp(min=1)[:, None]


def fixed_budget(share, step, costs, p_gate, shares, squares):
    """A budget fixed from the exact mean squared gradients; None where it would decode everything."""
    budget = Budget(share, step, costs, p_gate)
    if budget.fixed:
        return None
    many = 1e9 * shares
    budget._sums = torch.stack([squares * many, many, many])
    budget._fix()
    return budget


def rules(share, step, costs, p_gate, shares, c):
    """By rule: (cost as a share of the whole loss's, mean squared gradient as a multiple of the whole loss's)."""
    whole_cost, k = sum(costs), torch.tensor(costs, dtype=torch.float64)
    whole = float(shares @ c.sum(1))
    rate = share * step / (p_gate * whole_cost)

    def measure(reach):
        cost = float(shares @ (reach @ k)) / whole_cost
        return cost, float(shares @ (c / reach).sum(1)) / whole

    found = {"uniform": measure(torch.full_like(c, rate))}
    flat = fixed_budget(share, step, costs, p_gate, shares, torch.ones(BINS, dtype=torch.float64))
    found["depth"] = measure(flat._table)
    one = fixed_budget(share, step, [whole_cost], p_gate, shares, c.sum(1))
    found["noise level"] = measure(one._table.expand(-1, len(costs)))
    found["both"] = measure(fixed_budget(share, step, costs, p_gate, shares, c.sum(1))._table)
    return found


def draw(points):
    """Draws the curves for SDXL's costs."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.4))
    for name in points[0]:
        cost, square = zip(*(p[name] for p in points), strict=True)
        axes.loglog(cost, square, marker="o", label=name)
    axes.axhline(2, color="grey", linestyle=":", label="whole LPL and the diffusion loss\ntogether, at a share of 0.5")
    for axis, ticks in ((axes.xaxis, SHARES), (axes.yaxis, (1, 2, 5, 10, 20, 50))):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlabel("cost of LPL, whole loss = 1")
    axes.set_ylabel("mean squared gradient, whole loss = 1")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(DOCS / "budget.png", dpi=120)


def main():
    pipeline = load_pipeline()
    bins, c = samples(pipeline)
    shares, squares = by_bin(bins, c)
    costs = {
        "SDXL, 1024 px": (SDXL_STEP, tap_flops(LatentPerceptualLoss(sdxl_vae("meta")), (4, 128, 128))),
        "the demo, 64 px": (None, tap_flops(LatentPerceptualLoss(pipeline.vae), (16, 8, 8))),
    }
    p_gate = Gate(schedule_of(DDPMScheduler.from_config(pipeline.scheduler.config))).probability(None)
    layers = squares.T @ shares / (shares @ squares.sum(1))
    print(f"gate passes {p_gate:.3f}; c_l / sum: {' '.join(f'{x:.2f}' for x in layers)}\n")
    print("| costs of | share of the step | rule | cost, whole = 1 | mean square, whole = 1 | product |")
    print("|---|---|---|---|---|---|")
    for name, (step, taps) in costs.items():
        step = step or p_gate * sum(taps)
        points = []
        for share in SHARES:
            if share * step < p_gate * sum(taps):
                points.append(rules(share, step, taps, p_gate, shares, squares))
                for rule, (cost, square) in points[-1].items():
                    print(f"| {name} | {share} | {rule} | {cost:.3f} | {square:.2f} | {cost * square:.2f} |")
        if "SDXL" in name:
            draw(points)


if __name__ == "__main__":
    main()
