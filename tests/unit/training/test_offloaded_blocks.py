"""Blocks whose frozen weights wait on the host: the same values, one block's copies at a time, nothing left behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import DEVICE, MixedDevicesError, stand_in
from tiny_models import BUILDS, tiny_flux, tiny_lumina2, tiny_sdxl
from torch import Tensor, nn

from lpl.base.errors import UserError
from lpl.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from lpl.families import blueprint, load_family, plan_configs
from lpl.training import offloaded
from lpl.training.checks import check_memory_options
from lpl.training.engine import add_lora
from lpl.training.launch import as_launched, check_launch
from lpl.training.quantized import quantize
from lpl.training.rehearsal import Rehearsal

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloaded, "LEAST", 0)


class Step:
    """A denoiser under a LoRA, recomputed block by block, and a step's input."""

    def __init__(self, folder: Path, **options: Any) -> None:
        config = ModelConfig(str(folder), rank=2, lora_targets="all", **options)
        family: Any = load_family(config, CPU, torch.float32)
        self.denoiser: Any = family.denoiser
        if config.quantize_base is not None:
            quantize(self.denoiser, config.quantize_base, CPU)
        add_lora(self.denoiser, config, family.lora_targets, 0)
        self.denoiser.enable_gradient_checkpointing()
        self.denoiser.train()
        self.plan = blueprint(plan_configs(config), config)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.denoiser.named_parameters() if p.requires_grad}

    def run(self, device: torch.device = CPU) -> list[Tensor]:
        """Output and gradients."""
        side = 16
        with torch.device("cpu"):
            text = self.plan.text(2)
            sizes = torch.zeros(2, 6)
        generator = torch.Generator().manual_seed(0)

        def there(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            filled = torch.randn(x.shape, generator=generator) if x.is_floating_point() else torch.ones_like(x)
            return filled.to(x.dtype).to(device)

        latents = there(torch.empty(2, self.plan.latent_channels, side, side)).requires_grad_()
        levels = torch.full((2,), 0.5 if self.plan.schedule.is_flow else 5).to(device)
        if not self.plan.schedule.is_flow:
            levels = levels.long()
        text = {name: there(x) for name, x in text.items()}
        output = self.plan.denoise(self.denoiser, latents, levels, text, {"sizes": there(sizes)})
        # The last block's captions lead nowhere in some.
        wanted = [latents, *self.trained.values()]
        return [output, *torch.autograd.grad(output.square().sum(), wanted, materialize_grads=True)]


class Copies:
    """Copies as a device would hold them, counted while they live."""

    def __init__(self) -> None:
        self.live = self.most = self.made = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self.made += copy.nbytes
        self.live += copy.nbytes
        self.most = max(self.most, self.live)
        weakref.finalize(copy.untyped_storage(), self._gone, copy.nbytes)
        return copy

    def _gone(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize("build", BUILDS)
def test_the_same_values_with_one_block_there_at_a_time_and_no_devices_mixed(
    build: Callable[[Path], Any], tmp_path: Path
) -> None:
    build(tmp_path / "model")
    step, copies = Step(tmp_path / "model"), Copies()
    wanted = step.run()
    before = {name: (id(p), p.data_ptr()) for name, p in step.denoiser.named_parameters()}
    blocks = offloaded.repeated_blocks(step.denoiser)
    waiting = offloaded.offload(step.denoiser, 1.0, copies)
    assert waiting
    assert not {id(p) for p in waiting} & {id(p) for p in step.trained.values()}
    found = step.run()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    largest = max(sum(p.nbytes for p in block.parameters() if not p.requires_grad) for block in blocks)
    refiners = 4 if build is tiny_lumina2 else 0  # blocks that diffusers does not run again: their copies stay
    assert 0 < copies.most <= largest * (1 + refiners)
    twice = 2 * sum(p.nbytes for p in waiting)  # forward, and once more where it is recomputed
    assert copies.made == twice or (refiners and copies.made < twice)
    assert copies.live == 0
    assert {name: (id(p), p.data_ptr()) for name, p in step.denoiser.named_parameters()} == before

    whole, parts = Step(tmp_path / "model"), Step(tmp_path / "model")
    offloaded.offload_to_host(parts.denoiser, 0.5, DEVICE)
    waiting = set(parts.denoiser._ddp_params_and_buffers_to_ignore)
    waits = []
    for each in (whole, parts):
        each.denoiser.to(DEVICE)
        with stand_in() as seen:
            each.run(DEVICE)
        waits.append(seen.waits)
    assert waiting
    assert all(p.is_meta != (name in waiting) for name, p in parts.denoiser.named_parameters())
    assert waits[0] == waits[1]  # the host waits for no copy


def test_without_the_copies_they_would_mix(tmp_path: Path) -> None:
    tiny_flux(tmp_path / "model")
    step = Step(tmp_path / "model")
    offloaded.offload(step.denoiser, 0.5, lambda tensor: tensor)
    step.denoiser.to(DEVICE)
    with stand_in(), pytest.raises(MixedDevicesError):
        step.run(DEVICE)


@pytest.mark.parametrize("options", [{"quantize_base": "int8"}, {"quantize_base": "nf4"}, {"use_dora": True}], ids=str)
def test_codes_and_magnitudes(options: dict[str, Any], tmp_path: Path) -> None:
    """The backward pass reads codes again, when the block's weights are back where they wait."""
    tiny_sdxl(tmp_path / "model")
    step = Step(tmp_path / "model", **options)
    wanted = step.run()
    offloaded.offload_to_host(step.denoiser, 1.0, DEVICE)
    step.denoiser.to(DEVICE)
    with stand_in():
        step.run(DEVICE)
    other = Step(tmp_path / "model", **options)
    offloaded.offload(other.denoiser, 1.0, torch.clone)
    assert all(torch.equal(a, b) for a, b in zip(wanted, other.run(), strict=True))


@pytest.mark.parametrize(("share", "number"), [(0.01, 1), (0.34, 2), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_a_share_of_the_blocks(share: float, number: int) -> None:
    class Model(nn.Module):
        _repeated_blocks = ("Block",)

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(2, 2, bias=False).requires_grad_(False) for _ in range(4)])

    class Block(nn.Linear):
        pass

    assert len(offloaded.offload(Model(), share, torch.clone)) == number


def test_a_denoiser_without_blocks_is_refused() -> None:
    class Model(nn.Linear):
        _repeated_blocks = _no_split_modules = ()

    with pytest.raises(UserError, match=r"--offload_blocks 0\.5: this denoiser has no repeated blocks"):
        offloaded.offload(Model(2, 2), 0.5, torch.clone)


def test_a_run_is_the_same_run(train_in: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained with an average, sampled between steps, continued with other shares."""
    plain_offload = offloaded.offload
    monkeypatch.setattr(offloaded, "offload", lambda denoiser, share, _: plain_offload(denoiser, share, torch.clone))
    options: dict[str, Any] = {
        "rank": 2,
        "gradient_checkpointing": True,
        "max_train_steps": 4,
        "use_ema": True,
        "validation_prompt": "a dog",
        "num_validation_images": 1,
        "validation_steps": 2,
    }
    plain = train_in(tmp_path / "plain", **options)
    train_in(tmp_path / "parts", offload_blocks=1.0, **(options | {"max_train_steps": 2}))
    parts = train_in(tmp_path / "parts", offload_blocks=0.3, **options)
    weights, other = plain.unet(), parts.unet()
    assert weights.keys() == other.keys()
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert plain.logged()["diffusion_loss"] == parts.logged()["diffusion_loss"]


def test_a_plan_counts_what_stays_and_what_comes(model: Path) -> None:
    options = {"pretrained_model_name_or_path": str(model), "rank": 4}
    configs = [
        TrainConfig(
            model=ModelConfig(**options, offload_blocks=share),
            run=RunConfig(gradient_checkpointing=True, mixed_precision="no"),
            data=DataConfig(resolution=32),
        )
        for share in (None, 1.0)
    ]
    whole, parts = (Rehearsal(blueprint(plan_configs(c.model), c.model)) for c in configs)
    there, left = whole.parameters(configs[0]), parts.parameters(configs[1])
    denoiser: Any = load_family(configs[1].model, CPU, torch.float32).denoiser
    waiting = offloaded.offload(denoiser.requires_grad_(False), 1.0, torch.clone)
    assert left.waiting == sum(p.nbytes for p in waiting) > 0 == there.waiting
    assert there.size == left.size + left.waiting
    costs = [r.denoiser(c) for r, c in zip((whole, parts), configs, strict=True)]
    largest = max(
        sum(p.nbytes for p in block.parameters() if not p.requires_grad)
        for block in offloaded.repeated_blocks(denoiser)
    )
    assert costs[0].flops == costs[1].flops
    assert costs[0].kept == costs[1].kept
    assert costs[0].forward < costs[1].forward + 1 <= costs[0].forward + largest + 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(model=ModelConfig("m", offload_blocks=1.0)), "--offload_blocks 1 without --rank"),
        (
            TrainConfig(model=ModelConfig("m", rank=2, offload_blocks=0.5)),
            r"--offload_blocks 0\.5 without --gradient_checkpointing: all copies would be kept",
        ),
        (
            TrainConfig(
                model=ModelConfig("m", rank=2, offload_blocks=0.5),
                run=RunConfig(gradient_checkpointing=True, compile_denoiser=True),
            ),
            r"--offload_blocks 0\.5 with --compile_denoiser",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_memory_options(config)


def test_split_blocks_are_refused() -> None:
    config = TrainConfig(model=ModelConfig("m", rank=4, offload_blocks=1.0))
    with as_launched(2, True), pytest.raises(UserError, match=r"--offload_blocks 1\.0: FSDP2 splits"):
        check_launch(config)
