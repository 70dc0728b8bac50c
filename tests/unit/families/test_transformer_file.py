"""One file with the transformer of a model trained by flow matching: out, in, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_models
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpl.base.errors import UserError
from lpl.base.tensor_file import write_tensors
from lpl.config import ModelConfig
from lpl.families import KINDS, kind_of, load_family, load_for_export, lumina2, model_configs, plan_configs
from lpl.families.kinds import FLUX_KIND, SD3_KIND
from lpl.families.transformer_file import check_fits, original_tensors

CPU = torch.device("cpu")
BUILT = {
    "sd3": "tiny_sd3",
    "flux": "tiny_flux",
    "zimage": "tiny_zimage",
    "sana": "tiny_sana",
    "klein": "tiny_flux2",
    "qwen": "tiny_qwenimage",
    "auraflow": "tiny_auraflow",
}
"""Of every such family but Lumina2, whose original layout diffusers reads at one width alone."""
MADE_ORIGINAL = {"zimage": "layers.0.attention.qkv.weight", "klein": "double_blocks.0.txt_attn.qkv.weight"}
"""A tensor of those whose files are in the original layout."""

Q_K_V = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
FLUX_NAMES = (
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
    (r"^time_text_embed\.timestep_embedder", "time_in"),
    (r"^time_text_embed\.text_embedder", "vector_in"),
    (r"^time_text_embed\.guidance_embedder", "guidance_in"),
    (r"^(\w+_in)\.linear_1", r"\1.in_layer"),
    (r"^(\w+_in)\.linear_2", r"\1.out_layer"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"^transformer_blocks", "double_blocks"),
    (r"\.norm1\.linear", ".img_mod.lin"),
    (r"\.norm1_context\.linear", ".txt_mod.lin"),
    (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"\.attn\.to_out\.0", ".img_attn.proj"),
    (r"\.attn\.to_add_out", ".txt_attn.proj"),
    (r"\.ff\.net\.0\.proj", ".img_mlp.0"),
    (r"\.ff\.net\.2", ".img_mlp.2"),
    (r"\.ff_context\.net\.0\.proj", ".txt_mlp.0"),
    (r"\.ff_context\.net\.2", ".txt_mlp.2"),
)
FLUX_FUSED = {
    "img_attn.qkv": tuple(f"attn.{part}" for part in Q_K_V),
    "txt_attn.qkv": tuple(f"attn.{part}" for part in ADDED),
}
SINGLE_FUSED = {"linear1": (*FLUX_FUSED["img_attn.qkv"], "proj_mlp")}
SD3_NAMES = (
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^transformer_blocks", "joint_blocks"),
    (r"\.norm1\.linear", ".x_block.adaLN_modulation.1"),
    (r"\.norm1_context\.linear", ".context_block.adaLN_modulation.1"),
    (r"\.ff\.net\.0\.proj", ".x_block.mlp.fc1"),
    (r"\.ff\.net\.2", ".x_block.mlp.fc2"),
    (r"\.ff_context\.net\.0\.proj", ".context_block.mlp.fc1"),
    (r"\.ff_context\.net\.2", ".context_block.mlp.fc2"),
    (r"\.attn\.norm_added_([qk])", r".context_block.attn.ln_\1"),
    (r"\.(attn2?)\.norm_([qk])", r".x_block.\1.ln_\2"),
    (r"\.(attn2?)\.to_out\.0", r".x_block.\1.proj"),
    (r"\.attn\.to_add_out", ".context_block.attn.proj"),
)
SD3_FUSED = {
    "x_block.attn.qkv": FLUX_FUSED["img_attn.qkv"],
    "x_block.attn2.qkv": tuple(f"attn2.{part}" for part in Q_K_V),
    "context_block.attn.qkv": FLUX_FUSED["txt_attn.qkv"],
}

SANA_NAMES = (
    (r"^patch_embed", "x_embedder"),
    (r"^time_embed\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_embed\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_embed\.linear", "t_block.1"),
    (r"^caption_projection\.linear_", "y_embedder.y_proj.fc"),
    (r"^caption_norm", "attention_y_norm"),
    (r"^proj_out", "final_layer.linear"),
    (r"^scale_shift_table", "final_layer.scale_shift_table"),
    (r"^transformer_blocks", "blocks"),
    (r"\.attn1\.to_out\.0", ".attn.proj"),
    (r"\.attn2\.to_out\.0", ".cross_attn.proj"),
    (r"\.attn2\.to_q", ".cross_attn.q_linear"),
    (r"\.ff\.conv_(\w+)", r".mlp.\1_conv.conv"),
)
SANA_FUSED = {
    "attn.qkv": tuple(f"attn1.{part}" for part in Q_K_V),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}


def original_flux(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    single = {name: value for name, value in weights.items() if name.startswith("single_")}
    joint = {name: value for name, value in weights.items() if name not in single}
    found = dict(original_tensors(joint, FLUX_NAMES, FLUX_FUSED, "norm_out.linear"))
    return found | dict(original_tensors(single, FLUX_NAMES, SINGLE_FUSED))


def original_sd3(weights: Mapping[str, Tensor], last: int) -> dict[str, Tensor]:
    """The last block's modulation of the text has its halves the other way round, too."""
    found = dict(original_tensors(weights, SD3_NAMES, SD3_FUSED, "norm_out.linear"))
    for end in ("weight", "bias"):
        name = f"joint_blocks.{last}.context_block.adaLN_modulation.1.{end}"
        found[name] = torch.cat(found[name].chunk(2)[::-1])
    return found


