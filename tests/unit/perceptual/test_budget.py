"""LPL at a budget: the full value and gradient on average, at the cost asked for, however batches are split."""

import itertools

import pytest
import torch
from diffusers import DDPMScheduler

from benchmarks.loss_cost import sdxl_vae
from lpl import LatentPerceptualLoss, PerceptualObjective
from lpl.diffusion.prediction import add_noise, alpha_sigma_table
from lpl.perceptual.budget import BINS, Budget, bins_of, depth_profile, tap_flops

STEP_FLOPS = 1e8
"""About what LPL costs with the tiny VAE."""
COSTS = (0.18, 0.2, 0.79, 0.91, 0.67)
TIMESTEPS = torch.tensor([10, 60, 120, 200, 290, 380, 420, 460])
"""All pass the gate, in six bins."""


class Inputs:
    """A batch of an epsilon model on the timesteps above; some of it is masked."""

    def __init__(self, timesteps=TIMESTEPS, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.scheduler, self.timesteps = DDPMScheduler(), timesteps
        self.latents, noise, error = torch.randn((3, len(timesteps), 4, 8, 8), generator=generator)
        self.alpha, self.sigma = (table[timesteps].float() for table in alpha_sigma_table(self.scheduler))
        self.noisy = add_noise(self.latents, noise, self.alpha, self.sigma)
        self.output = (noise + 0.1 * error).requires_grad_()
        self.mask = (torch.rand(len(timesteps), 1, 8, 8, generator=generator) > 0.3).float()

    def __call__(self, objective, rows=None, **given):
        arguments = self.output, self.noisy, self.latents, self.timesteps
        mask = self.mask if rows is None else self.mask[rows]
        return objective(*(x if rows is None else x[rows] for x in arguments), mask=mask, **given)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.output, retain_graph=True)[0]


def objective_of(vae, **options):
    loss_fn = LatentPerceptualLoss(vae, chunk=3)
    return PerceptualObjective(loss_fn, DDPMScheduler(), 1.5, **{"checked_calls": 0} | options)


def with_table(vae, inputs, table):
    """An objective whose reach is set to a table, as if measured."""
    objective = objective_of(vae, lpl_budget=0.1, step_flops=STEP_FLOPS)
    inputs(objective, draws=torch.full((len(inputs.timesteps),), 0.99))
    objective.budget.load_state_dict({"fixed": True, "measured": 256, "sums": None, "reach": table})
    return objective


def falling_table(seed=1):
    steps = torch.rand(BINS, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.3 + 0.7 * steps).cumprod(1).tolist()


