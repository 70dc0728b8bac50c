"""The recipes of examples/ run on tiny models, act, and are no longer than docs/library.md says."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
)
from tiny_models import tiny_vae
from tiny_networks import compvis_autoencoder
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 10
WIDTHS = (8, 16)


def load(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def latents(count=2, channels=4, cells=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, channels, cells, cells, generator=generator) for _ in range(count)]


def acts(objective, least=1):
    """Whether LPL's weight was measured of samples that passed the gate."""
    return objective.auto.measured >= least and 0 < float(objective.weight) < float("inf")


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda example: example.stem)
def test_a_user_writes_ten_lines_at_most(example):
    lines = [
        line for line in example.read_text().splitlines() if "# LPL" in line and not line.startswith(("from", '"'))
    ]
    if example.stem != "minimal_loop":
        assert 3 <= len(lines) <= MOST_LINES


def tiny_unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return UNet2DModel(sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4, **blocks)


def test_sit(capsys):
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1, sample_size=4,
        num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    batches = [(z, torch.zeros(4, dtype=torch.long)) for z in latents(4)]
    example, vae = load("sit_loop"), tiny_vae(widths=WIDTHS)
    example.check_loop(model, vae, batches)
    assert "lpl_weight=" in capsys.readouterr().out
    assert acts(example.train(model, vae, batches))


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_compvis(parameterization):
    torch.manual_seed(0)
    unet = tiny_unet()
    example = load("compvis_ldm")
    model = example.LatentDiffusion(lambda x, t, cond: unet(x, t).sample, compvis_autoencoder(4))
    model.parameterization = parameterization
    model.on_train_start()
    assert [tap.stride for tap in model.objective.loss_fn.taps] == [4, 2, 1, 1]
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    for z in latents(6):
        model.training_step((z, None), 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.on_train_batch_end()
    assert acts(model.objective)
    model.eval()
    before = model.objective.auto.measured
    model.training_step((latents(1)[0], None), 0)
    assert model.objective.auto.measured == before


def test_monai():
    from monai.networks.nets import AutoencoderKL
    from monai.networks.schedulers import DDPMScheduler as MonaiScheduler

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        3, 1, 1, (1, 1), (4, 8), (False,) * 2, 3, 4, 1e-6, False, False
    )  # axes, channels in and out, blocks, widths, attention, latent channels, groups, eps, attention in the middle
    unet = nn.ModuleDict({"layer": nn.Conv3d(3, 3, 3, padding=1)})
    unet.forward = lambda x, timesteps: unet["layer"](x)
    images = [torch.randn(2, 1, 8, 8, 8) for _ in range(5)]
    objective = load("monai_3d").train(
        unet, autoencoder, MonaiScheduler(1000), images, ["decoder.blocks.1", "decoder.blocks.3"]
    )
    assert acts(objective)


def args(**options):
    defaults = {"weighting_scheme": "logit_normal", "logit_mean": 0.5, "logit_std": 1.0, "mode_scale": 1.29}
    return types.SimpleNamespace(**defaults | {"learning_rate": 1e-3} | options)


