"""Parts of a run on networks without memory against the same parts on real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lpl.base.counter import StepCounter
from lpl.config import TrainConfig
from lpl.config.command_line import parse_train
from lpl.data.filling import batch_of
from lpl.diffusion.latent_space import LatentSpace
from lpl.diffusion.losses import diffusion_loss
from lpl.families import blueprint, model_configs
from lpl.families.sdxl_configs import PUBLISHED
from lpl.training.engine import add_lora, build_loss
from lpl.training.optimizers import build_optimizer
from lpl.training.per_parameter import FusedBackward
from lpl.training.rehearsal import Rehearsal


def options(*flags: str) -> TrainConfig:
    return parse_train(["--resolution=64", "--train_batch_size=2", *flags])


def test_blueprint_of_sdxl_has_its_published_sizes() -> None:
    plan = blueprint(PUBLISHED)
    with torch.device("meta"):
        parts = [plan.denoiser(), plan.vae(), *plan.text_encoders()]
        shapes = {name: tuple(value.shape) for name, value in plan.text(3).items()}
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert sizes == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert shapes == {"prompt_embeds": (3, 77, 2048), "pooled": (3, 1280)}
    assert (plan.stride, plan.latent_channels) == (8, 4)


@pytest.mark.parametrize("flags", ["",
                                   "--mixed_precision=bf16 --rank=2 --lora_targets=all --use_dora",
                                   "--mixed_precision=bf16 --rank=2 --lora_targets=attention_mlp --lora_dropout=0.5",
                                   "--mixed_precision=bf16 --weights_dtype=bfloat16 --gradient_checkpointing",
                                   "--optimizer=adafactor --fused_backward_pass --max_grad_norm=0",
                                   "--mixed_precision=bf16 --weights_dtype=bfloat16 --fused_backward_pass "
                                   "--max_grad_norm=0",
                                   "--gradient_accumulation_steps=2", "--train_text_encoder --max_token_length=150",
                                   "--train_text_encoder --gradient_checkpointing",
                                   "--train_text_encoder --mixed_precision=bf16",
                                   "--train_text_encoder --mixed_precision=bf16 --gradient_checkpointing --rank=2",
                                   ])  # fmt: skip
def test_denoiser_counts_as_a_real_one(model: Path, flags: str) -> None:
    config = options(f"--pretrained_model_name_or_path={model}", *flags.split())
    plan_of = blueprint(model_configs(config.model), config.model)
    found = Rehearsal(plan_of, "cpu").denoiser(config)

    denoiser, half = plan_of.denoiser().requires_grad_(True), config.run.mixed_precision == "bf16"
    if config.model.rank is not None:
        add_lora(denoiser.to(torch.bfloat16), config.model, plan_of.lora_targets, 0)
    elif config.optim.weights_dtype == "bfloat16":
        denoiser.to(torch.bfloat16)
    if config.run.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    trained = [p for p in denoiser.train().parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p) if config.run.gradient_accumulation_steps > 1 else None
    fused = None
    if config.optim.fused_backward_pass:
        optimizer = build_optimizer(trained, config.optim, 1e-4)
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # its state is there
        optimizer.zero_grad()
        fused = FusedBackward(trained, optimizer)
    latents = torch.randn(2, 4, 16, 16)
    text = plan_of.text(2)
    timesteps, sizes = torch.zeros(2, dtype=torch.long), torch.zeros(2, 6)
    with StepCounter() as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = plan_of.denoise(denoiser, latents, timesteps, text, {"sizes": sizes})
        loss = diffusion_loss(output.float(), latents).mean()
        close = 0.01 if half else 0  # a kernel's statistics may have another precision than its description says
        assert (found.forward, found.kept) == pytest.approx((counter.peak, counter.live), rel=close)
        counter.reset_peak()
        if fused is None:
            loss.backward()
        else:
            fused(lambda value: value.backward(), loss, 1)
            close = 0.02  # norms and step counts
    assert found.backward == pytest.approx(counter.peak, rel=close)
    assert found.flops == counter.flops


def test_a_window_of_the_decoder_can_be_counted_on_a_cpu(plan_of: Any) -> None:
    whole, window = (Rehearsal(plan_of, "cpu").loss(options(*flags)) for flags in ((), ("--lpl_crop=16",)))
    assert 0 < window.flops < 0.6 * whole.flops
    assert window.peak < whole.peak


@pytest.mark.parametrize("flags", ["", "--lpl_checkpointing=true", "--lpl_num_blocks=1", "--lpl_dtype=bfloat16"])
def test_loss_counts_as_a_real_one(plan_of: Any, flags: str) -> None:
    config, space = options(*flags.split()), LatentSpace.identity()
    found = Rehearsal(plan_of, "cpu").loss(config)
    with StepCounter() as counter:
        vae = plan_of.vae()
        before = counter.live
        loss = build_loss(config, vae, space)
        assert found.copy == counter.live - before
    with StepCounter() as counter:
        loss(torch.randn(2, 4, 16, 16).requires_grad_(), torch.randn(2, 4, 16, 16))
    assert found.peak == pytest.approx(counter.peak, rel=0.02)
    assert found.flops == counter.flops // 2
    assert [name for name, *_ in found.taps] == [tap.name for tap in loss.taps]


def test_loss_does_not_grow_beyond_what_goes_through_the_decoder_at_once(plan_of: Any) -> None:
    rehearsal = Rehearsal(plan_of)
    sizes = [rehearsal.loss(options("--lpl_chunk=2", f"--train_batch_size={n}")) for n in (1, 2, 8)]
    assert sizes[0].peak < sizes[1].peak == sizes[2].peak
    assert rehearsal.loss(options("--lpl_max_samples=1")).peak == sizes[0].peak


def test_random_depth_costs_its_mean(plan_of: Any) -> None:
    rehearsal = Rehearsal(plan_of)
    full, random = rehearsal.loss(options()), rehearsal.loss(options("--lpl_random_depth"))
    assert random.flops < full.flops
    assert random.peak == full.peak
    crop = rehearsal.loss(options("--lpl_crop=32"))
    assert crop.peak < full.peak


def test_norms_run_in_float32_under_autocast_on_a_gpu(plan_of: Any) -> None:
    half = options("--mixed_precision=bf16")
    assert Rehearsal(plan_of, "cuda").denoiser(half).kept > Rehearsal(plan_of, "cpu").denoiser(half).kept
    full = options()
    assert Rehearsal(plan_of, "cuda").denoiser(full) == Rehearsal(plan_of, "cpu").denoiser(full)


def test_caching_holds_all_encoders_and_its_images(plan_of: Any) -> None:
    rehearsal = Rehearsal(plan_of)
    with torch.device("meta"):
        encoders = sum(p.numel() for part in plan_of.text_encoders() for p in part.parameters())
    weights = 4 * encoders + rehearsal.vae()
    small, large = (rehearsal.caching(options(f"--resolution={side}")) for side in (64, 256))
    assert weights < small < large
    assert large - weights > batch_of((3, 256, 256)) * 3 * 256 * 256 * 4
    assert rehearsal.caching(options("--train_batch_size=64")) == rehearsal.caching(options())
    assert min(rehearsal.validation(options())) > 0


def test_each_part_is_counted_once(plan_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = Rehearsal(plan_of)
    first = rehearsal.denoiser(options()), rehearsal.loss(options())

    def again(*_: Any) -> None:
        raise AssertionError("counted again")

    monkeypatch.setattr(StepCounter, "__enter__", again)
    assert (rehearsal.denoiser(options("--use_ema")), rehearsal.loss(options("--use_8bit_adam"))) == first
