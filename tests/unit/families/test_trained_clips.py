"""CLIPs that are trained beside a T5 that stays frozen: what moves, what is cached, written and resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_models import randomize

from lpl.config import DataConfig, ModelConfig, TrainConfig
from lpl.diffusion.draws import keyed_seed
from lpl.families import KINDS, blueprint, kind_of, load_family, plan_configs
from lpl.training.rehearsal import Rehearsal
from lpl.training.trainer import Trainer

CPU = torch.device("cpu")
LORA = "pytorch_lora_weights.safetensors"
TEXT = {"train_text_encoder": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("tiny_sd3", {}),
    "sd3 without a T5": ("tiny_sd3", {"t5": False}),
    "flux": ("tiny_flux", {}),
}
PROMPT = "picture 3 of a pattern"
READ_BY_COMFYUI = re.compile(
    r"text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.lora_[AB]\.weight"
)
"""Names of CLIPs' layers that its model_lora_keys_clip knows, whatever the model."""


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build, settings = FAMILIES[request.param]
    return Path(getattr(tiny_models, build)(tmp_path_factory.mktemp("clips") / "model", **settings))


@pytest.fixture
def train_it(train: Any, folder: Path) -> Callable[..., Any]:
    return lambda *argv, **options: train(*argv, pretrained_model_name_or_path=folder, **TEXT | options)


def clips_of(folder: Path) -> tuple[str, ...]:
    return kind_of(ModelConfig(str(folder))).trained_text


def pipeline_of(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part in ("text_encoder_3", "tokenizer_3") if index.get(part) == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **absent)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae_scale_factor = 4
    return pipeline


def parameters_of(pipeline: Any) -> dict[str, torch.Tensor]:
    networks = {part: net for part, net in pipeline.components.items() if isinstance(net, torch.nn.Module)}
    return {f"{part}.{name}": p.detach() for part, net in networks.items() for name, p in net.named_parameters()}


def embeddings(pipeline: Any) -> list[torch.Tensor]:
    """Of the tokens, and pooled; not zeros for the places of tokens."""
    prompts, alone = [PROMPT, None], {}
    if hasattr(pipeline, "text_encoder_3"):
        prompts, alone = [PROMPT, None, None], {"do_classifier_free_guidance": False}
    with torch.no_grad():
        found = pipeline.encode_prompt(*prompts, **alone)
    return [value for value in found if torch.is_tensor(value) and value.any()]


def drawn(pipeline: Any, seed: int = 0) -> Any:
    options: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2}
    scale = 3.5 if type(pipeline).__name__ == "FluxPipeline" else 4.5
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline(PROMPT, guidance_scale=scale, generator=generator, **options).images[0]).astype(int)


def test_the_clips_move_and_nothing_else_does(train_it: Any, folder: Path) -> None:
    run = train_it(checkpointing_steps=2)
    before, after = parameters_of(pipeline_of(folder)), parameters_of(pipeline_of(run.folder))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"transformer", *clips_of(folder)}
    assert {name for name in after if name.startswith(tuple(f"{part}." for part in clips_of(folder)))} <= moved
    # An optimizer keeps moments of what has had a gradient; a trained tensor without one would break DDP.
    weights, moments = run.checkpoint(2, "model"), run.checkpoint(2, "optimizer")
    assert set(weights) >= moved
    assert sum(name.endswith("exp_avg_sq") for name in moments) == len(weights)
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_training_starts_from_the_embeddings_that_are_cached_else(train_it: Any) -> None:
    """A dropped caption is among the first sixteen."""
    options = {"proportion_empty_prompts": 0.4, "train_batch_size": 16, "max_train_steps": 1}
    frozen, run = (train_it(**options, train_text_encoder=own, output=f"{own}") for own in (False, True))
    first = [own.logged()["diffusion_loss"][1] for own in (run, frozen)]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    assert run.logged()["gradient_norm"][1] > frozen.logged()["gradient_norm"][1]
    never = train_it(**options | {"proportion_empty_prompts": 0.0}, output="never")
    assert abs(never.logged()["diffusion_loss"][1] / first[0] - 1) > 1e-6