@pytest.mark.parametrize("precondition_outputs", [True, False])
def test_sd3(precondition_outputs):
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=16,
        pos_embed_max_size=4,
    )  # fmt: skip
    batches = [(z.bfloat16(), torch.randn(4, 3, 8), torch.randn(4, 8)) for z in latents(3, channels=16)]
    vae = tiny_vae(widths=WIDTHS, latent_channels=16, shift_factor=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = load("sd3_dreambooth").train(
        transformer, vae, scheduler, batches, args(precondition_outputs=precondition_outputs)
    )
    assert acts(objective)
    # At shift 3 noise/signal is 3 (1 - u) / u: u of at least 0.5 passes, whose logit has the mean 0.5.
    exact = torch.special.ndtr(torch.tensor(0.5)).item()
    assert objective.p_gate == pytest.approx(exact, abs=0.01)


def test_flux():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    batches = [(z.bfloat16(), torch.randn(4, 3, 8), torch.randn(4, 8)) for z in latents(3, channels=16)]
    vae = tiny_vae(widths=(4, 4, 8, 8), latent_channels=16, shift_factor=0.1, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    objective = load("flux_dreambooth").train(transformer, vae, scheduler, batches, args(weighting_scheme="none"))
    assert acts(objective)
    assert objective.p_gate == pytest.approx(0.75, abs=0.01)


def test_lightning(monkeypatch):
    """With a stand-in of its module class: the example has its hooks, under its names."""
    lightning = types.ModuleType("lightning")
    lightning.LightningModule = type("LightningModule", (nn.Module,), {"device": "cpu", "log": lambda *_: None})
    monkeypatch.setitem(sys.modules, "lightning", lightning)
    vae = tiny_vae(widths=WIDTHS)
    module = load("lightning_module").LatentDiffusion(tiny_unet(), vae, DDPMScheduler())
    reduced = []
    strategy = types.SimpleNamespace(reduce=lambda x, reduce_op: reduced.append(reduce_op) or x)
    module.trainer = types.SimpleNamespace(strategy=strategy)
    module.on_fit_start()
    module.train()
    assert not vae.training
    assert not any("decoder" in name for name in module.state_dict())
    optimizer = module.configure_optimizers()
    for number, batch in enumerate(latents(3)):
        module.training_step(batch, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        module.on_train_batch_end(None, batch, number)
    assert acts(module.objective)
    assert reduced == ["sum"] * 3


@pytest.mark.parametrize("v_parameterization", [False, True])
def test_kohya(v_parameterization):
    """The script's scale and prediction act, which its VAE and its noise schedule do not state."""
    trainer = load("kohya_sd_scripts").NetworkTrainer()
    unet = tiny_unet()
    wrapped = lambda noisy, t, conds: unet(noisy, t)  # noqa: E731
    wrapped.parameters = unet.parameters
    batches = [{"latents": z.bfloat16(), "conds": None, "loss_weights": torch.ones(4)} for z in latents(3)]
    options = args(v_parameterization=v_parameterization)
    alone = types.SimpleNamespace(device="cpu", backward=torch.Tensor.backward, reduce=lambda x, how: x)
    trainer.train(options, alone, wrapped, tiny_vae(widths=WIDTHS), DDPMScheduler(), batches)
    assert acts(trainer.objective)
    assert trainer.objective.prediction_type == ("v_prediction" if v_parameterization else "epsilon")
    assert float(trainer.objective.loss_fn.latent_space.scale) == pytest.approx(1 / trainer.vae_scale_factor)
    with torch.no_grad():
        trainer.process_batch(batches[0], wrapped, DDPMScheduler(), options)


def fsdp_process(folder):
    """One process: two steps, and what it has measured."""
    from launching import ShardingAccelerator

    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests that this process is forked from
    os.environ["RANK"] = str(torch.distributed.get_rank())  # as real launchers do
    example, accelerator = load("accelerate_fsdp2"), ShardingAccelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)
    objective = example.train(accelerator, tiny_unet(), tiny_vae(widths=WIDTHS), DDPMScheduler(), latents(3))
    assert acts(objective)
    Path(folder, str(accelerator.process_index)).write_text(f"{objective.auto.measured} {float(objective.weight)}")


def test_accelerate_under_fsdp2(tmp_path):
    """Two processes measure one weight, of the samples of both."""
    import accelerate
    from launching import FSDP

    from lpl.training.launch import environment

    with environment({"ACCELERATE_USE_CPU": "true"} | FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}):
        accelerate.debug_launcher(fsdp_process, (str(tmp_path),), num_processes=2)
    first, second = ((tmp_path / name).read_text() for name in "01")
    assert first == second
    assert int(first.split()[0]) > 12 * 0.5  # of 24 samples, not of the 12 of one process
