"""lpl.check: what it measures is what autograd says, what trains nothing is an error, and nothing is changed."""

import json
import math

import pytest
import torch
from tiny_models import tiny_vae
from torch import nn

from lpl import Distribution, LatentPerceptualLoss, PerceptualObjective, check
from lpl.perceptual.loss import LPLOutput

BATCH, CELLS = 6, 8


def flow_batches(count=4, error=0.3, seed=0, **changes):
    """A loop's calls: x = (1 - s) x0 + s eps, v = eps - x0, sigmas from 0.02 to 0.98."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        latents, noise, wrong = torch.randn(3, BATCH, 4, CELLS, CELLS, generator=generator)
        sigmas = (torch.arange(BATCH) + (number + 0.5) / count) / BATCH
        s = sigmas.view(-1, 1, 1, 1)
        output = (noise - latents + error * wrong).requires_grad_()
        call = {"model_output": output, "noisy_latents": (1 - s) * latents + s * noise, "latents": latents}
        call |= {"sigmas": sigmas, "diffusion_loss": (output - (noise - latents)).square().mean()}
        yield call | {name: value(call) for name, value in changes.items()}


def flow(loss_fn, **options):
    return PerceptualObjective(loss_fn, **{"prediction_type": "flow", "lpl_weight": "auto"} | options)


@pytest.fixture(scope="module")
def small():
    return LatentPerceptualLoss(tiny_vae(widths=(8, 16)), num_blocks=1)


def test_gradients_by_noise_level_are_those_of_autograd(latent_distance):
    """x0 = x - s o, so both gradients are known: of the same direction, of lengths by s and the scale."""
    objective = flow(latent_distance)
    numbers = check(latent_distance, objective, flow_batches()).numbers
    assert numbers["num_samples"] == 24
    assert numbers["layers"] == []
    low, high = 1.0, 3.0
    (row,) = (row for row in numbers["levels"] if (row["low"], row["high"]) == (low, high))
    squares, lpl = [], []
    for call in flow_batches():
        s, (error,) = call["sigmas"].double(), torch.autograd.grad(call["diffusion_loss"], call["model_output"])
        chosen = (s / (1 - s) >= low) & (s / (1 - s) < high)
        error = (BATCH * error[chosen]).double().flatten(1).square().sum(1)  # of each sample's own mean
        s = s[chosen]
        scale = (5 / ((1 - s) / s).square()).clamp(max=1)
        squares.append(torch.stack([(scale * s**2) ** 2 * error, error]))
        lpl.append(s**2 * error * (4 * CELLS**2) / 4)
    lpl_square, diffusion_square = torch.cat(squares, 1).mean(1)
    assert row["ratio"] == pytest.approx((lpl_square / diffusion_square).sqrt().item(), rel=1e-4)
    assert row["lpl"] == pytest.approx(torch.cat(lpl).mean().item(), rel=1e-4)
    assert row["cosine"] == pytest.approx(1, abs=1e-5)
    assert row["num"] == len(torch.cat(lpl))


def test_layers_add_up_to_the_loss_and_the_weight_is_what_auto_measures(small):
    objective, batches = flow(small, lpl_target_share=0.3), list(flow_batches(8))
    weights = list(small.weights)
    found = check(small, objective, batches)
    assert (objective.auto.measured, objective._watch._seen, objective._first._left["noise"]) == (0, 0, 3)
    assert small.weights == weights
    measured = flow(small, lpl_target_share=0.3)
    for call in batches:
        measured(**call)
    measured.end_step()
    assert found.numbers["suggestion"]["lpl_weight"]["value"] == pytest.approx(float(measured.weight), rel=1e-4)
    assert found.numbers["share"] is None
    share = check(small, flow(small, lpl_weight=float(measured.weight)), batches).numbers["share"]
    assert share == pytest.approx(0.3, rel=1e-4)
    layers = found.numbers["layers"]
    assert [row["tap"] for row in layers] == ["mid", "up_0"]
    assert max(row["length"] for row in layers) < 1.5
    assert sum(row["length"] for row in layers) >= 1  # the triangle inequality, of terms that are a sum
    assert json.loads(json.dumps(found.numbers, allow_nan=False)) == found.numbers
    for text in ("noise/signal <= 3", "mid", "up_0", "0.3 to 1", "suggestion", "lpl_weight="):
        assert text in str(found)


def test_precision_and_walk_of_the_decoder(monkeypatch):
    vae = tiny_vae(widths=(8, 16))
    with torch.no_grad():  # a norm follows: the output stays as it was
        vae.decoder.up_blocks[0].resnets[0].conv1.weight.mul_(1e7)
    loss_fn = LatentPerceptualLoss(vae, num_blocks=1)
    found = check(loss_fn, flow(loss_fn), flow_batches(1), vae=vae)
    assert found.numbers["walk_equals_decode"] < 1e-3
    assert [entry["finite"] for entry in found.numbers["precision"].values()] == [True, True, False]
    assert any("not finite in float16" in line for line in found.numbers["warnings"])
    decode = type(vae).decode
    monkeypatch.setattr(type(vae), "decode", lambda self, raw: decode(self, 2 * raw))
    with pytest.raises(RuntimeError, match="walk through the decoder differs from decode by"):
        check(loss_fn, flow(loss_fn), flow_batches(1), vae=vae)


class OwnVae(nn.Module):
    """A decoder that is no class of diffusers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 3, 1)

    def decode(self, raw_latents):
        return self.layer(raw_latents)