def test_what_is_cached_is_tokens_and_what_the_t5_made(folder: Path, tmp_path: Path) -> None:
    """Other CLIPs' tokens are the same; another T5's hidden states are not."""
    other = Path(tmp_path / "other")
    pipeline = pipeline_of(folder)
    for part in clips_of(folder):
        randomize(getattr(pipeline, part), 5)
    pipeline.save_pretrained(other)
    keys = []
    for path in (folder, other):
        for options in ({}, TEXT):
            family: Any = load_family(ModelConfig(str(path), **options), CPU, torch.float32, encoders_only=True)
            keys.append(family.text_key)
    frozen, tokens, other_frozen, other_tokens = keys
    assert tokens == other_tokens
    assert len({frozen, tokens, other_frozen}) == 3
    t5 = kind_of(ModelConfig(str(folder))).networks[-1]
    found = family.encode_text([PROMPT, ""])
    length = pipeline.tokenizer.model_max_length
    ids = pipeline.tokenizer([PROMPT, ""], padding="max_length", max_length=length, truncation=True).input_ids
    assert found["input_ids"].tolist() == ids
    assert found["input_ids"].dtype == torch.int32
    floats = {name for name, value in found.items() if value.is_floating_point()}
    assert floats == ({"long_embeds"} if getattr(pipeline, t5) is not None else set())
    assert family.entry_bytes(16, 16)[1] == sum(4 * value[0].numel() for value in found.values())
    if floats:
        randomize(getattr(pipeline, t5), 5)
        pipeline.save_pretrained(other)
        again: Any = load_family(ModelConfig(str(other), **TEXT), CPU, torch.float32, encoders_only=True)
        assert again.text_key != tokens


