"""Runs that begin with a LoRA: trained on as its file has it, in either naming, or merged into the model before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.families import with_lora_weights
from lpl.families.lora_files import fold_alpha

LORA = "pytorch_lora_weights.safetensors"
STILL = {"learning_rate": 1e-30, "adam_weight_decay": 0, "max_train_steps": 1, "use_lpl": False}
"""Options of a run that changes nothing."""


@pytest.fixture(scope="module")
def runs(train_in: Any, shared: Path) -> dict[str, Any]:
    """A LoRA on all layers and text encoders, and a DoRA."""
    options = {"rank": 2, "learning_rate": 1e-2, "lora_targets": "all", "lora_alpha": 3}
    return {
        "lora": train_in(shared / "start-lora", **options, train_text_encoder=True),
        "dora": train_in(shared / "start-dora", **options, use_dora=True),
    }


def layers_of(file: Path) -> dict[str, torch.Tensor]:
    """What each layer of a file of kohya's naming adds to its weight."""
    found = load_file(file)
    ends = (".lora_up.weight", ".lora_down.weight", ".alpha")
    layers = {name.partition(".")[0] for name in found}
    parts = {name: [found[name + end] for end in ends] for name in layers}
    return {name: alpha / down.shape[0] * up.flatten(1) @ down.flatten(1) for name, (up, down, alpha) in parts.items()}


@pytest.mark.parametrize(("kind", "file"), [("lora", LORA), ("lora", "start-lora_kohya.safetensors"), ("dora", LORA)])
def test_a_run_without_learning_leaves_the_lora_as_it_was(train: Any, runs: Any, kind: str, file: str) -> None:
    first = runs[kind].folder
    run = train(lora_weights=first / file, **STILL)
    before, after = load_file(first / LORA), load_file(run.folder / LORA)
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-8)
    config = (run.folder / "config.yaml").read_text()
    assert "\nrank: 2\n" in config
    assert "\nlora_alpha: 3.0\n" in config
    again = train(lora_weights=first / file, **STILL)  # of options that the file has filled in, the same run
    assert "nothing to do" in again.stdout


def test_each_layer_keeps_its_own_rank_and_alpha(train: Any, runs: Any, model: Path, tmp_path: Path) -> None:
    """As kohya's programs train convolutions of another rank, and resize LoRAs."""
    found = load_file(runs["lora"].folder / "start-lora_kohya.safetensors")
    of_unet = {name: value for name, value in found.items() if name.startswith("lora_unet_")}
    conv = next(name.partition(".")[0] for name in of_unet if name.endswith("in_layers_2.lora_down.weight"))
    of_unet[f"{conv}.lora_down.weight"] = torch.cat([of_unet[f"{conv}.lora_down.weight"]] * 2)
    of_unet[f"{conv}.lora_up.weight"] = torch.cat([of_unet[f"{conv}.lora_up.weight"]] * 2, dim=1)
    of_unet[f"{conv}.alpha"] = torch.tensor(1.0)
    save_file(of_unet, tmp_path / "theirs.safetensors")
    run = train(lora_weights=tmp_path / "theirs.safetensors", **STILL)
    before, after = layers_of(tmp_path / "theirs.safetensors"), layers_of(run.folder / "out_kohya.safetensors")
    assert after.keys() == before.keys()
    for name, delta in before.items():
        torch.testing.assert_close(after[name], delta, rtol=1e-5, atol=1e-7)
    # diffusers, too, finds each at its rank.
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, add_watermarker=False)
    pipeline.load_lora_weights(run.folder)
    ranks = {m.r["default_0"] for m in pipeline.unet.modules() if hasattr(m, "lora_A")}
    assert ranks == {2, 4}


def test_folded_alpha_is_each_layers_rank() -> None:
    tensors = {"x.lora_B.weight": torch.ones(3, 4), "y.lora_B.weight": torch.ones(3, 2)}
    adapter = {"t.r": 2, "t.lora_alpha": 8, "t.rank_pattern": {"x": 4}}
    fold_alpha(tensors, adapter, "t")
    assert [float(value.mean()) for value in tensors.values()] == [2, 4]
    assert (adapter["t.lora_alpha"], adapter["t.alpha_pattern"]) == (2, {"x": 4})


def test_it_is_trained_on(train: Any, runs: Any) -> None:
    options = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-2}
    run = train(lora_weights=runs["lora"].folder / LORA, **options)
    before, after = load_file(runs["lora"].folder / LORA), load_file(run.folder / LORA)
    assert len([name for name in before if not torch.equal(before[name], after[name])]) == len(before)
    plan = train("--dry_run", lora_weights=runs["lora"].folder / LORA, **options, output="plan")
    assert f"trains       {sum(value.numel() for value in after.values()):,} parameters (LoRA of rank 2" in plan.stdout


def test_merged_it_is_part_of_the_model(train: Any, runs: Any, run_cli: Any, tmp_path: Path) -> None:
    first = runs["dora"].folder
    code, _, err = run_cli(["export", str(first), "--to", "diffusers", "--output", str(tmp_path / "merged")])
    assert code == 0, err
    expected = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    run = train(lora_weights=first / LORA, merge_lora_weights=True, **STILL)
    for name, value in run.unet().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    # A LoRA on top belongs to the merged model, and its export merges both.
    top = train(lora_weights=first / LORA, merge_lora_weights=True, rank=1, **STILL, output="top")
    code, _, err = run_cli(["export", str(top.folder), "--to", "diffusers", "--output", str(tmp_path / "both")])
    assert code == 0, err
    both = load_file(tmp_path / "both" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in both.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_what_does_not_fit_is_refused(train: Any, runs: Any, model: Path, tmp_path: Path) -> None:
    lora, dora = runs["lora"].folder, runs["dora"].folder
    strange, loha = tmp_path / "strange.safetensors", tmp_path / "loha.safetensors"
    found = load_file(lora / LORA)
    some = next(name for name in found if name.endswith("lora_A.weight")).removesuffix("lora_A.weight")
    moved = {f"unet.nowhere.{end}": found[some + end] for end in ("lora_A.weight", "lora_B.weight")}
    save_file(moved, strange)
    save_file({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, loha)
    base = ModelConfig(str(model))
    for options, expected in [
        ({"lora_weights": str(tmp_path / "nix.safetensors")}, "no .safetensors file"),
        ({"lora_weights": str(lora / LORA), "rank": 4}, "--rank 4: --lora_weights"),
        ({"lora_weights": str(lora / LORA), "lora_alpha": 1.0}, "decides that (3.0)"),
        ({"lora_weights": str(dora / "start-dora_comfyui.safetensors")}, "a DoRA as ComfyUI alone reads it"),
        ({"lora_weights": str(loha)}, "holds lora_unet_x.hada_w1_a; only LoRA"),
    ]:
        with pytest.raises(UserError) as error:
            with_lora_weights(ModelConfig(**(vars(base) | options)))
        assert expected in str(error.value)
    run = train(lora_weights=strange, expect_error=True)
    assert "1 of its layers are none of this model's, first: unet.nowhere" in run.errors[0]