def original_sana(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With what diffusers' transformer has no need of."""
    idle = {"pos_embed": torch.zeros(1, 4, 8), "y_embedder.y_embedding": torch.zeros(3, 2)}
    return dict(original_tensors(weights, SANA_NAMES, SANA_FUSED)) | idle


def header_alone(file: Path, tensors: Mapping[str, Tensor]) -> ModelConfig:
    """A file of as many bytes as these tensors have in two bytes a value, of which the disk holds the header."""
    entries, end = {}, 0
    for name, value in tensors.items():
        start, end = end, end + 2 * value.numel()
        entries[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + end)
    return ModelConfig(str(file), single_file_config="a folder")


def published(kind: Any) -> Any:
    own = kind.find("PUBLISHED")["transformer"]
    with init_empty_weights(include_buffers=True):
        return getattr(diffusers, own["_class_name"]).from_config(own)


def written(folder: Path, file: Path, dtype: torch.dtype | None = None) -> ModelConfig:
    tensors, metadata = load_for_export(ModelConfig(str(folder)), dtype, None, 1.0).single_file("a title")
    write_tensors(tensors, file, metadata)
    return ModelConfig(str(file), single_file_config=str(folder))


def differing(found: Any, expected: Any) -> list[str]:
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    return [name for name in b if not torch.equal(a[name], b[name]) or a[name].dtype != b[name].dtype]


@pytest.fixture(scope="module", params=BUILT)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(getattr(tiny_models, BUILT[request.param])(tmp_path_factory.mktemp(request.param) / request.param))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_models.tiny_flux(tmp_path_factory.mktemp("flux") / "flux"))


@pytest.fixture
def file(flux: Path, tmp_path: Path) -> Path:
    return Path(str(written(flux, tmp_path / "flux.safetensors").pretrained_model_name_or_path))