@pytest.mark.parametrize("which", ["attention", "all"])
def test_a_lora_arrives_whole_and_does_what_it_did(
    train_it: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    kind, seen = kind_of(ModelConfig(str(folder))), []
    cls = kind.find("Model")
    export = cls.export_lora

    def spy(self: Any, denoiser: Any, into: Path) -> None:
        self.prepare_prompt(PROMPT)
        seen.append(self.prompt_of(denoiser.eval(), PROMPT, ""))
        export(self, denoiser, into)

    monkeypatch.setattr(cls, "export_lora", spy)
    options = {"rank": 2, "lora_alpha": 5, "lora_targets": which, "learning_rate": 1e-2, "max_train_steps": 3}
    run = train_it(**options, checkpointing_steps=3)
    saved, pipeline = load_file(run.folder / LORA), pipeline_of(folder)
    before = embeddings(pipeline)
    of_text = {name for name in saved if not name.startswith("transformer.")}
    assert len(of_text) == 2 * 2 * len(clips_of(folder)) * (4 if which == "attention" else 6)
    assert [name for name in of_text if not READ_BY_COMFYUI.fullmatch(name)] == []
    pipeline.load_lora_weights(run.folder)
    arrived = {name: value for name, value in parameters_of(pipeline).items() if "lora_" in name}
    assert len(arrived) == len(saved) == len(run.checkpoint(3, "model"))
    for name, value in arrived.items():
        assert value.any() or name.startswith("transformer."), name
    assert {name.split(".")[0] for name in arrived} == {"transformer", *clips_of(folder)}
    for part in ("transformer", *clips_of(folder)):
        (adapter,) = getattr(pipeline, part).peft_config.values()
        assert adapter.lora_alpha == adapter.r == 2  # alpha is in the weights
    own = {name: value for name, value in seen[-1].items() if not name.startswith("negative_") and value.any()}
    after = embeddings(pipeline)
    assert len(own) == len(after) == len(before) == 2
    for found, theirs in zip(own.values(), after, strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-6)
    assert max((a - b).abs().max() for a, b in zip(after, before, strict=True)) > 1e-3
    # A run that begins with the file, and learns nothing, leaves it as it is, text encoders included.
    still = {"learning_rate": 1e-30, "adam_weight_decay": 0, "max_train_steps": 1, "use_lpl": False}
    again = train_it(lora_weights=run.folder / LORA, train_text_encoder=False, output="again", **still)
    for name, value in load_file(again.folder / LORA).items():
        torch.testing.assert_close(value, saved[name], rtol=1e-6, atol=1e-8)


def test_a_checkpoint_and_a_merged_model_are_the_same_lora(
    train_it: Any, folder: Path, run_cli: Any, tmp_path: Path
) -> None:
    run = train_it(rank=2, lora_alpha=5, learning_rate=1e-2, checkpointing_steps=2)
    for source, into in ((run.folder, "last"), (run.folder / "checkpoint-2", "checkpoint")):
        code, _, err = run_cli(["export", str(source), "--to", "diffusers", "--output", str(tmp_path / into)])
        assert code == 0, err
    last, checkpoint = (parameters_of(pipeline_of(tmp_path / into)) for into in ("last", "checkpoint"))
    assert all(torch.equal(checkpoint[name], value) for name, value in last.items())
    base, saved = parameters_of(pipeline_of(folder)), load_file(run.folder / LORA)
    changed = {name for name, value in last.items() if not torch.equal(value, base[name])}
    of_text = [name for name in changed if not name.startswith("transformer.")]
    assert len(of_text) == sum(name.endswith("lora_A.weight") for name in saved if not name.startswith("transformer."))
    name = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
    ending = "encoder.layers.1.self_attn.q_proj.weight"
    plain = next(own for own in changed if own.startswith("text_encoder.") and own.endswith(ending))
    delta = saved[f"{name}.lora_B.weight"] @ saved[f"{name}.lora_A.weight"]
    torch.testing.assert_close(last[plain], base[plain] + delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_five_steps_are_those_of_a_run_that_resumed_after_three(
    train_it: Any, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    options: dict[str, Any] = {
        "max_train_steps": 5, "checkpointing_steps": 3, "learning_rate": 1e-2, "text_encoder_lr": 2e-3,
        "proportion_empty_prompts": 0.3,
    }  # fmt: skip
    options |= {
        "full": {"use_ema": True, "ema_decay": 0.9},
        "lora": {"rank": 2, "lora_dropout": 0.3, "lora_targets": "all", "gradient_checkpointing": True},
    }[variant]
    whole, step = train_it(**options, output="whole"), Trainer._optimizer_step

    def dying(self: Trainer) -> Any:
        if self.step == 3:
            raise Killed
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimizer_step", dying)
        with pytest.raises(Killed):
            train_it(**options, output="parts")
    parts = train_it(**options, output="parts")
    files = [path for path in whole.folder.rglob("*.safetensors") if "checkpoint-" not in str(path)]
    assert len(files) == 1 if variant == "lora" else len(files) >= 4
    for path in files:
        one, other = load_file(path), load_file(parts.folder / path.relative_to(whole.folder))
        assert all(torch.equal(one[name], other[name]) for name in one), path
    for kind in ("model", "optimizer", *(("ema",) if variant == "full" else ())):
        one, other = (run.checkpoint(3, kind) for run in (whole, parts))
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert list(whole.logged()["learning_rate/text_encoder"].values()) == pytest.approx([2e-3] * 5)


@pytest.mark.parametrize("kind", ["raw", "ema", "lora"])
def test_images_are_made_with_the_clips_of_then(
    train_it: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    cls, shown = kind_of(ModelConfig(str(folder))).find("Model"), []
    monkeypatch.setattr(cls, "steps", 2)
    decode = cls.decode
    monkeypatch.setattr(cls, "decode", lambda self, raw: (shown.append(decode(self, raw)), shown[-1])[1])
    options: dict[str, Any] = {
        "raw": {}, "ema": {"use_ema": True, "ema_decay": 0.5}, "lora": {"rank": 2, "lora_targets": "all"},
    }[kind]  # fmt: skip
    run = train_it(
        **options, max_train_steps=4, learning_rate=1e-2, text_encoder_lr=3e-2, validation_prompt=PROMPT,
        num_validation_images=1, validation_steps=4,
    )  # fmt: skip
    assert len(shown) == (4 if kind == "ema" else 2)
    seed, last = keyed_seed(0, "validation_image", 0, 0), np.asarray(shown[-1]).astype(int)
    pipeline = pipeline_of(folder if kind == "lora" else run.folder)
    if kind == "lora":
        pipeline.load_lora_weights(run.folder)
    assert abs(drawn(pipeline, seed) - last).max() <= 1
    untrained = pipeline_of(folder)
    for part in clips_of(folder):
        getattr(pipeline, part).disable_adapters() if kind == "lora" else setattr(
            pipeline, part, getattr(untrained, part)
        )
    assert abs(drawn(pipeline, seed) - last).max() > 1


@pytest.mark.parametrize("rank", [None, 2])
def test_a_plan_counts_the_clips_with_the_denoiser_and_the_t5_with_caching(
    train_it: Any, folder: Path, rank: int | None
) -> None:
    run = train_it(rank=rank, checkpointing_steps=2)
    count = sum(value.numel() for value in run.checkpoint(2, "model").values())
    said = train_it("--dry_run", rank=rank, output="plan").stdout
    words = "2 text encoders" if len(clips_of(folder)) == 2 else "1 text encoder"
    of = "LoRA of rank 2 on " if rank else f"the whole transformer and {words})"
    assert f"trains       {count:,} parameters ({of}" in said
    assert "transformer and text weights" in said
    peaks = []
    for options in ({}, TEXT):
        config = ModelConfig(str(folder), rank=rank, **options)
        plan = blueprint(plan_configs(config), config)
        peaks.append(Rehearsal(plan).caching(TrainConfig(model=config, data=DataConfig(resolution=16))))
    encoders: Any = plan.text_encoders()[: len(clips_of(folder))]
    assert peaks[0] - peaks[1] >= sum(p.nbytes for encoder in encoders for p in encoder.parameters())
    if len(plan.text_encoders()) > len(encoders):
        with_vae_alone = ModelConfig(str(tiny_models.tiny_sd3(folder.parent / "plain", t5=False)), **TEXT)
        vae = Rehearsal(blueprint(plan_configs(with_vae_alone), with_vae_alone))
        assert peaks[1] > vae.caching(TrainConfig(model=with_vae_alone, data=DataConfig(resolution=16)))


def test_the_option_is_had_where_there_is_something_to_train() -> None:
    for kind in KINDS:
        assert ("train_text_encoder" in kind.options) == bool(kind.trained_text)
        assert ("text_encoder_2_lr" in kind.options) == (len(kind.trained_text) == 2)
        encoders = [part for part in kind.networks if part.startswith("text_encoder")]
        assert list(kind.trained_text) == encoders[: len(kind.trained_text)]


def test_each_layer_keeps_its_own_rank_and_strength(train_it: Any, tmp_path: Path) -> None:
    """Also of a file that a run has written of a file of several ranks."""
    first = train_it(rank=2, lora_alpha=5, learning_rate=1e-2, output="first")
    file, found = tmp_path / "several.safetensors", load_file(first.folder / LORA)
    some = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    found[f"{some}.lora_A.weight"] = found[f"{some}.lora_A.weight"][:1].clone()
    found[f"{some}.lora_B.weight"] = found[f"{some}.lora_B.weight"][:, :1].clone()
    save_file(found, file)
    still = {"learning_rate": 1e-30, "adam_weight_decay": 0, "max_train_steps": 1, "use_lpl": False}
    for output in ("second", "third"):
        run = train_it(lora_weights=file, train_text_encoder=False, output=output, **still)
        file = run.folder / LORA
        again = load_file(file)
        assert again.keys() == found.keys()
        for name, value in found.items():
            torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-8)


def test_half_precision_trains_float32_weights(train_it: Any) -> None:
    plain, half = (train_it(mixed_precision=p, checkpointing_steps=2, output=p) for p in ("no", "bf16"))
    assert {value.dtype for value in half.checkpoint(2, "model").values()} == {torch.float32}
    first = [run.logged()["diffusion_loss"][1] for run in (plain, half)]
    assert first[0] != first[1] == pytest.approx(first[0], rel=0.05)
    lora = train_it(rank=2, mixed_precision="bf16", learning_rate=1e-2, output="lora")
    assert {value.dtype for value in load_file(lora.folder / LORA).values()} == {torch.float32}
