"""What the library is handed by mistake is a ValueError of one line that names it, never a traceback of torch's."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from lpl import (
    Distribution,
    Gate,
    HookTaps,
    LatentPerceptualLoss,
    LatentSpace,
    PerceptualObjective,
    check,
    edm,
    probability_of,
)

LATENTS = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
PAIR = (LATENTS, LATENTS + 1)
SCHEDULE = DDPMScheduler()


def distance(pred, target, mask=None, **_):
    """Stands for the loss where none is computed."""
    raise AssertionError


def objective(**options):
    return PerceptualObjective(distance, SCHEDULE, **options)


def objective_at_a_budget():
    made = objective()
    made.lpl_budget, made.step_flops = 0.1, 1e9
    return made


def call(made, **arguments):
    output = torch.zeros_like(LATENTS).requires_grad_()
    return made(output, LATENTS + 1, LATENTS, torch.tensor([10, 20]), **arguments)


def restored(state, **options):
    objective(**options).load_state_dict(state)


STATE = {"auto": None, "budget": None, "calls": 0}
NO_PAIR = "must be a function of .* positional argument"
OBJECTIVES = [
    (lambda: objective(lpl_max_samples="2"), "lpl_max_samples must be an integer of 1 or more, not '2'"),
    (lambda: objective(lpl_max_samples=True), "lpl_max_samples must be an integer of 1 or more, not True"),
    (lambda: objective(snr_gamma="5"), "snr_gamma must be a positive number, not '5'"),
    (lambda: objective(snr_gamma=float("inf")), "snr_gamma must be a positive number, not inf"),
    (lambda: edm(float("inf")), "sigma_data must be a positive number, not inf"),
    *(
        (
            lambda shape=shape: objective_at_a_budget().count(shape),
            "shape must be the shape of a sample's latents, .C, .space., not",
        )
        for shape in (3, "abc", (4,), (4, 8.0, 8), (4, 0, 8), None)
    ),
    (lambda: objective(lpl_target_share="a"), "lpl_target_share must lie between 0 and 1, not 'a'"),
    (lambda: objective(lpl_weight=torch.ones(2)), "neither a number nor 'auto'"),
    (lambda: objective(lpl_scale="no"), "lpl_scale must be True or False, not 'no'"),
    (lambda: objective(seed=1.5), "seed must be an integer, not 1.5"),
    (lambda: objective(checked_calls="a"), "checked_calls must be an integer of 0 or more, not 'a'"),
    (lambda: objective(lpl_t_threshold="200"), "lpl_t_threshold counts timesteps of 0..999, so not '200'"),
    (lambda: objective(p_gate=lambda: 3), f"sampler of levels {NO_PAIR}"),
    (lambda: objective(p_gate=Distribution("logit_normal", logit_mean="a")), "logit_mean must be a number, not 'a'"),
    (
        lambda: PerceptualObjective(distance, prediction_type="flow", p_gate=Distribution(shift="a")),
        "the shift must be",
    ),
    (lambda: objective(prediction_type=lambda alpha: alpha), f"prediction_type {NO_PAIR}"),
    (
        lambda: PerceptualObjective(distance, alpha_sigma=lambda: 3, prediction_type="flow", p_gate=0.5),
        f"alpha_sigma {NO_PAIR}",
    ),
    (lambda: PerceptualObjective(distance, alpha_sigma=3, prediction_type="flow"), r"function of \(time\), not 3"),
    (lambda: call(objective(), step="3"), "step must be an integer of 0 or more, not '3'"),
    (lambda: call(objective(), step=-1), "step must be an integer of 0 or more, not -1"),
    (lambda: call(objective(), unpack=3), r"unpack must be a function of \(packed\), not 3"),
    (lambda: call(objective(), unpack=lambda: 3), f"unpack {NO_PAIR}"),
    (lambda: call(objective(), sample_weight=torch.ones(2).cfloat()), r"sample_weight: complex64 \(2,\)"),
    (lambda: objective(lpl_weight="auto").end_step(3), "reduce must be a function"),
    (lambda: restored({}), "without auto, budget, calls: pass what state_dict"),
    (lambda: restored(3), "is a int: pass what state_dict"),
    (lambda: restored(STATE | {"calls": "a"}), "has 'a' as 'calls'"),
    (lambda: restored(STATE | {"auto": {}}, lpl_weight="auto"), "'auto', is without weight, fixed, measured, squares"),
    (lambda: restored(STATE | {"budget": {"fixed": True}}), "'budget', is without measured, sums, reach"),
    (lambda: edm("a"), "sigma_data must be a positive number, not 'a'"),
    (lambda: probability_of(3, torch.rand), "gate is a int: pass a Gate"),
    (lambda: probability_of(Gate(), lambda: 3), NO_PAIR),
    (lambda: LatentSpace("a", "b"), "scale is 'a': pass a tensor"),
    (lambda: LatentSpace.scaled("a"), "scaling_factor a, .*correct them"),
    (lambda: check(distance, 3, []), "objective is a int: pass the PerceptualObjective"),
    (lambda: check(distance, objective(), 3), "batches is a int: pass a list, or a generator"),
    (lambda: check(distance, objective(), [], vae=nn.Linear(1, 1)), "vae is a Linear: pass the module whose decode"),
    (lambda: check(distance, objective(), [], seed="a"), "seed must be an integer, not 'a'"),
]


@pytest.mark.parametrize(("wrong", "message"), OBJECTIVES)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        wrong()
    assert "\n" not in str(error.value)


LOSSES = [
    ({"random_depth": 0.5}, (), {}, "random_depth must be True, False or 2 probabilities"),
    ({"random_depth": (1.0, "a")}, (), {}, "random_depth must be True, False or 2 probabilities"),
    ({"pow_law": "no"}, (), {}, "pow_law must be True or False, not 'no'"),
    ({"remove_outliers": 3}, (), {}, "remove_outliers must be True or False, not 3"),
    ({"chunk": True}, (), {}, "chunk must be an integer of 1 or more, not True"),
    ({"latent_space": LatentSpace}, (), {}, "latent_space is a type: pass a LatentSpace"),
    ({"latent_space": LatentSpace.standardised([0] * 3, [1] * 3)}, (), {}, "of 3 channels, .* latents have 4"),
    ({"random_depth": True}, PAIR, {"depth": "1"}, "depth must be an integer, not '1'"),
    ({}, PAIR, {"reach": ()}, r"reach \(\): pass probabilities above 0 of 1 to 2 taps"),
    ({}, PAIR, {"reach": 0.5}, "reach 0.5: pass probabilities"),
    ({}, PAIR, {"reach": (1.0, 0.0)}, "pass probabilities above 0"),
    ({}, PAIR, {"reach": (1.0, 1.0, 1.0)}, "of 1 to 2 taps"),
    ({}, [x.long() for x in PAIR], {}, r"int64 \(2, 4, 4, 4\).* of floating point"),
    ({}, [*PAIR, torch.ones(2, 1, 4, 4).cfloat()], {}, "mask: complex64"),
]


@pytest.mark.parametrize(("options", "latents", "arguments", "message"), LOSSES)
def test_wrong_arguments_of_a_loss_are_named(get_vae, options, latents, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        LatentPerceptualLoss(get_vae("two_blocks"), **{"num_blocks": 1} | options)(*latents, **arguments)
    assert "\n" not in str(error.value)


# One's own decoder.


def convolution(inputs=4):
    return nn.Conv2d(inputs, 4, 3, padding=1).eval()


def hidden(module):
    """A function that runs it, which the loss cannot look into."""
    return lambda x: module(x)


def without_graph(context):
    module = convolution()

    def run(x):
        with context:
            return module(x)

    return run


class InPlace(nn.Module):
    """A block that does not say so."""

    def forward(self, x):
        return x.relu_()


STAGES = [
    ([convolution(5)], r"stage_0 does not take float32 \(1, 4, 4, 4\) on cpu: .*to have 5 channels"),
    ([convolution(), hidden(convolution(5))], "stage_1 does not take float32 .*to have 5 channels"),
    ([hidden(convolution().bfloat16())], "stage_0 does not take float32 .*BFloat16"),
    ([lambda x, y: x], r"stage_0 must be a function of \(x\)"),
    ([convolution(), lambda x: x.mul_(2)], "stage_1 changes in place what it is given"),
    ([convolution(), nn.Sequential(InPlace(), convolution()).eval()], "a stage's InPlace changes in place"),
    ([hidden(nn.Dropout())], "the stages run a Dropout in training mode: call .eval"),
    ([without_graph(torch.no_grad())], "stage_0 gives features without a graph"),
    ([without_graph(torch.inference_mode())], "stage_0 gives features without a graph"),
]


@pytest.mark.parametrize(("stages", "message"), STAGES)
def test_wrong_stages_are_named(stages, message):
    with pytest.raises(ValueError, match=message) as error:
        LatentPerceptualLoss(stages=stages, strides=(1,) * len(stages))(LATENTS.clone().requires_grad_(), LATENTS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_may_work_in_place(checkpointing):
    """As decoders are often built: first in a stage, in between and last, they equal those that do not."""
    first, second, found = convolution(), convolution(), []
    for inplace in (False, True):
        relu, pred = nn.ReLU(inplace=inplace), LATENTS.clone().requires_grad_()
        stages = [nn.Sequential(first, relu, second).eval(), nn.Sequential(relu, second, relu).eval()]
        out = LatentPerceptualLoss(stages=stages, strides=(1, 1), checkpointing=checkpointing)(pred, LATENTS + 1)
        found.append((out.per_sample.detach(), *torch.autograd.grad(out.per_sample.sum(), pred)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert float(found[0][1].norm()) > 0


class Model(nn.Module):
    """A decoder with a part that no tap names, and one that it does not run."""

    def __init__(self):
        super().__init__()
        self.first, self.noise, self.last, self.unused = convolution(), nn.Dropout(), convolution(), nn.Dropout()

    def forward(self, z):
        return self.last(self.noise(self.first(z)))


def hooks(model=None, decode=None, **changes):
    model = Model().eval() if model is None else model
    options = {"names": ["first", "last"], "decode": decode or model, "example": torch.zeros(1, 4, 4, 4)}
    return HookTaps(model, **options | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode": without_graph(torch.inference_mode())}, "not run by decode"),
        ({"model": Model()}, "decode runs a Dropout in training mode"),
        ({"decode": lambda: 3}, r"decode must be a function of \(raw_latents\)"),
        ({"example": torch.zeros(1, 5, 4, 4)}, r"decode does not take example, float32 \(1, 5, 4, 4\)"),
        ({"example": torch.zeros(())}, r"example is float32 \(\)"),
        ({"names": 3}, "names 3: pass names"),
        ({"to_map": 3}, r"to_map must be a function of \(output\), not 3"),
    ],
)
def test_wrong_hooks_are_named(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        hooks(**changes)
    assert "\n" not in str(error.value)


def test_hooks_see_every_part_that_decode_runs():
    """In training mode, when they are built and later; a part that is not run may be in any mode."""
    model = Model().eval()
    loss_fn = LatentPerceptualLoss(hooks(model))
    model.unused.train()
    loss_fn(*PAIR)
    model.noise.train()
    with pytest.raises(ValueError, match=r"training mode \(Dropout\)"):
        loss_fn(*PAIR)


def test_hooks_without_a_graph_are_refused():
    model = Model().eval()

    def decode(z):
        with torch.inference_mode():
            return model(z)

    with pytest.raises(ValueError, match=r"features without a graph.*inference_mode"):
        hooks(model, decode)


def test_evaluation_in_inference_mode_is_right():
    """Values equal those of torch.no_grad(), of stages and of hooks."""
    model = Model().eval()
    stages = [model.first, hidden(model.last)]
    for loss_fn in (LatentPerceptualLoss(hooks(model)), LatentPerceptualLoss(stages=stages, strides=(1, 1))):
        expected = loss_fn(*PAIR).per_sample
        with torch.inference_mode():
            torch.testing.assert_close(loss_fn(*PAIR).per_sample, expected, rtol=0, atol=0)