def test_expectation_over_the_draws_is_the_full_loss_and_gradient(vae):
    """Every outcome of a sample's draw, weighted with its probability; the other samples are decoded throughout."""
    inputs = Inputs()
    full = inputs(objective_of(vae)).loss
    table = falling_table()
    objective = with_table(vae, inputs, table)
    bins = bins_of(inputs.alpha, inputs.sigma).tolist()
    assert len(set(bins)) >= 5
    mean, gradient = 0.0, torch.zeros_like(inputs.output)
    for sample, b in enumerate(bins):
        edges = [0.0, *reversed(table[b]), 1.0]
        for low, high in itertools.pairwise(edges):
            draws = torch.full((len(bins),), 0.999999)
            draws[sample] = (low + high) / 2
            loss = inputs(objective, draws=draws).loss
            if loss.requires_grad:
                mean, gradient = mean + (high - low) * loss, gradient + (high - low) * inputs.gradient(loss)
    torch.testing.assert_close(mean, full, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, inputs.gradient(full), rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_a_budget_of_all_is_the_full_loss_bit_for_bit(vae):
    inputs = Inputs()
    budget = objective_of(vae, lpl_budget=1e6, step_flops=STEP_FLOPS)
    found, full = inputs(budget), inputs(objective_of(vae))
    assert budget.budget.fixed
    assert found.num_samples == len(TIMESTEPS)
    assert torch.equal(found.loss, full.loss)
    assert torch.equal(inputs.gradient(found.loss), inputs.gradient(full.loss))
    assert found.metrics["lpl/loss"] == full.metrics["lpl/loss"]


def test_every_split_of_a_batch_decodes_the_same(vae):
    inputs, draws = Inputs(), torch.rand(len(TIMESTEPS), generator=torch.Generator().manual_seed(3))
    objective = with_table(vae, inputs, falling_table())
    whole = inputs(objective, draws=draws)
    assert 0 < whole.num_samples < len(TIMESTEPS)
    parts = [inputs(objective, slice(i, i + 2), draws=draws[i : i + 2]) for i in range(0, 8, 2)]
    assert sum(part.num_samples for part in parts) == whole.num_samples
    torch.testing.assert_close(sum(part.loss for part in parts) / 4, whole.loss)


def measured(share, mean_squares, shares, step_cost=1.0, p_gate=0.67):
    """A budget that has measured so many samples of each bin, with these mean squared gradients."""
    budget = Budget(share, step_cost, COSTS, p_gate)
    generator = torch.Generator().manual_seed(0)
    noise = 2 ** (torch.arange(BINS).float() / 2 - 6 + 0.25)
    while not budget.fixed:
        bins = torch.multinomial(shares, 64, replacement=True, generator=generator)
        sigma = noise[bins] / (1 + noise[bins].square()).sqrt()
        spread = budget.spread((1 - sigma.square()).sqrt(), sigma, torch.rand(64, generator=generator), True)
        assert torch.equal(spread.bins, bins)
        found = mean_squares[bins[spread.decoded]] / budget.rate
        budget.measure(spread, found)
        budget.end_step()
    return budget


def test_cost_is_the_budget_and_variance_is_worth_it():
    """Squared gradients that rise ninefold with an octave of noise, against the full loss's, at SDXL's costs."""
    shares = torch.ones(BINS) * torch.tensor([b in range(8, 16) for b in range(BINS)])
    squares = 3.0 ** torch.arange(BINS)
    for share in (0.05, 0.1, 0.5, 1.5):
        budget = measured(share, squares, shares)
        assert 0.85 * share <= budget.mean_cost() <= share + 1e-9
        table, s = torch.tensor(budget.state_dict()["reach"]), shares.double() / shares.sum()
        c = torch.tensor([0.4**tap for tap in range(5)], dtype=torch.float64)
        mean_square = float((s * squares) @ (c / table).sum(1))
        product = mean_square * budget.mean_cost() / (float((s * squares).sum() * c.sum()) * 0.67 * sum(COSTS))
        assert product <= (0.35 if share <= 0.5 else 1.0)
        assert (table[:, 1:] <= table[:, :-1]).all()
        assert (table > 0).all()


def test_measuring_needs_no_full_pass_and_auto_finds_the_same_weight(vae):
    """On average over draws "auto" measures the squares that it measures without a budget, to three standard errors."""
    inputs, found = Inputs(), []

    def weight(objective):
        objective.auto.__init__(0.5)
        for _ in range(3):
            inputs(objective, diffusion_loss=inputs.output.square().mean())
        objective.end_step()
        return float(objective.weight)

    loss_fn = LatentPerceptualLoss(vae)
    whole = weight(PerceptualObjective(loss_fn, DDPMScheduler(), "auto", checked_calls=0))
    objective = PerceptualObjective(
        loss_fn, DDPMScheduler(), "auto", checked_calls=0, lpl_budget=0.1, step_flops=STEP_FLOPS
    )
    for _ in range(12):
        found.append(weight(objective) ** -2 * whole**2)
        assert objective.budget.rate == 0.5
        assert not objective.budget.fixed
    squares = torch.tensor(found, dtype=torch.float64)
    assert 0.05 < float(squares.std()) < 1
    assert abs(float(squares.mean()) - 1) <= 3 * float(squares.std()) / len(found) ** 0.5


def test_state_round_trip(vae):
    inputs = Inputs()
    one = objective_of(vae, lpl_budget=0.1, step_flops=STEP_FLOPS)
    for _ in range(3):
        inputs(one, diffusion_loss=inputs.output.square().mean())
        one.end_step()
    again = Budget(0.1, 1e9, one.budget.costs.tolist(), one.p_gate)
    again.load_state_dict(one.budget.state_dict())
    assert again.state_dict() == one.budget.state_dict()
    assert again.measured > 0
    before = again.state_dict()
    again.measure(one.budget.spread(inputs.alpha, inputs.sigma, torch.zeros(8), True), torch.ones(8))
    again.discard_step()
    again.end_step()
    assert again.state_dict() == before


def test_steps_without_lpl_ask_no_other_process(vae):
    """Before lpl_start, and once the reach is set: a reduction would be of nothing, on whatever device."""
    objective = objective_of(vae, lpl_budget=0.1, step_flops=STEP_FLOPS, lpl_start=5)
    objective.count((4, 8, 8))
    objective.end_step(lambda sums: pytest.fail("reduced"))
    inputs = Inputs()
    inputs(objective, diffusion_loss=inputs.output.square().mean(), step=5)
    reduced = []
    objective.end_step(lambda sums: reduced.append(sums) or 2 * sums)
    assert objective.budget.measured == 2 * int(reduced[0][2].sum()) > 0


def test_costs_are_counted_and_depths_follow_them(vae):
    costs = tap_flops(LatentPerceptualLoss(vae), (4, 16, 16))
    assert len(costs) == 5
    assert all(cost > 0 for cost in costs)
    four = tap_flops(LatentPerceptualLoss(vae), (4, 32, 32))
    assert all(3 < b / a < 18 for a, b in zip(costs, four, strict=True))  # attention grows by 16
    profile = depth_profile(COSTS)
    assert profile[0] == 1
    assert all(b <= a for a, b in itertools.pairwise(profile))
    assert depth_profile((1.0, 0.01, 1.0))[1] == 1.0  # a cheap tap is never less likely than its costs allow


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lpl_budget": 0}, "positive"),
        ({"lpl_budget": 0.1, "lpl_reduction": "gated"}, "lpl_reduction 'expected'"),
        ({"lpl_budget": 0.1, "step_flops": None}, "pass step_flops="),
        ({"lpl_budget": 0.1, "step_flops": -1.0}, "step_flops must be a positive number"),
    ],
)
def test_refusals(vae, options, said):
    with pytest.raises(ValueError, match=said):
        Inputs()(objective_of(vae, **{"step_flops": STEP_FLOPS} | options))