def test_a_decoder_without_a_walk_is_said(latent_distance):
    vae = OwnVae().eval()
    numbers = check(latent_distance, flow(latent_distance), flow_batches(1), vae=vae).numbers
    assert numbers["walk_equals_decode"] is None
    assert any(line.startswith("the walk was not held against decode: no walk") for line in numbers["warnings"])


def test_own_processes_packed_and_inactive_samples(latent_distance):
    """Only active samples are measured; a process, packing and inactive ones change nothing else."""

    def pack(x):
        return x.flatten(2).mT

    def unpack(x):
        return x.mT.unflatten(2, (CELLS, CELLS))

    def batches():
        for call in flow_batches():
            packed = pack(call["model_output"].detach()).requires_grad_()
            wanted = torch.autograd.grad(call["diffusion_loss"], call["model_output"])[0]
            loss = (packed * pack(wanted)).sum()  # of the same gradient
            sigmas = call.pop("sigmas")
            inactive = sigmas < 0.5
            call |= {"model_output": packed, "diffusion_loss": loss, "unpack": unpack, "active": ~inactive}
            yield call | {"timesteps": 1 - sigmas.where(~inactive, 0.6)}

    objective = PerceptualObjective(
        latent_distance, lpl_weight="auto", alpha_sigma=lambda t: (t, 1 - t), prediction_type="flow", p_gate=0.25
    )
    found = check(latent_distance, objective, batches()).numbers
    plain = check(latent_distance, flow(latent_distance), flow_batches()).numbers
    assert found["num_samples"] == 12
    same = [row for row in plain["levels"] if row["low"] >= 1]
    assert [row["ratio"] for row in found["levels"]] == pytest.approx([row["ratio"] for row in same], rel=1e-4)
    assert [row["num"] for row in found["levels"]] == [row["num"] for row in same]


# What is wrong is loud.


class Detached:
    """A loss whose features of the prediction are detached, wholly or but for a term that says nothing."""

    def __init__(self, graph):
        self.graph = graph

    def __call__(self, pred, target, mask=None, **_):
        values = (pred.detach() - target).square().flatten(1).mean(1)
        return (
            LPLOutput(values + self.graph * 0 * pred.flatten(1).sum(1), {}, {}, {}, {}, None)
            if self.graph
            else (LPLOutput(values, {}, {}, {}, {}, None))
        )


class Infinite(Detached):
    def __call__(self, pred, target, mask=None, **_):
        return LPLOutput((pred / 0).flatten(1).sum(1), {}, {}, {}, {}, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": lambda call: 1 - call["sigmas"]}, "is time reversed .pass sigmas=1 - t"),
        ({"diffusion_loss": lambda call: -call["diffusion_loss"]}, r"away from what .* 'flow' says \(cosine -1.00"),
        ({"diffusion_loss": lambda call: None}, "pass diffusion_loss"),
        ({"diffusion_loss": lambda call: call["diffusion_loss"].detach()}, "diffusion_loss is detached"),
        ({"model_output": lambda call: call["model_output"].detach()}, "carries no gradient"),
        ({"active": lambda call: torch.ones(BATCH)}, "pass booleans"),
    ],
)  # fmt: skip
def test_wrong_batches_are_refused(latent_distance, changes, message):
    with pytest.raises(ValueError, match=message):
        check(latent_distance, flow(latent_distance), flow_batches(1, error=1.5, **changes))


