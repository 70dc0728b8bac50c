"""`lpl export`: models and runs in, files for other programs out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
LORA = "pytorch_lora_weights.safetensors"


def pipeline_of(folder: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, add_watermarker=False)


def single(file: Path, config: Path) -> Any:
    return StableDiffusionXLPipeline.from_single_file(str(file), config=str(config), local_files_only=True)


def differing(a: Any, b: Any) -> list[str]:
    found = []
    for part in PARTS:
        x, y = (getattr(p, part).state_dict() for p in (a, b))
        assert x.keys() == y.keys()
        found += [f"{part}.{name}" for name in x if not torch.equal(x[name], y[name])]
    return found


@pytest.fixture(scope="session")
def export(run_cli: Any) -> Any:
    """Runs `lpl export`; returns its one line, or the error's."""

    def run(*argv: Any, fails: bool = False) -> str:
        code, out, err = run_cli(["export", *map(str, argv)])
        assert code == (2 if fails else 0), err
        (line,) = [line for line in (err if fails else out).splitlines() if not fails or line.startswith("error: ")]
        return line

    return run


@pytest.fixture(scope="module")
def runs(train_in: Any, shared: Path) -> dict[str, Any]:
    """A full run, a LoRA with alpha and on all layers, and a DoRA."""
    lora = {"rank": 2, "learning_rate": 1e-2, "lora_targets": "all", "checkpointing_steps": 1, "save_steps": 1}
    said = {"metadata_author": "A. Nonymous", "metadata_license": "CC-BY-4.0"}
    return {
        "full": train_in(shared / "export-full", learning_rate=1e-2, **said),
        "lora": train_in(shared / "export-lora", **lora, lora_alpha=3),
        "dora": train_in(shared / "export-dora", **lora, use_dora=True, use_ema=True, ema_decay=0.5),
    }