def test_losses_that_it_does_not_go_with(vae):
    for options, said in (({"norm_type": "batch"}, "'batch'"), ({"random_depth": True}, "drop random_depth")):
        with pytest.raises(ValueError, match=said):
            PerceptualObjective(
                LatentPerceptualLoss(vae, **options), DDPMScheduler(), lpl_budget=0.1, step_flops=STEP_FLOPS
            )


@pytest.mark.parametrize("draws", [torch.full((8,), float("nan")), torch.full((8,), 1.0), torch.full((8,), -0.1)])
def test_draws_outside_of_0_to_1_are_an_error(vae, draws):
    """Those of NaN decoded nothing, and those below 0 everything, without a word."""
    with pytest.raises(ValueError, match=r"draws: .*\[0, 1\)"):
        Inputs()(objective_of(vae, lpl_budget=0.1, step_flops=STEP_FLOPS), draws=draws)


@pytest.mark.parametrize("flops", [0, float("nan"), "1e9"])
def test_step_flops_is_named(vae, flops):
    with pytest.raises(ValueError, match="step_flops must be a positive number"):
        Inputs()(objective_of(vae, lpl_budget=0.1, step_flops=flops))


def test_ones_own_decoder_is_refused_where_the_objective_is_built():
    loss_fn = LatentPerceptualLoss(stages=[torch.nn.Tanh().eval()], strides=(1,))
    with pytest.raises(ValueError, match="your own is not counted"):
        PerceptualObjective(loss_fn, DDPMScheduler(), lpl_budget=0.1, step_flops=STEP_FLOPS)


