"""On an accelerator: no operation on tensors of two devices, nothing that the host waits for, no layout undone."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from stand_in import DEVICE, MixedDevicesError, stand_in
from tiny_vaes import vae_of

import lpl.perceptual.loss
from lpl import LatentPerceptualLoss, PerceptualObjective

ON, HOST = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3)
INDEX = torch.tensor([0, 1])
FIRST = torch.ones(1, 4, 8, 8, device=DEVICE)
LAST = FIRST.contiguous(memory_format=torch.channels_last)
WAITED_FOR = {
    "a condition": lambda: bool(ON.sum() > 0),
    "an .item()": lambda: ON.sum().item(),
    "a copy to the host": lambda: ON.cpu(),
    "a copy from the host": lambda: HOST.to(DEVICE),
    "a blocking copy_": lambda: ON.copy_(HOST),
    "an index on the host": lambda: ON[INDEX],
    "numbers": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
    "numbers beside a tensor": lambda: ON.new_tensor([1.0]),
}
FREE = {
    "a copy that is not waited for": lambda: HOST.to(DEVICE, torch.float16, non_blocking=True),
    "a number on the host": lambda: ON * torch.tensor(2.0) + 1,
    "an index on the device": lambda: ON[INDEX.to(DEVICE, non_blocking=True)],
    "what is made there": lambda: torch.arange(3, device=DEVICE) * torch.full((3,), 2.0, device=DEVICE),
}


@pytest.mark.parametrize("what", WAITED_FOR)
def test_the_stand_in_sees_what_waits(what):
    with stand_in() as seen:
        WAITED_FOR[what]()
    assert seen.waits


@pytest.mark.parametrize("what", FREE)
def test_the_stand_in_lets_pass_what_does_not(what):
    with stand_in() as seen:
        FREE[what]()
    assert not seen.waits


def test_the_stand_in_refuses_two_devices_and_sees_two_layouts():
    with stand_in() as seen:
        for mixed in (lambda: ON.add_(HOST), lambda: torch.cat([ON, HOST])):
            with pytest.raises(MixedDevicesError):
                mixed()
        weights = FIRST[..., :3, :3].contiguous()
        torch.nn.functional.conv2d(LAST, weights)
        assert len(seen.layouts) == 1
        torch.nn.functional.conv2d(FIRST, weights)
    assert len(seen.layouts) == 1


TIMESTEPS = torch.tensor([10, 900, 100])
"""Of which the gate passes two."""
EPSILON, FLOW = DDPMScheduler, FlowMatchEulerDiscreteScheduler
AUTO = {"lpl_weight": "auto"}
CASES = {
    "auto": ("kl", EPSILON, {}, AUTO, True),
    "auto of a flow": ("kl", FLOW, {"norm_type": "own", "loss_type": "l1"}, AUTO | {"lpl_max_samples": 1}, True),
    "budget": ("kl", EPSILON, {}, AUTO | {"lpl_budget": 0.5, "step_flops": 1e9}, True),
    "crop": ("kl", FLOW, {"crop": 16, "norm_type": "default"}, {"lpl_reduction": "gated"}, False),
    "random depth": ("kl", EPSILON, {"random_depth": True, "checkpointing": True}, {}, False),
    "statistics of the batch": ("kl", FLOW, {"norm_type": "batch", "chunk": 1}, {}, False),
    "half precision": ("kl", FLOW, {"dtype": torch.float16, "norm_type": "shared"}, {}, False),
    "channels last": ("kl", FLOW, {"channels_last": True}, {}, False),
    "shortcuts": ("hunyuan_image", FLOW, {}, {}, False),
    "one frame": ("wan22", FLOW, {}, {}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing(case, monkeypatch):
    """The first calls read what they are fed: without them here, as every later call."""
    monkeypatch.setattr(lpl.perceptual.loss, "READ_MASKS", 0)
    name, scheduler, options, of_objective, weighed = CASES[case]
    vae = copy.deepcopy(vae_of(name)).to(DEVICE)
    channels = LatentPerceptualLoss(vae).decoder.latent_channels
    flow = scheduler is FLOW
    with stand_in() as seen:
        loss_fn = LatentPerceptualLoss(vae, **options)
        objective = PerceptualObjective(loss_fn, scheduler(), **{"lpl_weight": 1.0, "checked_calls": 0} | of_objective)
        if "lpl_budget" in of_objective:
            objective.count((channels, 8, 8))  # by decoding, on the meta device as well
        seen.waits.clear()
        seen.layouts.clear()
        latents = torch.empty(3, channels, 8, 8, device=DEVICE)
        output = torch.empty_like(latents).requires_grad_()
        diffusion_loss = output.square().mean()
        found = objective(
            output, latents, latents, None if flow else TIMESTEPS, sigmas=TIMESTEPS / 1000 if flow else None, step=0,
            mask=torch.ones(3, 1, 8, 8, device=DEVICE) if weighed else None,
            sample_weight=torch.ones(3, device=DEVICE) if weighed else None,
            windows=torch.rand(3, 2) if "crop" in options else None, diffusion_loss=diffusion_loss,
            draws=torch.zeros(3, dtype=torch.float64),
        )  # fmt: skip
        (diffusion_loss + found.loss).backward()
        objective.end_step()
        assert found.num_samples == of_objective.get("lpl_max_samples", 2)
        assert output.grad.is_meta
    assert seen.waits == []
    assert seen.layouts == []