def test_full_run_becomes_one_file(export: Any, runs: dict[str, Any], model: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "my model.safetensors", runs["full"].folder
    assert export(folder, "--output", file) == f"{file}: 431 tensors, 0.6 MiB"
    assert differing(single(file, folder), pipeline_of(folder)) == []
    assert len(differing(single(file, folder), pipeline_of(model))) > 100
    with safe_open(file, "pt") as content:
        said = content.metadata()
    assert [said[f"modelspec.{key}"] for key in ("title", "author", "license")] == [
        "my model",
        "A. Nonymous",
        "CC-BY-4.0",
    ]
    # And back, in another precision, without anything but the file and configs.
    back = tmp_path / "back"
    export(file, "--single_file_config", model, "--to", "diffusers", "--output", back, "--dtype", "float16")
    assert {v.dtype for v in pipeline_of(back).unet.state_dict().values()} == {
        torch.float32
    }  # what from_pretrained makes
    weights = [load_file(f) for part in PARTS for f in (back / part).glob("*.safetensors")]
    assert len(weights) == 4
    assert {v.dtype for w in weights for v in w.values()} == {torch.float16}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_is_merged_into_the_base_of_its_run(
    export: Any, runs: dict[str, Any], model: Path, tmp_path: Path, kind: str
) -> None:
    run = runs[kind]
    export(run.folder, "--to", "diffusers", "--output", tmp_path / "merged")
    export(run.folder, "--output", tmp_path / "merged.safetensors")
    merged = pipeline_of(tmp_path / "merged")
    assert differing(single(tmp_path / "merged.safetensors", model), merged) == []
    expected = pipeline_of(model)
    changed = differing(merged, expected)
    layers = len(load_file(run.folder / LORA)) // (3 if kind == "dora" else 2)
    assert len(changed) == layers
    assert all(name.startswith("unet.") and name.endswith("weight") for name in changed)
    expected.load_lora_weights(run.folder)
    expected.fuse_lora(components=["unet"])
    expected.unload_lora_weights()
    for name, value in expected.unet.state_dict().items():
        torch.testing.assert_close(merged.unet.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_base_and_scale_are_the_users(export: Any, runs: dict[str, Any], model: Path, tmp_path: Path) -> None:
    lora, full = runs["lora"].folder, runs["full"].folder
    export(lora, "--base", full, "--lora_scale", 0, "--to", "diffusers", "--output", tmp_path / "nothing")
    assert differing(pipeline_of(tmp_path / "nothing"), pipeline_of(full)) == []
    export(full, "--lora", lora, "--lora_scale", 0.5, "--output", tmp_path / "a.safetensors")
    export(full, "--lora", lora / LORA, "--lora_scale", 0.5, "--output", tmp_path / "b.safetensors")
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    half = single(tmp_path / "a.safetensors", model)
    tensors, name = load_file(lora / LORA), "mid_block.attentions.0.proj_in"
    delta = tensors[f"unet.{name}.lora_B.weight"] @ tensors[f"unet.{name}.lora_A.weight"] * 3 / 2
    expected = pipeline_of(full).unet.state_dict()[f"{name}.weight"] + 0.5 * delta
    torch.testing.assert_close(half.unet.state_dict()[f"{name}.weight"], expected, rtol=1e-6, atol=1e-6)


def test_prediction_type_of_the_run_is_kept(export: Any, train: Any, tmp_path: Path) -> None:
    run = train(rank=2, prediction_type="v_prediction", max_train_steps=1)
    export(run.folder, "--output", tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", "pt") as content:
        assert "v_pred" in content.keys()  # noqa: SIM118 (it is no dict)
    export(run.folder, "--to", "diffusers", "--output", tmp_path / "v")
    assert pipeline_of(tmp_path / "v").scheduler.config.prediction_type == "v_prediction"


def test_kohya_file_is_the_same_adapter(export: Any, runs: dict[str, Any], model: Path, tmp_path: Path) -> None:
    folder, file = runs["lora"].folder, tmp_path / "style.safetensors"
    ours = load_file(folder / LORA)
    assert export(folder, "--to", "kohya", "--output", file).startswith(f"{file}: {3 * len(ours) // 2} tensors")
    theirs = load_file(file)
    # The run has left the same beside diffusers' file, but for its name and the time.
    own = folder / "export-lora_kohya.safetensors"
    for name, value in load_file(own).items():
        assert torch.equal(value, theirs[name])
    said = []
    for each in (own, file):
        with safe_open(each, "pt") as content:
            assert len(content.keys()) == len(theirs)
            said.append({k: v for k, v in content.metadata().items() if not k.endswith(("title", "date", "_name"))})
    assert said[0] == said[1]
    assert list(runs["dora"].folder.glob("*kohya*")) == []
    assert {float(v) for k, v in theirs.items() if k.endswith(".alpha")} == {3.0}
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in theirs
    assert "lora_unet_output_blocks_1_2_conv.lora_up.weight" in theirs
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "3")
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    # Every name is a layer of the exported original model, which is how ComfyUI finds it.
    export(model, "--output", tmp_path / "base.safetensors")
    prefix = "model.diffusion_model."
    layers = {
        f"lora_unet_{name.removeprefix(prefix).removesuffix('.weight').replace('.', '_')}"
        for name in load_file(tmp_path / "base.safetensors")
        if name.startswith(prefix)
    }
    assert {name.split(".")[0] for name in theirs} <= layers
    loaded = []
    for source in (folder / LORA, file):
        pipeline = pipeline_of(model)
        pipeline.load_lora_weights(source.parent, weight_name=source.name)
        modules = {n: m for n, m in pipeline.unet.named_modules() if hasattr(m, "lora_A")}
        loaded.append(
            {
                name: (m.lora_A["default_0"].weight, m.lora_B["default_0"].weight, m.scaling["default_0"])
                for name, m in modules.items()
            }
        )
    assert loaded[0].keys() == loaded[1].keys()
    assert len(loaded[0]) == len(ours) // 2
    for name, (down, up, scaling) in loaded[0].items():
        other = loaded[1][name]
        assert torch.equal(down, other[0]), name
        assert torch.equal(up, other[1]), name
        assert scaling == other[2] == 1.5
    # Merged from either naming: the same model.
    export(model, "--lora", file, "--output", tmp_path / "kohya.safetensors")
    export(folder, "--output", tmp_path / "peft.safetensors")
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in ("kohya", "peft"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_dora_file_is_the_merged_model_in_comfyui(
    export: Any, runs: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """What ComfyUI and Forge make of it: s (W + alpha / rank up down) / |W|, norms of rows, on the original layout."""
    folder, prefix = runs["dora"].folder, "model.diffusion_model."
    theirs = load_file(folder / "export-dora_comfyui.safetensors")
    for source, name in ((model, "base"), (folder, "merged")):
        export(source, "--output", tmp_path / f"{name}.safetensors")
    base, merged = (load_file(tmp_path / f"{name}.safetensors") for name in ("base", "merged"))
    named = {name.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): name for name in base}
    layers = {name.partition(".")[0] for name in theirs}
    assert 4 * len(layers) == len(theirs)
    for layer in layers:
        up, down, alpha, scale = (
            theirs[f"{layer}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha", "dora_scale")
        )
        weight = base[named[layer.removeprefix("lora_unet_")]]
        assert scale.shape == (len(weight), *[1] * (weight.dim() - 1))
        changed = weight + (alpha / len(down) * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        norm = weight.flatten(1).norm(dim=1).reshape(scale.shape)
        expected = merged[named[layer.removeprefix("lora_unet_")]]
        torch.testing.assert_close(scale * changed / norm, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(expected, weight)
    line = export(folder, "--to", "kohya", "--output", tmp_path / "again.safetensors")
    assert line.endswith("tensors of kohya's naming, magnitudes as ComfyUI and Forge alone read them")
    again = load_file(tmp_path / "again.safetensors")
    for name, value in theirs.items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-7)


def test_checkpoints_are_taken_as_the_run_is(export: Any, runs: dict[str, Any], model: Path, tmp_path: Path) -> None:
    for kind, weights, end in (("lora", "raw", "kohya"), ("dora", "ema", "comfyui")):
        folder = runs[kind].folder
        files = {1: folder / "saved-1" / weights / f"{folder.name}-1-{weights}_{end}.safetensors"}
        files[2] = folder / f"{folder.name}_{end}.safetensors"
        for step, file in files.items():
            export(folder / f"checkpoint-{step}", "--to", "kohya", "--output", tmp_path / f"{kind}-{step}.safetensors")
            found, expected = load_file(tmp_path / f"{kind}-{step}.safetensors"), load_file(file)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
            with safe_open(tmp_path / f"{kind}-{step}.safetensors", "pt") as content:
                assert content.metadata()["ss_steps"] == str(step)
    # Merged, too, and onto the base that a step's folder is a run's.
    folder = runs["lora"].folder
    export(folder / "checkpoint-1", "--output", tmp_path / "a.safetensors")
    export(folder / "saved-1" / "raw", "--output", tmp_path / "b.safetensors")
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "full fine-tune" in export(
        _checkpoint_of(runs["full"].folder), "--output", tmp_path / "c.safetensors", fails=True
    )


def _checkpoint_of(folder: Path) -> Path:
    (path := folder / "checkpoint-2").mkdir(exist_ok=True)
    return path


def test_overwriting_is_asked_for(export: Any, runs: dict[str, Any], model: Path, tmp_path: Path) -> None:
    file, folder, lora = tmp_path / "x.safetensors", tmp_path / "x", runs["lora"].folder
    for scale in (0, 1):
        export(lora, "--output", file, "--lora_scale", scale, "--overwrite")
        export(lora, "--to", "diffusers", "--output", folder, "--lora_scale", scale, "--overwrite")
        assert (differing(pipeline_of(folder), pipeline_of(model)) == []) == (scale == 0)
        assert differing(single(file, model), pipeline_of(folder)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.safetensors"]


def test_refusals_name_the_option(export: Any, runs: dict[str, Any], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    full, lora, dora = (runs[kind].folder for kind in ("full", "lora", "dora"))
    (taken := tmp_path / "taken.safetensors").write_text("mine")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(full / "config.yaml", unfinished)
    step = tmp_path / "saved-2"
    for kind in ("ema", "raw"):
        (step / kind).mkdir(parents=True)
    moved = Path(shutil.copytree(lora, tmp_path / "moved"))
    text = (moved / "config.yaml").read_text().replace(str(model), "/nowhere/at/all")
    (moved / "config.yaml").write_text(text)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(lora / LORA, alone)
    (tmp_path / "moved.safetensors").mkdir()
    strange = tmp_path / "strange.safetensors"
    save_file({"x": torch.zeros(1)}, strange)
    for argv, expected in [
        ((model,), "--output is missing"),
        ((model, "--output", taken), f"--output {taken}: is there already"),
        ((model, "--output", tmp_path / "x.ckpt"), "must end in .safetensors"),
        ((model, "--output", taken / "x.safetensors"), f"{taken} is no folder"),
        ((tmp_path / "nix", "--output", out), f"{tmp_path}/nix: no such folder"),
        ((unfinished, "--output", out), f"{unfinished}: an unfinished run"),
        ((step, "--output", out), f"{step}: a saved step; name {step}/ema or {step}/raw"),
        ((moved, "--output", out), f"--base (by {moved}/config.yaml) /nowhere/at/all: no such folder"),
        ((alone, "--output", out), "give --base"),
        ((moved, "--base", tmp_path / "nix", "--output", out), f"--base {tmp_path}/nix: no such folder"),
        ((full, "--base", model, "--output", out), "--base belongs to a run that trained a LoRA"),
        ((full, "--lora_scale", 2, "--output", out), "--lora_scale needs a LoRA"),
        ((full, "--to", "kohya", "--output", out), "--to kohya needs a LoRA"),
        ((lora, "--lora", lora, "--output", out), f"--lora {lora}: "),
        ((lora, "--to", "kohya", "--dtype", "float16", "--output", out), "--dtype acts with a merged model"),
        ((model, "--lora", dora / "export-dora_comfyui.safetensors", "--output", out), "a DoRA as ComfyUI alone"),
        ((lora, "--to", "kohya", "--overwrite", "--output", lora / LORA), "--overwrite would replace what is read"),
        ((lora, "--base", model, "--to", "diffusers", "--overwrite", "--output", model), "would replace what is read"),
        ((lora, "--to", "diffusers", "--overwrite", "--output", alone), f"{alone}: is no diffusers folder"),
        ((lora, "--overwrite", "--output", (tmp_path / "moved.safetensors")), "is no file"),
        ((lora / "checkpoint-3", "--output", out), "checkpoint-3 is damaged"),
        ((model, "--lora", strange, "--output", out), f"--lora {strange}: holds x"),
        ((model, "--lora", tmp_path / "nix.safetensors", "--output", out), "nix.safetensors: no such file"),
        ((model, "--lora", full, "--output", out), f"--lora {full}: no {LORA} in it"),
        ((model, "--to", "ckpt", "--output", out), "ckpt"),
        ((model, "--outptu", out), "did you mean output"),
    ]:
        assert expected in export(*argv, fails=True), argv
    assert taken.read_text() == "mine"
    assert not out.exists()