def test_cost_is_of_the_samples_that_are_decoded(vae):
    inputs, draws = Inputs(), torch.zeros(8)
    whole, first = (
        inputs(objective_of(vae, lpl_budget=0.1, step_flops=STEP_FLOPS, lpl_max_samples=n), draws=draws) for n in (8, 2)
    )
    assert first.metrics["lpl/cost"] == pytest.approx(whole.metrics["lpl/cost"] / 4)


def test_a_loop_goes_on_from_the_state_as_if_it_had_not_stopped(vae):
    """Also where the budget is not built yet, which waits for the first call."""

    def run(objective, steps):
        losses = []
        for step in steps:
            inputs = Inputs(seed=step)
            diffusion_loss = inputs.output.square().mean()
            losses.append(float(inputs(objective, diffusion_loss=diffusion_loss, step=step).loss.detach()))
            objective.end_step()
        return losses

    def build():
        loss_fn = LatentPerceptualLoss(vae)
        return PerceptualObjective(loss_fn, DDPMScheduler(), "auto", lpl_budget=0.1, step_flops=STEP_FLOPS)

    straight, first, second = build(), build(), build()
    losses = run(straight, range(6))
    run(first, range(3))
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert run(second, range(3, 6)) == losses[3:]
    assert second.state_dict() == straight.state_dict()
    with pytest.raises(ValueError, match="lpl_budget, which this one lacks"):
        objective_of(vae).load_state_dict(first.state_dict() | {"auto": None})
    fewer = PerceptualObjective(
        LatentPerceptualLoss(vae, num_blocks=1), DDPMScheduler(), "auto", lpl_budget=0.1, step_flops=STEP_FLOPS
    )
    fewer.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="5 taps, the loss compares 2"):
        run(fewer, [0])


def test_a_loop_that_forgets_end_step_is_warned(vae, caplog):
    """Nothing is taken over then, and LPL goes on at the rate at which it measures."""
    inputs, objective = Inputs(), objective_of(vae, lpl_budget=0.1, step_flops=STEP_FLOPS)
    inputs(objective)
    budget = objective.budget
    spread = budget.spread(inputs.alpha, inputs.sigma, torch.zeros(8), measuring=False)
    for end in (True, False):
        for _ in range(100):
            budget.measure(spread, torch.zeros(8))
            if end:
                budget.end_step()
                budget._sums = None  # or it would be set
        assert caplog.text.count("end_step()") == (not end)


@pytest.mark.slow
def test_means_over_draws_on_sdxls_shape_are_the_full_ones():
    """Loss, and gradient along the full one, of a masked batch: within three standard errors over 40 draws."""
    torch.manual_seed(0)
    inputs, vae = Inputs(TIMESTEPS[1::2]), sdxl_vae("cpu")
    full = inputs(objective_of(vae))
    along = inputs.gradient(full.loss)
    objective, found = with_table(vae, inputs, falling_table()), []
    generator = torch.Generator().manual_seed(4)
    for _ in range(40):
        loss = inputs(objective, draws=torch.rand(len(inputs.timesteps), generator=generator)).loss
        gradient = inputs.gradient(loss) if loss.requires_grad else torch.zeros_like(along)
        found.append([float(loss / full.loss), float((gradient * along).sum() / along.square().sum())])
    found = torch.tensor(found, dtype=torch.float64)
    assert (found.std(0) > 0.05).all()
    assert ((found.mean(0) - 1).abs() <= 3 * found.std(0) / len(found) ** 0.5).all()
