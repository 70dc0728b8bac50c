"""LoRA and DoRA: what is trained, what a run leaves, and that diffusers loads all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lpl.config import ModelConfig
from lpl.families import sdxl
from lpl.families.sdxl_names import LORA_TARGETS
from lpl.training.engine import add_lora

LAYERS = {"attention": 32, "attention_mlp": 40, "all": 79}
"""How many of the tiny model's layers: in four transformers, 8 attention projections each, and 2 matrices of the MLP;
with 2 projections more each, 8 resnets of 3 layers, 5 of them with a shortcut, and 2 convolutions between blocks."""
MERGED = "pytorch_lora_weights.safetensors"


def pipeline_of(model: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, add_watermarker=False)


def layers_of(unet: Any, preset: str) -> list[str]:
    """The layers that a preset is to reach, found by kind and place instead of by name."""
    found = []
    for name, module in unet.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or name.count(".") < 3:
            continue  # conv_in, conv_out and the embeddings lie outside the blocks
        attention, mlp = ".attn" in name, ".ff." in name
        if preset == "all" or attention or (mlp and preset == "attention_mlp"):
            found.append(name)
    return found


def unet_output(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    conditions = {"text_embeds": draw(2, 16), "time_ids": torch.full((2, 6), 16.0)}
    with torch.no_grad():
        return unet(draw(2, 4, 4, 4), torch.tensor([10, 700]), draw(2, 5, 24), added_cond_kwargs=conditions).sample


@pytest.mark.parametrize(
    ("preset", "use_dora"),
    [*(pytest.param(name, False, marks=pytest.mark.slow) for name in ("attention", "attention_mlp")), ("all", True)],
)
def test_every_tensor_arrives(
    train: Any, model: Path, monkeypatch: pytest.MonkeyPatch, preset: str, use_dora: bool
) -> None:
    trained: list[torch.Tensor] = []
    original = sdxl.SDXL.export_lora

    def spy(self: Any, denoiser: Any, folder: Path) -> None:
        trained.append(unet_output(denoiser.eval()))
        original(self, denoiser, folder)

    monkeypatch.setattr(sdxl.SDXL, "export_lora", spy)
    run = train(rank=2, lora_alpha=5, lora_targets=preset, use_dora=use_dora, learning_rate=1e-2, max_train_steps=3)
    saved = load_file(run.folder / MERGED)
    pipeline = pipeline_of(model)
    layers, before = layers_of(pipeline.unet, preset), unet_output(pipeline.unet.eval())
    assert len(layers) == LAYERS[preset]
    assert {name.removeprefix("unet.").split(".lora_")[0] for name in saved} == set(layers)
    assert len(saved) == (3 if use_dora else 2) * len(layers)
    pipeline.load_lora_weights(run.folder)
    loaded = {name: value for name, value in pipeline.unet.named_parameters() if "lora_" in name}
    assert len(loaded) == len(saved)
    assert {config.lora_alpha for config in pipeline.unet.peft_config.values()} == {5}
    for name, value in saved.items():
        side = name.removeprefix("unet.").replace(".weight", "")
        assert torch.equal(loaded[f"{side}.default_0.weight"].flatten(), value.flatten()), name
    torch.testing.assert_close(unet_output(pipeline.unet.eval()), trained[0], rtol=1e-5, atol=1e-5)
    assert (trained[0] - before).abs().max() > 1e-3
    plan = train(
        "--dry_run", rank=2, lora_alpha=5, lora_targets=preset, use_dora=use_dora, max_train_steps=3, output="plan"
    )
    count = sum(value.numel() for value in saved.values())
    assert f"trains       {count:,} parameters ({'DoRA' if use_dora else 'LoRA'} of rank 2 on 68,188)" in plan.stdout


def test_alpha_over_rank_scales_the_adapter(model: Path) -> None:
    """W x + (alpha / rank) B A x, by hand."""
    outputs = {}
    for alpha in (None, 6.0):
        unet = pipeline_of(model).unet
        add_lora(unet, ModelConfig(rank=4, lora_alpha=alpha), LORA_TARGETS, 0)
        layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert up.abs().sum() == 0
        assert 0.5 < float(down.detach().std()) * 4 < 1.5
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(2)))
            outputs[alpha] = layer(x)
            factor = 1.0 if alpha is None else 1.5
            expected = layer.base_layer(x) + factor * x @ down.T @ up.T
        torch.testing.assert_close(outputs[alpha], expected)
    assert not torch.allclose(outputs[None], outputs[6.0])


def test_metadata_say_alpha(train: Any) -> None:
    for alpha, expected in ((None, 3), (1.5, 1.5)):
        run = train(rank=3, lora_alpha=alpha, max_train_steps=1, output=f"alpha-{alpha}")
        with safe_open(run.folder / MERGED, "pt") as content:
            adapter = json.loads(content.metadata()["lora_adapter_metadata"])
        assert (adapter["unet.lora_alpha"], adapter["unet.r"]) == (expected, 3)


@pytest.mark.slow
def test_dropout_is_a_function_of_the_step(train: Any, model: Path) -> None:
    options = {"rank": 2, "lora_dropout": 0.5, "learning_rate": 1e-2, "max_train_steps": 4, "use_lpl": False}
    plain = train(**options | {"lora_dropout": 0.0}, output="plain")
    first, second = (train(**options, checkpointing_steps=2, output=name) for name in ("first", "second"))
    assert first.losses() == second.losses()
    assert first.losses()["diffusion_loss"][4] != plain.losses()["diffusion_loss"][4]
    # In evaluation nothing is dropped.
    unet = pipeline_of(model).unet
    add_lora(unet, ModelConfig(rank=2, lora_dropout=0.5), LORA_TARGETS, 0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    assert torch.equal(unet_output(unet.eval()), unet_output(unet))
    assert not torch.equal(unet_output(unet.train()), unet_output(unet))


@pytest.mark.parametrize("use_dora", [False, True])
def test_half_precision_trains_a_float32_adapter(train: Any, use_dora: bool) -> None:
    options = {"rank": 2, "lora_targets": "all", "use_dora": use_dora, "lora_dropout": 0.3, "learning_rate": 1e-2}
    plain = train(**options, mixed_precision="bf16", lora_alpha=4, output="plain")
    assert {value.dtype for value in plain.unet().values()} == {torch.float32}
    saving = train(**options, mixed_precision="bf16", lora_alpha=4, gradient_checkpointing=True, output="saving")
    # Recomputing a block drops the same inputs again.
    for name, value in plain.losses().items():
        assert list(saving.losses()[name].values()) == pytest.approx(list(value.values()), rel=1e-3), name


@pytest.mark.parametrize("use_dora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_resumed_run_ends_as_the_whole_one(train: Any, use_dora: bool) -> None:
    options = {
        "rank": 2, "lora_alpha": 4, "lora_dropout": 0.3, "lora_targets": "all", "use_dora": use_dora, "use_ema": True,
        "checkpointing_steps": 2, "learning_rate": 1e-2,
    }  # fmt: skip
    whole = train(**options, max_train_steps=4, output="whole")
    train(**options, max_train_steps=2, output="halves")
    halves = train(**options, max_train_steps=4, output="halves")
    for part in ("model", "optimizer", "ema"):
        expected, found = whole.checkpoint(4, part), halves.checkpoint(4, part)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], part
    assert any("magnitude" in name for name in whole.checkpoint(4, "model")) == use_dora
    changed = train(**options | {"lora_alpha": 8}, max_train_steps=4, output="halves", expect_error=True)
    assert "--lora_alpha 4.0 -> 8.0" in changed.errors[0]
    other = train(
        **options | {"use_dora": not use_dora}, max_train_steps=4, output="other", expect_error=True,
        resume_from_checkpoint=whole.folder / "checkpoint-4",
    )  # fmt: skip
    assert "holds other parameters" in other.errors[0]


def test_dora_starts_as_the_model_itself(model: Path) -> None:
    unet = pipeline_of(model).unet.eval()
    before = unet_output(unet)
    add_lora(unet, ModelConfig(rank=2, lora_targets="all", use_dora=True), LORA_TARGETS, 0)
    torch.testing.assert_close(unet_output(unet.eval()), before, rtol=1e-5, atol=1e-5)


def test_options_without_rank_have_no_effect(train: Any) -> None:
    run = train(lora_alpha=4, lora_targets="all", lora_dropout=0.5, use_dora=True, max_train_steps=1)
    for name in ("lora_alpha", "lora_targets", "lora_dropout", "use_dora"):
        assert f"--{name} has no effect without --rank" in run.stderr
    assert not (run.folder / MERGED).exists()


@pytest.mark.parametrize(
    ("option", "value"), [("lora_alpha", 0), ("lora_alpha", "inf"), ("lora_dropout", 1), ("lora_dropout", -0.1)]
)
def test_impossible_values_are_refused(train: Any, option: str, value: Any) -> None:
    failed = train(rank=2, expect_error=True, **{option: value})
    assert failed.errors[0].startswith(f"error: --{option} must")