def test_what_is_written_is_read_back_here_and_by_diffusers(folder: Path, tmp_path: Path) -> None:
    config = written(folder, tmp_path / "one.safetensors", torch.bfloat16)
    assert kind_of(config) is kind_of(ModelConfig(str(folder))) is kind_of(replaced(config, None))
    assert model_configs(config) == model_configs(ModelConfig(str(folder)))
    expected = load_for_export(ModelConfig(str(folder)), torch.bfloat16, None, 1.0).pipeline
    network = expected.transformer
    theirs = type(network).from_single_file(
        str(tmp_path / "one.safetensors"),
        config=str(folder),
        subfolder="transformer",
        local_files_only=True,
        dtype=torch.bfloat16,
    )
    assert differing(theirs, network) == []
    ours = load_for_export(config, None, None, 1.0).pipeline  # in the precision that each part is stored in
    assert differing(ours.transformer, network) == []
    assert next(ours.vae.parameters()).dtype == torch.float32
    family, before = (load_family(each, CPU, torch.float32) for each in (config, ModelConfig(str(folder))))
    assert not family.denoiser.training
    assert (family.latent_key, family.text_key) == (before.latent_key, before.text_key)
    with safe_open(tmp_path / "one.safetensors", "pt") as content:
        assert MADE_ORIGINAL.get(folder.name, next(iter(network.state_dict()))) in content.keys()  # noqa: SIM118
        said = content.metadata()
    assert said["modelspec.title"] == "a title"
    assert said["modelspec.architecture"].islower()
    side = kind_of(config).native_resolution(model_configs(config))
    assert said["modelspec.resolution"] == f"{side}x{side}"


def replaced(config: ModelConfig, folder: str | None) -> ModelConfig:
    return ModelConfig(config.pretrained_model_name_or_path, single_file_config=folder)


ORIGINAL: dict[str, Any] = {"tiny_sd3": partial(original_sd3, last=1), "tiny_sana": original_sana}


@pytest.mark.parametrize("build", ORIGINAL)
def test_the_original_layout_beside_other_parts_is_what_the_folder_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, build: str
) -> None:
    folder = Path(getattr(tiny_models, build)(tmp_path / "model"))
    expected = load_family(ModelConfig(str(folder)), CPU, torch.float32).denoiser
    original = ORIGINAL[build](expected.state_dict())
    whole = {f"model.diffusion_model.{name}": value.contiguous().clone() for name, value in original.items()}
    save_file(whole | {"text_encoders.x": torch.zeros(1), "vae.y": torch.zeros(1)}, tmp_path / "all.safetensors")
    config = ModelConfig(str(tmp_path / "all.safetensors"), single_file_config=str(folder))
    assert kind_of(config) is kind_of(ModelConfig(str(folder)))
    family = load_family(config, CPU, torch.float32)
    assert differing(family.denoiser, expected) == []
    assert "2 tensors beside its transformer (text_encoders.x, ...) not read" in caplog.text
    family.export(family.denoiser, tmp_path / "out")
    assert differing(load_family(ModelConfig(str(tmp_path / "out")), CPU, torch.float32).denoiser, expected) == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.is_transformer], ids=lambda kind: kind.module)
def test_files_of_the_published_size_fit(kind: Any, tmp_path: Path) -> None:
    network, export = published(kind), kind.find("Export")
    weights = network.state_dict()
    layout = export.original_names, export.original_fused, export.original_swapped
    layouts = [dict(original_tensors(weights, *layout))]
    if kind is FLUX_KIND:
        layouts.append(original_flux(weights))
        assert len(layouts[1]) == 780  # as the published file has
    if kind is SD3_KIND:
        layouts.append(original_sd3(weights, last=23))
    for layout in layouts:
        for prefix in ("", "model.diffusion_model."):
            given = {prefix + name: value for name, value in layout.items()}
            config = header_alone(tmp_path / "full.safetensors", given)
            assert kind_of(replaced(config, None)) is kind
            check_fits(kind, config, network)
    last = max(given)
    config = header_alone(tmp_path / "full.safetensors", {name: value for name, value in given.items() if name != last})
    with pytest.raises(UserError, match=r"missing|but without"):
        check_fits(kind, config, network)


