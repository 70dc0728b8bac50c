"""What is added up: states and workspace against real optimizers, shares against counting."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel

from lpl.analysis.needs import Needs, decoded_share, estimate, fixed_costs, floor, optimizer_workspace
from lpl.base.counter import StepCounter
from lpl.base.errors import UserError
from lpl.config import TrainConfig
from lpl.config.command_line import parse_train
from lpl.families import blueprint, plan_configs
from lpl.training.optimizers import build_optimizer
from lpl.training.rehearsal import Rehearsal


def options(*flags: str) -> TrainConfig:
    return parse_train(["--resolution=64", "--train_batch_size=2", *flags])


def check_two_steps(optimizer: Any, parameters: list[Any], config: TrainConfig, plan: Rehearsal, row: str) -> None:
    """What the optimizer keeps after a step, and what it writes out in the next, are what is added up."""
    for p in parameters:
        p.grad = torch.ones_like(p)
    with StepCounter() as counter:
        optimizer.step()
        state = counter.live
        counter.reset_peak()
        optimizer.step()
    small = 64 * len(parameters)  # the step counts
    assert state == pytest.approx(fixed_costs(config, plan, 1)[row], abs=small)
    assert counter.peak - state == pytest.approx(optimizer_workspace(config, plan), abs=small)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_adamw_takes_what_its_arithmetic_says(plan_of: Any, device: Any) -> None:
    """foreach is what AdamW does on a GPU; on a CPU it goes parameter by parameter."""
    rehearsal, config = Rehearsal(plan_of, device), options()
    parameters = list(plan_of.denoiser().parameters())
    optimizer = torch.optim.AdamW(parameters, foreach=device == "cuda")
    check_two_steps(optimizer, parameters, config, rehearsal, "AdamW state")


@pytest.mark.parametrize(
    ("name", "args", "row"),
    [
        ("adafactor", "", "Adafactor state"),
        ("adafactor", "beta1=0.9", "Adafactor state"),
        ("prodigy", "", "Prodigy state"),
        ("prodigy", "slice_p=3", "Prodigy state"),
        ("schedulefree_adamw", "", "schedule-free state"),
        ("schedulefree_adamw", "foreach=False", "schedule-free state"),
        ("adamw", "amsgrad=True", "AdamW state"),
        ("torch.optim.SGD", "momentum=0.9", "SGD state"),
        ("torch.optim.RMSprop", "", "RMSprop state"),
    ],
)
def test_other_optimizers_take_what_their_arithmetic_says(plan_of: Any, name: str, args: str, row: str) -> None:
    """Two real steps on a CPU; weights are drawn, since Prodigy keeps nothing of those that are all zeros."""
    config = options(f"--optimizer={name}", f"--optimizer_args={args}")
    rehearsal, parameters = Rehearsal(plan_of, "cpu"), list(plan_of.denoiser().parameters())
    for p in parameters:
        p.data.normal_()
    optimizer = build_optimizer(parameters, config.optim, 1e-4)
    if name == "schedulefree_adamw":
        optimizer.train()
    check_two_steps(optimizer, parameters, config, rehearsal, row)


def test_ema_takes_a_copy_and_as_much_again_while_it_steps(plan_of: Any, rehearsal: Rehearsal) -> None:
    config, parameters = options("--use_ema"), list(plan_of.denoiser().parameters())
    with StepCounter() as counter:
        ema = EMAModel(parameters, foreach=True)
        copy = counter.live
        ema.step(parameters)
    found = estimate(config, rehearsal)
    assert found.stays["EMA"] == copy
    assert found.phases["EMA update"] - sum(found.stays.values()) == counter.peak - copy


def test_phases_are_what_stays_and_what_comes_on_top(rehearsal: Rehearsal) -> None:
    config = options()
    found, denoiser, loss = estimate(config, rehearsal), rehearsal.denoiser(config), rehearsal.loss(config)
    parameters = rehearsal.parameters(config)
    assert found.stays == {
        "UNet weights": 4 * parameters.trained, "AdamW state": 8 * parameters.trained, "VAE, float32": rehearsal.vae(),
    }  # fmt: skip
    total = sum(found.stays.values())
    assert found.gradients == 4 * parameters.trained
    assert found.phases == {
        "caching": rehearsal.caching(config),
        "forward pass": total + denoiser.forward,
        "LPL": total + denoiser.kept + loss.peak,
        "backward pass": total + denoiser.backward,
        "optimizer step": total + 2 * found.gradients,
    }
    assert found.peak == max(found.phases.values()) == found.phases[found.phase]
    assert floor(config, rehearsal) == found.phases["optimizer step"]


def test_accumulated_gradients_are_there_from_the_start(rehearsal: Rehearsal) -> None:
    once, twice = estimate(options(), rehearsal), estimate(options("--gradient_accumulation_steps=2"), rehearsal)
    assert twice.phases["forward pass"] - once.phases["forward pass"] == once.gradients
    assert twice.phases["LPL"] - once.phases["LPL"] == once.gradients
    assert twice.phases["optimizer step"] == once.phases["optimizer step"]
    # They no longer come on top of the activations one by one, but all are there while the first are made.
    assert twice.phases["backward pass"] > once.phases["backward pass"]


def change(rehearsal: Rehearsal, *flags: str, processes: int = 1) -> tuple[Needs, Needs]:
    return estimate(options(), rehearsal), estimate(options(*flags), rehearsal, processes)


def test_options_act_on_their_rows(rehearsal: Rehearsal) -> None:
    full, lora = change(rehearsal, "--rank=2", "--mixed_precision=bf16")
    assert lora.base == full.base == full.trained > lora.trained
    assert lora.stays["UNet weights"] == 2 * full.base + 4 * lora.trained
    assert lora.gradients == 4 * lora.trained
    full, small = change(rehearsal, "--use_8bit_adam")
    assert small.stays["AdamW state"] == pytest.approx(full.stays["AdamW state"] / 4, rel=0.02)
    assert full.phases["optimizer step"] - small.phases["optimizer step"] > full.gradients
    full, plain = change(rehearsal, "--no_use_lpl")
    assert (plain.lpl, plain.lpl_flops, plain.decoded, plain.taps) == (0, 0, 0, [])
    assert "LPL" not in plain.phases
    assert full.stays.pop("VAE, float32") == rehearsal.vae()
    assert plain.stays == full.stays
    assert plain.step_flops == full.step_flops
    full, half = change(rehearsal, "--lpl_dtype=bfloat16")
    assert half.stays["LPL's decoder, bfloat16"] > 0
    assert half.lpl < full.lpl
    alone, several = change(rehearsal, processes=2)
    assert several.stays["gradients in exchange"] == alone.gradients
    alone, validated = change(rehearsal, "--validation_prompt=x")
    sampling, decoding = rehearsal.validation(options())
    most = max(sampling, decoding - alone.stays["UNet weights"])
    assert validated.phases["validation"] == sum(alone.stays.values()) + most


def test_the_average_leaves_the_gpu_with_its_device(plan_of: Any, rehearsal: Rehearsal) -> None:
    plain, away = change(rehearsal, "--use_ema", "--ema_device=cpu")
    assert (away.stays, away.phases) == (plain.stays, plain.phases)
    on_cpu = Rehearsal(plan_of, "cpu")  # where the device is the CPU it is there all the same
    assert "EMA" in estimate(options("--use_ema", "--ema_device=cpu"), on_cpu).stays


def test_foreach_is_counted_where_torch_takes_it(rehearsal: Rehearsal) -> None:
    trained = rehearsal.parameters(options()).trained
    wide = optimizer_workspace(options("--optimizer=torch.optim.RMSprop"), rehearsal)
    narrow = optimizer_workspace(
        options("--optimizer=torch.optim.RMSprop", "--optimizer_args=foreach=False"), rehearsal
    )
    assert narrow < 4 * trained / 2
    assert wide == pytest.approx(4 * trained, rel=0.05)


def test_an_optimizer_that_needs_data_is_refused(rehearsal: Rehearsal) -> None:
    with pytest.raises(UserError, match=r"--optimizer prodigyopt\.Prodigy: its memory cannot be counted"):
        estimate(options("--optimizer=prodigyopt.Prodigy"), rehearsal)


def test_flops_are_of_a_sample(rehearsal: Rehearsal) -> None:
    two, four = change(rehearsal, "--train_batch_size=4")
    assert four.step_flops == two.step_flops
    assert four.lpl_flops == two.lpl_flops
    assert two.p_gate == pytest.approx(0.674)
    assert two.decoded == two.p_gate
    assert estimate(options("--lpl_t_threshold=500"), rehearsal).p_gate == pytest.approx(0.5)


@pytest.mark.parametrize(("batch", "limit"), [(1, 1), (3, 1), (3, 2), (4, 4), (2, None)])
def test_decoded_share_is_the_mean_over_all_cases(batch: int, limit: int | None) -> None:
    p, total = 0.3, 0.0
    for passed in product([0, 1], repeat=batch):
        chance = p ** sum(passed) * (1 - p) ** (batch - sum(passed))
        total += chance * min(sum(passed), batch if limit is None else limit)
    assert decoded_share(p, batch, limit) == pytest.approx(total / batch)


@pytest.mark.parametrize(
    ("p", "batch", "limit", "expected"),
    [(0.3, 4, None, 1.2), (0.3, 4, 1, 1.0), (0.3, 4, 2, 1.2), (0.3, 1, 1, 0.3), (0.5, 4, 1, 1.0), (0.5, 4, 3, 2.0)],
)
def test_decoded_share_of_stratified_timesteps(p: float, batch: int, limit: int | None, expected: float) -> None:
    """Of 4 samples 1 pass, or 2 in a fifth of the cases."""
    assert decoded_share(p, batch, limit, stratified=True) == pytest.approx(expected / batch)


def test_plan_knows_stratified_timesteps(rehearsal: Rehearsal) -> None:
    flags = ("--lpl_t_threshold=300", "--train_batch_size=4", "--lpl_max_samples=1")
    assert estimate(options(*flags), rehearsal).decoded == pytest.approx((1 - 0.7**4) / 4)
    assert estimate(options(*flags, "--timestep_sampling=stratified"), rehearsal).decoded == pytest.approx(0.25)


def test_bfloat16_weights_and_fused_backward_halve_and_drop_what_they_say(rehearsal: Rehearsal) -> None:
    half = ("--no_use_lpl", "--mixed_precision=bf16", "--optimizer=adafactor", "--max_grad_norm=0")
    exact, low, fused = (
        estimate(options(*half, *flags), rehearsal)
        for flags in ((), ("--weights_dtype=bfloat16",), ("--weights_dtype=bfloat16", "--fused_backward_pass"))
    )
    assert low.stays["UNet weights"] == exact.stays["UNet weights"] / 2 == 2 * low.trained
    assert low.gradients == exact.gradients / 2 == 2 * low.trained
    assert low.stays["Adafactor state"] == exact.stays["Adafactor state"]  # float32 whatever the weights are
    largest = rehearsal.parameters(options()).largest
    assert fused.gradients == 2 * largest
    assert "optimizer step" not in fused.phases
    assert fused.phases["forward pass"] == low.phases["forward pass"]
    backward = [needs.phases["backward pass"] for needs in (fused, low, exact)]
    assert backward == sorted(backward)
    assert backward[1] <= backward[2] - 2 * low.trained  # the weights; autocast's copies of them besides
    config = options(*half, "--weights_dtype=bfloat16", "--fused_backward_pass")
    assert floor(config, rehearsal) <= fused.peak
    average = options(*half, "--weights_dtype=bfloat16", "--use_ema")
    assert fixed_costs(average, rehearsal, 1)["EMA"] == 4 * low.trained


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--resolution=1024",),
        ("--resolution=1024", "--mixed_precision=bf16"),
        ("--resolution=1536", "--mixed_precision=bf16"),
    ],
)
def test_validation_stays_below_the_training_peak(flags: tuple[str, ...]) -> None:
    """The leanest training: a small LoRA without LPL. A decoder beside the UNet would take 1 GiB more than it."""
    config = parse_train(["--validation_prompt=x", "--gradient_checkpointing", "--rank=4", "--no_use_lpl", *flags])
    rehearsal = Rehearsal(blueprint(plan_configs(config.model), config.model))
    needs = estimate(config, rehearsal)
    training = max(needs.phases[phase] for phase in ("forward pass", "backward pass", "optimizer step"))
    assert needs.phases["validation"] < training
    _, decoding = rehearsal.validation(config)
    assert sum(needs.stays.values()) + rehearsal.vae() + decoding > training + 2**30
