"""Devices without float64 (Apple's MPS): nothing may make a tensor of it there. The meta device stands for one."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_vaes import vae_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lpl import Gate, LatentPerceptualLoss, LatentSpace, PerceptualObjective, edm, probability_of
from lpl.diffusion.own_process import OwnProcess
from lpl.diffusion.prediction import alpha_sigma_table, expand
from lpl.perceptual.auto_weight import MEASURED_SAMPLES
from lpl.perceptual.budget import BINS, Budget, Spread
from lpl.perceptual.effect import compared


class Float64Error(TypeError):
    """What such a device says."""


class NoFloat64(TorchDispatchMode):
    """Refuses tensors in float64 on the meta device, as MPS does; what is read from there is 1."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = args and isinstance(args[0], torch.Tensor) and args[0].is_meta
        if read and func is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if read and func is torch.ops.aten._local_scalar_dense.default:
            return 1
        made = func(*args, **kwargs)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.dtype == torch.float64:
                raise Float64Error(f"{func}: float64 on a device that has none")
        return made


def test_the_mode_refuses_what_such_a_device_refuses():
    with NoFloat64():
        assert expand(torch.ones(2), torch.empty(2, 4, 8, 8, device="meta")).is_meta
        with pytest.raises(Float64Error):
            torch.empty(2, device="meta").double()


def stepped():
    """A budget whose sums lie on the device, at the end of a step that measured."""
    sums = torch.ones(3, BINS, device="meta")
    budget = Budget(0.5, 1.0, (1.0, 2.0), 0.5)
    budget.measure(Spread(torch.zeros(1).long(), torch.zeros(1).long(), [2], torch.ones(1, 2)), sums[0, :1])
    budget.measured = MEASURED_SAMPLES
    budget.end_step(lambda _: sums)
    assert budget.fixed


GIVEN = {
    "gradients": lambda: compared(torch.empty(2, 4, device="meta"), torch.empty(2, 4, device="meta")),
    "a budget": stepped,
    "the latent space of a VAE": lambda: LatentSpace.from_vae(vae_of("flux2").to("meta")),
    "a schedule": lambda: alpha_sigma_table(SimpleNamespace(alphas_cumprod=torch.empty(10, device="meta"))),
    "a process of one's own": lambda: OwnProcess(lambda t: (1 + 0 * t, t), edm(0.5)).alpha_sigma(
        torch.empty(2, device="meta")
    ),
    "a gate's probability": lambda: probability_of(
        Gate(alpha_sigma=lambda t: (1 - t, t), sigma_threshold=1.0), lambda n: torch.empty(n, device="meta")
    ),
}


@pytest.mark.parametrize("what", GIVEN)
def test_what_lies_on_the_device_is_read_in_its_own_precision(what):
    with NoFloat64():
        GIVEN[what]()


OPTIONS = [{"lpl_scale": True}, {"lpl_reduction": "gated"}, {"lpl_weight": "auto"}]
AT_A_BUDGET = {"lpl_budget": 0.5, "step_flops": 1e9}


@pytest.mark.parametrize(
    ("scheduler", "norm", "options"),
    [
        *((DDPMScheduler(), "channel", options) for options in [*OPTIONS, AT_A_BUDGET]),
        *((FlowMatchEulerDiscreteScheduler(), "batch", options) for options in OPTIONS),
    ],
)
def test_a_step_makes_no_float64(scheduler, norm, options):
    vae = vae_of("kl").to("meta")
    time = {"sigmas": torch.tensor([0.2, 0.4])} if "Flow" in type(scheduler).__name__ else {}
    timesteps = None if time else torch.tensor([10, 100])
    latents = torch.empty(2, 4, 8, 8, device="meta")
    with NoFloat64():
        loss_fn = LatentPerceptualLoss(vae, norm_type=norm)
        objective = PerceptualObjective(loss_fn, scheduler, **{"lpl_weight": 1.0, "checked_calls": 0} | options)
        output = torch.empty_like(latents).requires_grad_()
        found = objective(
            output, latents, latents, timesteps, mask=torch.ones(2, 1, 8, 8, device="meta"),
            sample_weight=torch.ones(2, device="meta"), diffusion_loss=output.square().mean(), **time,
        )  # fmt: skip
        found.loss.backward()
    assert output.grad.is_meta
