"""Text encoders that are trained: what moves, how fast, what is cached, and what images are made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

import lpl.families.sdxl as sdxl
from lpl.config import ModelConfig
from lpl.data.filling import Caches, caption_key
from lpl.diffusion.draws import keyed_seed
from lpl.families import load_family

ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("unet", *ENCODERS)
TEXT = {"train_text_encoder": True}


def pipeline_of(folder: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights_of(pipeline: Any) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": p.detach() for part in PARTS for name, p in getattr(pipeline, part).named_parameters()}


def changes(run: Any, model: Path) -> dict[str, torch.Tensor]:
    before = weights_of(pipeline_of(model))
    return {name: value - before[name] for name, value in weights_of(pipeline_of(run.folder)).items()}


def moved(run: Any, model: Path) -> set[str]:
    return {name for name, change in changes(run, model).items() if change.abs().max() > 0}


def first_loss(run: Any) -> float:
    return float(run.logged()["diffusion_loss"][1])


@pytest.mark.parametrize(("clip_skip", "idle_layers"), [(None, {3}), (1, {2, 3})])
def test_all_three_move_but_for_what_no_output_depends_on(
    train: Any, deep: Path, clip_skip: int | None, idle_layers: set[int]
) -> None:
    run = train(**TEXT, pretrained_model_name_or_path=deep, clip_skip=clip_skip, checkpointing_steps=2)
    found, every = moved(run, deep), set(weights_of(pipeline_of(deep)))
    idle = tuple(f"text_encoder.encoder.layers.{layer}." for layer in idle_layers)
    expected = {n for n in every if not n.startswith((*idle, "text_encoder.final_layer_norm"))}
    assert found == expected
    assert {n.split(".")[0] for n in found} == set(PARTS)
    # An optimizer keeps moments of what has had a gradient; a trained tensor without one would break DDP.
    trained, moments = run.checkpoint(2, "model"), run.checkpoint(2, "optimizer")
    assert set(trained) == expected
    assert sum(name.endswith("exp_avg_sq") for name in moments) == len(trained)
    saved = weights_of(pipeline_of(run.folder))
    assert all(torch.equal(saved[name], value) for name, value in trained.items())


@pytest.mark.parametrize("which", ["tiny", "deep"])
def test_training_starts_from_the_embeddings_that_are_cached_else(
    train: Any, model: Path, deep: Path, which: str
) -> None:
    """tiny takes zeros for an empty caption, deep does not; a dropped caption is among the first sixteen."""
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": {"tiny": model, "deep": deep}[which],
        "proportion_empty_prompts": 0.4,
        "max_token_length": 150,
        "clip_skip": None if which == "tiny" else 1,
        "train_batch_size": 16,
        "max_train_steps": 1,
    }
    frozen = train(**options, output="frozen")
    run = train(**options, **TEXT)
    assert first_loss(run) == pytest.approx(first_loss(frozen), rel=1e-6)
    assert run.logged()["gradient_norm"][1] > frozen.logged()["gradient_norm"][1]
    never = train(**options | {"proportion_empty_prompts": 0.0}, output="never")
    assert abs(first_loss(never) / first_loss(frozen) - 1) > 1e-5


def test_a_first_step_is_as_long_as_its_components_rate(train: Any, model: Path) -> None:
    """AdamW's first update is the rate times the gradient's sign, where the gradient is far above epsilon."""
    options = TEXT | {"max_train_steps": 1, "adam_weight_decay": 0.0, "adam_epsilon": 1e-20, "learning_rate": 1e-2}
    cases = [
        ({}, (1e-2, 1e-2)),
        ({"text_encoder_lr": 1e-3}, (1e-3, 1e-3)),
        ({"text_encoder_2_lr": 1e-3}, (1e-2, 1e-3)),
        ({"text_encoder_lr": 1e-3, "text_encoder_2_lr": 2e-3}, (1e-3, 2e-3)),
    ]
    for number, (given, rates) in enumerate(cases):
        run = train(**options | given, output=f"run{number}")
        steps = changes(run, model)
        for part, rate in zip(PARTS, (1e-2, *rates), strict=True):
            sizes = torch.cat([s.flatten() for n, s in steps.items() if n.startswith(f"{part}.")]).abs()
            median = float(sizes[sizes > 0].median())
            assert median == pytest.approx(rate, rel=1e-2), (given, part)
        logged = run.logged()
        assert logged["learning_rate"][1] == pytest.approx(1e-2)
        assert [logged[f"learning_rate/{part}"][1] for part in ENCODERS] == pytest.approx(rates)


@pytest.mark.parametrize("extra", [{}, {"decay_all": True}])
def test_rates_follow_the_schedule_and_scale(train: Any, extra: dict[str, Any]) -> None:
    run = train(
        **TEXT, **extra, max_train_steps=4, lr_scheduler="linear", lr_warmup_steps=2, scale_lr=True,
        train_batch_size=2, gradient_accumulation_steps=2, text_encoder_lr=1e-4, text_encoder_2_lr=1e-5,
    )  # fmt: skip
    logged = run.logged()
    factors = [0.5, 1.0, 0.5, 0.0]
    for name, rate in (("", 1e-3), ("/text_encoder", 1e-4), ("/text_encoder_2", 1e-5)):
        assert list(logged[f"learning_rate{name}"].values()) == pytest.approx([4 * rate * f for f in factors])
    frozen = train(max_train_steps=1, output="frozen")
    assert [name for name in frozen.logged() if name.startswith("learning_rate/")] == []


@pytest.mark.parametrize("optimizer", ["adafactor", "prodigy", "schedulefree_adamw", "torch.optim.SGD"])
def test_every_optimizer_trains_them(train: Any, model: Path, optimizer: str) -> None:
    for module in {"prodigy": ["prodigyopt"], "schedulefree_adamw": ["schedulefree"]}.get(optimizer, []):
        pytest.importorskip(module)
    rates = {"learning_rate": None} if optimizer == "prodigy" else {"text_encoder_lr": 1e-2, "learning_rate": 1e-2}
    options = TEXT | {"optimizer": optimizer, "checkpointing_steps": 2, "lr_scheduler": "constant"} | rates
    whole = train(**options, max_train_steps=4, output="whole")
    assert {name.split(".")[0] for name in moved(whole, model)} == set(PARTS)
    train(**options, max_train_steps=2)
    resumed = train(**options, max_train_steps=4)
    a, b = weights_of(pipeline_of(whole.folder)), weights_of(pipeline_of(resumed.folder))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("rank", [None, 2])
def test_checkpointing_recomputes_the_encoders_and_changes_nothing(
    train: Any, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    options = TEXT | {"rank": rank, "learning_rate": 1e-2}
    plain = train(**options, output="plain")
    runs: dict[str, list[int]] = {}
    for saving in (False, True):
        count = runs[str(saving)] = [0]
        from transformers.models.clip.modeling_clip import CLIPMLP

        original = CLIPMLP.forward

        def counted(self: Any, *args: Any, _count: list[int] = count, _original: Any = original) -> Any:
            _count[0] += torch.is_grad_enabled()
            return _original(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(CLIPMLP, "forward", counted)
            run = train(**options, gradient_checkpointing=saving, output=f"saving-{saving}")
        for name, values in plain.losses().items():
            assert list(run.losses()[name].values()) == pytest.approx(list(values.values()), rel=1e-5), name
    # Two steps through 2 + 2 layers, of which CLIP-L's last one is not recomputed: nothing needs it.
    assert runs == {"False": [8], "True": [14]}


def test_half_precision_trains_float32_weights(train: Any, model: Path) -> None:
    plain, half = (train(**TEXT, mixed_precision=p, checkpointing_steps=2, output=p) for p in ("no", "bf16"))
    assert {value.dtype for value in half.checkpoint(2, "model").values()} == {torch.float32}
    assert first_loss(half) == pytest.approx(first_loss(plain), rel=0.05)
    assert first_loss(half) != first_loss(plain)
    assert moved(half, model) == moved(plain, model)
    lora = train(**TEXT, rank=2, mixed_precision="bf16", learning_rate=1e-2, output="lora")
    assert {value.dtype for value in lora.unet().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_cached_whole_in_every_precision(
    run_cli: Any, as_flags: Any, train: Any, base_options: dict[str, Any], model: Path, tmp_path: Path, dtype: str
) -> None:
    options = TEXT | {"latent_cache_dir": tmp_path / "cache", "cache_dtype": dtype, "max_token_length": 150}
    code, _, err = run_cli(["cache", *as_flags({"output_dir": tmp_path / "out", **base_options, **options})])
    assert code == 0, err
    caption = "picture 1 of a pattern"
    family = load_family(ModelConfig(str(model), max_token_length=150, **TEXT), torch.device("cpu"), torch.float32)
    text = Caches.open(tmp_path / "cache", family, dtype).text
    found = text.gather([caption_key(caption)])
    assert {name: (value.dtype, value.ndim) for name, value in found.items()} == {
        "input_ids": (torch.int32, 3), "input_ids_2": (torch.int32, 3), "is_empty": (torch.int32, 1),
    }  # fmt: skip
    tokenizer = pipeline_of(model).tokenizer
    length = tokenizer.model_max_length
    expected = tokenizer(caption, padding="max_length", max_length=length, truncation=True).input_ids
    assert found["input_ids"][0, 0].tolist() == expected
    assert max(expected) > 256  # beyond what bfloat16 holds
    assert found["input_ids"].shape[1] == 2
    assert found["is_empty"].tolist() == [0]
    assert family.entry_bytes(16, 16)[1] == sum(value.nbytes for value in found.values())
    # Nothing is left to encode, and weights do not enter the key: other encoders' tokens are the same.
    (folder,) = (tmp_path / "cache" / "text").iterdir()
    train(**options)
    assert [p.name for p in (tmp_path / "cache" / "text").iterdir()] == [folder.name]


@pytest.mark.parametrize("kind", ["raw", "ema", "lora"])
def test_images_are_made_with_the_text_encoders_of_then(
    train: Any, model: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(sdxl.SDXL, "steps", 2)
    decoded: list[Any] = []
    decode = sdxl.SDXL.decode
    monkeypatch.setattr(sdxl.SDXL, "decode", lambda self, raw: (decoded.append(decode(self, raw)), decoded[-1])[1])
    options: dict[str, Any] = {
        "raw": {},
        "ema": {"use_ema": True, "ema_decay": 0.5},
        "lora": {"rank": 2, "lora_targets": "all"},
    }[kind]
    run = train(
        **TEXT, **options, max_train_steps=4, learning_rate=1e-2, text_encoder_lr=3e-2, validation_prompt="a pattern",
        num_validation_images=1, validation_steps=4,
    )  # fmt: skip
    pipeline = pipeline_of(model if kind == "lora" else run.folder)
    if kind == "lora":
        pipeline.load_lora_weights(run.folder)
    assert len(decoded) == (4 if kind == "ema" else 2)
    shown = np.asarray(decoded[-1]).astype(int)

    def image(pipeline: Any) -> Any:
        generator = torch.Generator().manual_seed(keyed_seed(0, "validation_image", 0, 0))
        size = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": sdxl.SDXL.guidance}
        return np.asarray(pipeline("a pattern", generator=generator, **size).images[0]).astype(int)

    assert abs(image(pipeline) - shown).max() <= 1
    untrained = pipeline_of(model)
    if kind == "lora":
        for part in ENCODERS:
            getattr(pipeline, part).disable_adapters()
    else:
        for part in ENCODERS:
            setattr(pipeline, part, getattr(untrained, part))
    assert abs(image(pipeline) - shown).max() > 1


def test_weights_beside_the_checkpoints_have_the_encoders(train: Any) -> None:
    run = train(**TEXT, use_ema=True, ema_decay=0.5, save_steps=2, checkpointing_steps=2)
    for kind, part in (("raw", "model"), ("ema", "ema")):
        folder, expected = run.folder / "saved-2" / kind, run.checkpoint(2, part)
        assert sorted(p.name for p in folder.iterdir()) == sorted(PARTS)
        for name in ENCODERS:
            saved = load_file(folder / name / "model.safetensors")
            own = {key.removeprefix(f"{name}."): v for key, v in expected.items() if key.startswith(f"{name}.")}
            assert len(own) >= 18
            for key, value in own.items():
                assert torch.equal(saved[key], value), key
    assert json.loads((run.folder / "saved-2" / "weights.json").read_text())["final"] == "ema"


@pytest.mark.parametrize("rank", [None, 2])
def test_a_plan_counts_the_encoders(train: Any, deep: Path, rank: int | None) -> None:
    options: dict[str, Any] = {"pretrained_model_name_or_path": deep, "rank": rank, "lora_targets": "all"}
    options["checkpointing_steps"] = 2
    run = train(**TEXT, **options, text_encoder_2_lr=1e-5)
    count = sum(value.numel() for value in run.checkpoint(2, "model").values())
    plans = [
        train("--dry_run", **more, **options, text_encoder_2_lr=1e-5, output=f"plan{n}")
        for n, more in enumerate(({}, TEXT))
    ]
    kind = "LoRA of rank 2 on " if rank else "the whole UNet and 2 text encoders)"
    assert f"trains       {count:,} parameters ({kind}" in plans[1].stdout
    sizes = [
        {line[2:24].strip(): float(line[24:].split()[0]) for line in plan.stdout.splitlines() if line.startswith("  ")
         and line.endswith("MiB")} for plan in plans
    ]  # fmt: skip
    assert sizes[1]["UNet and text weights"] > sizes[0]["UNet weights"]
    assert sizes[1]["their activations"] > sizes[0]["UNet activations"]
    for row, each in (("gradients", 4), ("AdamW state", 8)):
        assert sizes[1][row] == pytest.approx(each * count / 2**20, abs=0.06)
    assert "rate         0.001, constant" in plans[0].stdout
    assert "rate         0.001, text_encoder 0.001, text_encoder_2 1e-05, constant" in plans[1].stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_dora": True, "rank": 2}, "--use_dora with --train_text_encoder"),
        ({"text_encoder_lr": 0}, "--text_encoder_lr must be positive, not 0"),
        ({"text_encoder_2_lr": "inf"}, "--text_encoder_2_lr must be a finite number, not inf"),
        (
            {"text_encoder_lr": 0.5, "optimizer": "prodigy", "learning_rate": None},
            "--text_encoder_lr 0.5 with --optimizer prodigy, which finds one rate for all",
        ),
        ({"rank": 2, "clip_skip": 1}, "--clip_skip 1 with --train_text_encoder: no layer of the model's text_encoder"),
    ],
)
def test_what_cannot_be_is_refused(train: Any, options: dict[str, Any], expected: str) -> None:
    run = train(**TEXT | options, expect_error=True)
    assert len(run.errors) == 1
    assert expected in run.errors[0]


def test_rates_without_the_encoders_have_no_effect(train: Any) -> None:
    run = train(text_encoder_lr=1e-4, text_encoder_2_lr=1e-5, max_train_steps=1)
    for name in ("text_encoder_lr", "text_encoder_2_lr"):
        assert f"--{name} has no effect without --train_text_encoder" in run.stderr


def test_blocks_of_all_three_are_what_fsdp_splits(model: Path) -> None:
    denoiser = load_family(ModelConfig(str(model), **TEXT), torch.device("cpu"), torch.float32).denoiser
    assert {"BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"} <= set(denoiser._no_split_modules)
    assert set(denoiser._no_split_modules) <= {type(module).__name__ for module in denoiser.modules()}