def test_values_of_lumina2_at_its_only_width(tmp_path: Path) -> None:
    network = diffusers.Lumina2Transformer2DModel(
        hidden_size=2304,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=24,
        num_kv_heads=8,
        cap_feat_dim=16,
        multiple_of=16,
        ffn_dim_multiplier=0.01,
    ).to(torch.bfloat16)
    network.save_config(tmp_path)
    tensors = original_tensors(network.state_dict(), lumina2.ORIGINAL_NAMES, lumina2.ORIGINAL_FUSED)
    write_tensors(tensors, tmp_path / "one.safetensors", {})
    found = type(network).from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path), dtype=torch.bfloat16
    )
    assert differing(found, network) == []


def test_a_run_on_a_file_is_the_folders_and_goes_on_everywhere(
    flux: Path, file: Path, train: Any, run_cli: Any, tmp_path: Path
) -> None:
    model = {"pretrained_model_name_or_path": file, "single_file_config": flux}
    short = {"rank": 2, "learning_rate": 1e-2, "lpl_t_threshold": None}
    run = train(**model, **short, output="file")
    expected = train(pretrained_model_name_or_path=flux, **short, output="folder")
    for name, values in expected.losses().items():
        assert list(run.losses()[name].values()) == pytest.approx(list(values.values()), rel=1e-5), name
    plan = train("--dry_run", **model, **short, output="plan")
    assert "ready to train" in plan.stdout
    for source, name in ((run.folder, "merged"), (expected.folder, "from_folder")):
        code, out, err = run_cli(["export", str(source), "--output", str(tmp_path / f"{name}.safetensors")])
        assert code == 0, err
        assert out.startswith(f"{tmp_path / name}.safetensors: 80 tensors")
    merged, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("merged", "from_folder"))
    before = load_file(file)
    assert merged.keys() == before.keys() == other.keys()
    assert (
        sum(not torch.equal(merged[name], before[name]) for name in before)
        == len(load_file(run.folder / "pytorch_lora_weights.safetensors")) // 2
    )
    for name, value in other.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-5)
    assert drawn(run_cli, tmp_path / "of_file", file=tmp_path / "merged.safetensors", beside=flux) == drawn(
        run_cli, tmp_path / "of_run", file=run.folder
    )


def drawn(run_cli: Any, folder: Path, file: Path, beside: Path | None = None) -> list[bytes]:
    """Images that `lpl eval` draws."""
    tiny_models.tiny_images(reference := folder.parent / "reference", count=10)
    (prompts := folder.parent / "prompts.txt").write_text("a fox\n")
    flags = ["--pretrained_model_name_or_path", file, "--reference_dir", reference, "--prompts", prompts]
    flags += ["--output_dir", folder, "--num_samples", 10, "--num_inference_steps", 1, "--metrics", "spectrum"]
    flags += ["--resolution", 16, "--no_floor", *(() if beside is None else ("--single_file_config", beside))]
    code, _, err = run_cli(["eval", *map(str, flags)])
    assert code == 0, err
    images = [path.read_bytes() for path in sorted(folder.rglob("*.png"))]
    assert len(images) == 10
    return images


def test_another_folder_is_another_run(flux: Path, file: Path, train: Any, tmp_path: Path) -> None:
    other = shutil.copytree(flux, tmp_path / "other")
    model = {"pretrained_model_name_or_path": file, "rank": 2, "lpl_t_threshold": None}
    train(**model, single_file_config=flux)
    failed = train(**model, single_file_config=other, max_train_steps=3, expect_error=True)
    assert "--single_file_config" in failed.errors[0]


def changed(file: Path, to: Path, change: Any) -> Path:
    tensors = load_file(file)
    change(tensors)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, to)
    return to