@pytest.mark.parametrize("error", [0.1, 3.0])
@pytest.mark.parametrize("trained", ["flow_to_data", "sample"])
def test_what_the_diffusion_loss_trains_is_told(latent_distance, trained, error):
    """However well the model is trained: by the direction of the diffusion loss's gradient."""

    def batches():
        for call in flow_batches(2, error):
            latents, wrong = call["latents"], call["model_output"].detach()
            noise = latents + (call["noisy_latents"] - latents) / call["sigmas"].view(-1, 1, 1, 1)
            target = latents - noise if trained == "flow_to_data" else latents
            output = (target + wrong - (noise - latents)).requires_grad_()
            yield call | {"model_output": output, "diffusion_loss": (output - target).square().mean()}

    with pytest.raises(ValueError, match=f"not 'flow' .*: pass prediction_type='{trained}'"):
        check(latent_distance, flow(latent_distance), batches())


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (Detached(0), "features of the prediction are detached"),
        (Detached(1), "exactly 0 for every gated sample, though its value is not"),
        (Infinite(0), "not finite"),
    ],
)
def test_what_trains_nothing_is_an_error(loss_fn, message):
    with pytest.raises(RuntimeError, match=message):
        check(loss_fn, flow(loss_fn), flow_batches(1))


def test_decoder_in_training_mode_and_no_batches_are_refused():
    vae = tiny_vae(widths=(8, 16))
    loss_fn = LatentPerceptualLoss(vae, num_blocks=1)
    for batches, message in (([], "there is no sample"), ([torch.zeros(1)], "by name, as dicts")):
        with pytest.raises(ValueError, match=message):
            check(loss_fn, flow(loss_fn), batches)
    vae.train()
    with pytest.raises(ValueError, match=r"training mode \(.*\): call \.eval\(\)"):
        check(loss_fn, flow(loss_fn), flow_batches(1))


@pytest.mark.parametrize(
    ("options", "error", "warning"),
    [
        (
            {"p_gate": Distribution("logit_normal", shift=100.0), "lpl_weight": 1.0},
            0.3,
            "samples passed the gate, where p_gate says",
        ),
        ({"lpl_weight": 1e-9}, 0.3, "LPL will idle: it gets"),
        ({"lpl_weight": 1e9}, 0.3, "LPL will dominate: it gets"),
        ({"lpl_sigma_threshold": 1e-3, "p_gate": 0.001}, 0.3, "LPL will idle: no sample passed the gate"),
        ({}, 100.0, "even where noise is least the estimate's distance is"),
    ],
)
def test_what_is_to_be_looked_at_is_a_warning(latent_distance, options, error, warning):
    numbers = check(latent_distance, flow(latent_distance, **options), flow_batches(error=error)).numbers
    assert any(warning in line for line in numbers["warnings"])


def test_the_suggested_gate_ends_where_the_estimate_says_nothing(latent_distance):
    """Errors in v of 1 are errors in x0 of s, so of an estimate that knows nothing s^2: half of it at s = 0.7."""
    numbers = check(latent_distance, flow(latent_distance), flow_batches(16, error=1.0)).numbers
    assert numbers["suggestion"]["lpl_sigma_threshold"] == 3.0
    assert "noise/signal 3 to 6 the estimate's distance is" in numbers["suggestion"]["why"]
    perfect = check(latent_distance, flow(latent_distance), flow_batches(16, error=0.1)).numbers
    assert perfect["suggestion"]["lpl_sigma_threshold"] is None
    assert math.isfinite(perfect["suggestion"]["lpl_weight"]["value"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"maks": lambda call: None}, "no argument 'maks'"),
        ({"active": lambda call: torch.zeros(BATCH, dtype=torch.bool)}, "no sample is active"),
        (
            {"sigmas": lambda call: torch.ones(BATCH), "noisy_latents": lambda call: torch.randn(BATCH, 4, 8, 8)},
            "signal",
        ),
    ],
)
def test_batches_that_say_nothing_are_errors(latent_distance, changes, said):
    with pytest.raises(ValueError, match=said):
        check(latent_distance, flow(latent_distance), flow_batches(1, **changes))


def test_a_batch_without_an_argument_and_another_loss_are_errors(latent_distance, small):
    (call,) = flow_batches(1)
    del call["latents"]
    with pytest.raises(ValueError, match="latents missing"):
        check(latent_distance, flow(latent_distance), [call])
    with pytest.raises(ValueError, match="not what the objective was built with"):
        check(small, flow(latent_distance), flow_batches(1))


def test_levels_that_the_diffusion_loss_leaves_out_have_no_ratio(latent_distance):
    """Such as a loss that is weighed with 0 where noise is least."""

    def clipped(call):
        target = (call["noisy_latents"] - call["latents"]) / call["sigmas"].view(-1, 1, 1, 1)
        errors = (call["model_output"] - target).square().mean((1, 2, 3))
        return (errors * (call["sigmas"] > 0.5)).mean()

    found = check(latent_distance, flow(latent_distance), flow_batches(diffusion_loss=clipped))
    assert [row["ratio"] is None for row in found.numbers["levels"]][::5] == [True, False]
    assert "0 to 0.1" in found.table