FIRST = "transformer_blocks.0.attn.to_q.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(FIRST), rf"1 tensor missing \({FIRST}\)"),
        (lambda t: t.update({"more.weight": torch.zeros(2)}), r"1 tensor unknown to it \(more.weight\)"),
        (lambda t: t.update({FIRST: torch.zeros(16, 8)}), rf"{FIRST} \[16, 8\], not \[16, 16\]"),
        (lambda t: t.update({"a.scale_weight": torch.zeros(1)}), "scaled fp8"),
        (lambda t: t.update({FIRST: torch.zeros(16, dtype=torch.uint8)}), "quantised: 1 weights are no"),
        (
            lambda t: t.update({f"{FIRST}.quant_state.bitsandbytes__nf4": torch.zeros(1, dtype=torch.uint8)}),
            "quantised to nf4 by bitsandbytes",
        ),
        (
            lambda t: (t.clear(), t.update({"double_blocks.0.lora_A.weight": torch.zeros(1)})),
            r"holds a LoRA, no transformer of Flux.1",
        ),
        (lambda t: (t.clear(), t.update({"x": torch.zeros(1)})), r"holds x, no transformer of Flux.1"),
        (
            lambda t: (t.clear(), t.update({"joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(1)})),
            "model_index.json says FluxPipeline, which is no pipeline of Stable Diffusion 3.5",
        ),
        (
            lambda t: (
                t.clear(),
                t.update({name: torch.zeros(1) for name in FLUX_KIND.single_file_keys[1]}),
            ),
            "in the original layout of Flux.1, but without|in no layout of Flux.1",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_line_before_anything_loads(
    flux: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, told: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("lpl.families.loading._load_folder", load)
    monkeypatch.setattr("lpl.families.transformer_file.safe_open", load)
    wrong = changed(file, tmp_path / "wrong.safetensors", change)
    config = ModelConfig(str(wrong), single_file_config=str(flux))
    with pytest.raises(UserError, match=told) as caught:
        load_family(config, CPU, torch.float32) if model_configs(config) else None
    assert "\n" not in str(caught.value)
    assert str(wrong) in str(caught.value) or str(flux) in str(caught.value)


def test_a_plan_of_a_file_that_does_not_fit_is_refused(flux: Path, file: Path, train: Any, tmp_path: Path) -> None:
    wrong = changed(file, tmp_path / "wrong.safetensors", lambda t: t.pop(FIRST))
    failed = train("--dry_run", pretrained_model_name_or_path=wrong, single_file_config=flux, rank=2, expect_error=True)
    assert "1 tensor missing" in failed.errors[0]


def test_what_is_beside_the_file_is_asked_for_and_named(flux: Path, file: Path, tmp_path: Path) -> None:
    def refused(*names: Any, act: Any = model_configs) -> str:
        with pytest.raises(UserError) as caught:
            act(ModelConfig(str(names[0]), single_file_config=None if len(names) == 1 else str(names[1])))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for act in (model_configs, plan_configs):
        assert "by --single_file_config, such as black-forest-labs/FLUX.1-dev" in refused(file, act=act)
        assert refused(file, "/no/folder", act=act).startswith("--single_file_config /no/folder: no such folder")
    (quantised := tmp_path / "flux.gguf").write_bytes(b"GGUF")
    assert f"{quantised}: GGUF, which is quantised" in refused(quantised, flux)
    names = ("conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.ln_final.weight")
    names += ("model.diffusion_model.x", "first_stage_model.x")
    save_file({name: torch.zeros(1) for name in names}, sdxl := tmp_path / "sdxl.safetensors")
    assert "model_index.json says FluxPipeline; this trainer needs StableDiffusionXLPipeline" in refused(sdxl, flux)
    lacking = Path(shutil.copytree(flux, tmp_path / "lacking"))
    shutil.rmtree(lacking / "transformer")
    (lacking / "transformer").mkdir()
    shutil.copy(flux / "transformer" / "config.json", lacking / "transformer")
    assert model_configs(ModelConfig(str(file), single_file_config=str(lacking)))
    assert (
        differing(
            load_family(ModelConfig(str(file), single_file_config=str(lacking)), CPU, torch.float32).denoiser,
            load_family(ModelConfig(str(flux)), CPU, torch.float32).denoiser,
        )
        == []
    )
    for weights in (lacking / "vae").glob("*.safetensors"):
        weights.unlink()
    told = refused(file, lacking)
    assert told == f"--single_file_config {lacking}: missing in it: vae/*.safetensors"
