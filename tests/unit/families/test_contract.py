"""What every family must do: its arithmetic is its pipeline's own, and what it writes loads and gives the same."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tiny_models import randomize

from lpl.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from lpl.data.store import padded
from lpl.families import blueprint, flux2, kind_of, load_family, plan_configs, with_lora_weights
from lpl.families.sampling import load_for_sampling
from lpl.training.engine import add_lora
from lpl.training.rehearsal import Rehearsal
from lpl.training.trainer import Trainer

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl": ("tiny_sdxl", {}),
    "sd": ("tiny_sd", {}),
    "sd_v": ("tiny_sd", {"prediction_type": "v_prediction"}),
    "sdxl_flow": ("tiny_flow", {}),
    "sd_flow": ("tiny_flow", {"build": tiny_models.tiny_sd}),
    "sd3": ("tiny_sd3", {}),
    "flux": ("tiny_flux", {}),
    "schnell": ("tiny_flux", {"guidance": False}),
    "zimage": ("tiny_zimage", {}),
    "sana": ("tiny_sana", {}),
    "klein": ("tiny_flux2", {}),
    "qwen": ("tiny_qwenimage", {}),
    "lumina2": ("tiny_lumina2", {}),
    "auraflow": ("tiny_auraflow", {}),
    "chroma": ("tiny_chroma", {}),
}
"""What builds a tiny model of each, and with which settings."""
PRESETS = {name: f"{name}-lora" for name in FAMILIES if not name.startswith("sd")} | {"sd3": "sd35-lora"}
"""Of a LoRA."""
UNGUIDED = {"zimage": 0.0}
"""The scale that is no guidance, where that is not 1."""
SIDES = {"SanaPipeline": 32}
"""Pixels that the pipeline draws, where they are not 16."""
ASKED: dict[str, dict[str, Any]] = {"SanaPipeline": {"use_resolution_binning": False}}
"""What a call must ask for to get an image of its size."""
GRIDS: dict[str, Any] = {"Flux2KleinPipeline": flux2.unpacked}
"""How tokens that a pipeline steps go on the VAE's grid, where they are none of what it gives as latents."""
CPU, CAPTIONS = torch.device("cpu"), ["a red fox", "a hare in a field, tall grass, evening light"]


class Killed(BaseException):
    """Stands for the end of the process: nothing of the trainer catches it."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build, settings = FAMILIES[request.param]
    return Path(getattr(tiny_models, build)(tmp_path_factory.mktemp(request.param) / "model", **settings))


@pytest.fixture(scope="module")
def family(folder: Path) -> Any:
    return load_family(ModelConfig(str(folder)), CPU, torch.float32)


def side_of(pipeline: Any) -> int:
    return SIDES.get(type(pipeline).__name__, 16)


def asked_of(pipeline: Any) -> dict[str, Any]:
    if type(pipeline).__name__ == "FluxPipeline" and not pipeline.transformer.config.guidance_embeds:
        return {"max_sequence_length": 256}  # schnell's; the pipeline's own is dev's
    return ASKED.get(type(pipeline).__name__, {})


def pipeline_of(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae_scale_factor = 4  # one of them takes it for 8, whatever its VAE
    if type(pipeline).__name__ == "ChromaPipeline":  # which adds its mask of text to logits instead
        embed = pipeline._get_t5_prompt_embeds

        def with_mask(*args: Any, **options: Any) -> Any:
            embeds, mask = embed(*args, **options)
            return embeds, mask > 0

        pipeline._get_t5_prompt_embeds = with_mask
    return pipeline


def guided(pipeline: Any, scale: float, count: int = 1) -> dict[str, Any]:
    """What a call is given for guidance."""
    if type(pipeline).__name__ == "QwenImagePipeline":
        return {"true_cfg_scale": scale, "negative_prompt": [" "] * count}
    return {"guidance_scale": scale}


def against(pipeline: Any, prompt: str) -> dict[str, Any]:
    """What a call is given of a negative prompt."""
    if "negative_prompt" in inspect.signature(type(pipeline).__call__).parameters:
        return {"negative_prompt": prompt}
    return {"negative_prompt_embeds": pipeline.encode_prompt(prompt)[0]}


def text_of(family: Any, captions: list[str]) -> dict[str, torch.Tensor]:
    """As a batch has it."""
    return {name: padded(list(rows)) for name, rows in family.encode_text(captions).items()}


def denoised(family: Any, denoiser: Any) -> torch.Tensor:
    """What a denoiser makes of fixed latents and a caption."""
    noisy = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(3))
    text, extra = text_of(family, CAPTIONS[:1]), {"sizes": torch.full((1, 6), 16.0)}
    with torch.no_grad():
        found: torch.Tensor = family.denoise(denoiser, noisy, family.schedule.at([300]), text, extra)
    return found


def watched(pipeline: Any, family: Any, height: int, width: int) -> list[tuple[torch.Tensor, Any, torch.Tensor]]:
    """Latents, time and output of each call of the denoiser, on the VAE's grid and in the schedule's terms."""
    calls: list[tuple[torch.Tensor, Any, torch.Tensor]] = []
    denoiser, step = getattr(pipeline, family.kind.networks[0]), pipeline.scheduler.step

    def grid(latents: torch.Tensor) -> torch.Tensor:
        if type(pipeline).__name__ in GRIDS:
            return GRIDS[type(pipeline).__name__](latents, height // 4, width // 4)
        return family.latent_space.from_raw(family.to_raw(family.vae, latents, height, width))

    def spy(output: torch.Tensor, t: Any, latents: torch.Tensor, **options: Any) -> Any:
        calls.append((grid(latents), t, grid(output)))
        return step(output, t, latents, **options)

    if family.kind.is_transformer:
        pipeline.scheduler.step = spy
    else:  # whose samplers may scale what the denoiser is given
        denoiser.register_forward_hook(lambda _, given, options, out: calls.append((*given, out[0])), with_kwargs=True)
    return calls


@pytest.mark.parametrize("caption", CAPTIONS)
def test_denoise_gives_what_the_pipelines_own_call_gives(
    folder: Path, family: Any, caption: str, request: pytest.FixtureRequest
) -> None:
    none = UNGUIDED.get(request.node.callspec.params["folder"], 1.0)
    pipeline, side = pipeline_of(folder), side_of(family.pipeline)
    height, width = (24, 40) if side == 16 else (2 * side, 3 * side)
    calls = watched(pipeline, family, height, width)
    with torch.no_grad():
        options = {"height": height, "width": width, "num_inference_steps": 3} | guided(pipeline, none)
        pipeline(prompt=caption, **options, output_type="latent", **asked_of(pipeline))
    extra = {"sizes": torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)}
    text = text_of(family, [caption])
    assert len(calls) >= 2
    for latents, t, theirs in calls[-2:]:
        levels = family.schedule.at([float(t)])
        with torch.no_grad():
            ours = family.denoise(family.denoiser.eval(), latents, levels, text, extra)
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_batch_is_what_its_samples_are(family: Any) -> None:
    """Captions of several lengths together, each with its own image, are as each of them alone."""
    noisy = torch.randn((2, 4, 6, 4), generator=torch.Generator().manual_seed(4))
    levels, extra = family.schedule.at([300, 700]), {"sizes": torch.full((2, 6), 16.0)}
    with torch.no_grad():
        both = family.denoise(family.denoiser.eval(), noisy, levels, text_of(family, CAPTIONS), extra)
        for n, caption in enumerate(CAPTIONS):
            own = {name: value[n : n + 1] for name, value in extra.items()}
            alone = family.denoise(
                family.denoiser, noisy[n : n + 1], levels[n : n + 1], text_of(family, [caption]), own
            )
            torch.testing.assert_close(both[n : n + 1], alone, rtol=1e-5, atol=1e-5)


def test_sampled_and_decoded_image_is_the_pipelines(folder: Path, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "steps", 4)
    family.prepare_prompt(CAPTIONS[0], "blurred")
    pipeline, side = pipeline_of(folder), side_of(family.pipeline)
    raw = family.sample(family.denoiser.eval(), CAPTIONS[0], "blurred", seed=7, resolution=side)
    expected = pipeline(
        prompt=CAPTIONS[0],
        **guided(pipeline, family.guidance) | against(pipeline, "blurred"),
        height=side,
        width=side,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(7),
        **asked_of(pipeline),
    ).images[0]
    assert raw.shape == (1, 4, side // 4, side // 4)
    assert np.abs(np.asarray(family.decode(raw), int) - np.asarray(expected, int)).max() <= 1


def test_images_of_an_evaluation_are_the_pipelines(folder: Path) -> None:
    sampler, pipeline = load_for_sampling(ModelConfig(str(folder)), torch.float32, CPU), pipeline_of(folder)
    side = side_of(pipeline)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(n) for n in (3, 4)]

    for guidance in (1.0, 3.0):
        (found, expected) = (
            sampler(CAPTIONS, generators(), 2, guidance, side),
            pipeline(
                prompt=CAPTIONS,
                generator=generators(),
                num_inference_steps=2,
                **guided(pipeline, guidance, 2),
                height=side,
                width=side,
                output_type="np",
                **asked_of(pipeline),
            ).images,
        )
        theirs = torch.from_numpy(expected).permute(0, 3, 1, 2) * 255
        assert (found - theirs).abs().max() <= 1


def test_lora_loads_into_the_pipeline_and_gives_the_same(
    train: Any, folder: Path, family: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    outputs, cls = [], type(family)
    export = cls.export_lora

    def spy(self: Any, denoiser: Any, into: Path) -> None:
        outputs.append(denoised(family, denoiser.eval()))
        export(self, denoiser, into)

    monkeypatch.setattr(cls, "export_lora", spy)
    preset = PRESETS.get(request.node.callspec.params["folder"])
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": folder,
        "rank": 2,
        "lora_alpha": 6,
        "max_train_steps": 3,
    }
    if preset is not None:  # all of it that a tiny model can take
        options |= {"mixed_precision": "no", "buckets": False, "lpl_t_threshold": None, "lpl_weight": "auto"}
    run = train(*(() if preset is None else ("--config", preset)), **options, learning_rate=1e-2)
    pipeline = pipeline_of(folder)
    before = denoised(family, getattr(pipeline, family.kind.networks[0]).eval())
    pipeline.load_lora_weights(run.folder)
    denoiser = getattr(pipeline, family.kind.networks[0])
    arrived = sum("lora_" in name for name, _ in denoiser.named_parameters())
    assert arrived == len(load_file(run.folder / "pytorch_lora_weights.safetensors")) > 0
    torch.testing.assert_close(denoised(family, denoiser.eval()), outputs[0], rtol=1e-5, atol=1e-5)
    assert (outputs[0] - before).abs().max() > 1e-3
    if family.kind.is_transformer:
        (adapter,) = denoiser.peft_config.values()
        assert adapter.lora_alpha == adapter.r


def test_every_tensor_of_a_lora_of_all_layers_arrives(folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(str(folder), rank=2, lora_targets="all", use_dora=True)  # which has more of them
    own: Any = load_family(config, CPU, torch.float32)
    add_lora(own.denoiser, config, own.lora_targets, 0)
    randomize(own.denoiser)
    own.export_lora(own.denoiser, tmp_path)
    pipeline = pipeline_of(folder)
    pipeline.load_lora_weights(tmp_path)
    trained = {name: value for name, value in own.denoiser.named_parameters() if "lora_" in name}
    found = dict(getattr(pipeline, own.kind.networks[0]).named_parameters())
    for name, value in trained.items():
        assert torch.equal(found[name.replace(".default", ".default_0")], value), name
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert len(load_file(file)) == len(trained)
    # A run that begins with the file has the adapter as it was.
    config = with_lora_weights(ModelConfig(str(folder), lora_weights=str(file)))
    again: Any = load_family(config, CPU, torch.float32)
    add_lora(again.denoiser, config, again.lora_targets, 1)
    begun = {name: value for name, value in again.denoiser.named_parameters() if "lora_" in name}
    assert begun.keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(begun[name], value, rtol=1e-6, atol=0)


def test_five_steps_are_those_of_a_run_that_resumed_after_three(
    train: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"pretrained_model_name_or_path": folder, "max_train_steps": 5}
    options |= {"lpl_budget": 1e4}  # as presets have one; so large that every sample is decoded
    whole = train(**options, output="whole")
    step = Trainer._optimizer_step

    def dying(self: Trainer) -> Any:
        if self.step == 3:
            raise Killed
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimizer_step", dying)
        with pytest.raises(Killed):
            train(**options, output="parts", checkpointing_steps=3)
    parts = train(**options, output="parts", checkpointing_steps=3)
    assert "at step 3 of 5" in caplog.text
    assert any(value > 0 for value in parts.losses()["lpl/loss"].values())
    part = kind_of(ModelConfig(str(folder))).networks[0]
    file = f"{part}/diffusion_pytorch_model.safetensors"
    one, other, before = (load_file(root / file) for root in (whole.folder, parts.folder, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], before[name]) for name in one)
    again = load_family(ModelConfig(str(whole.folder)), CPU, torch.float32)
    assert all(torch.equal(again.denoiser.state_dict()[name], value) for name, value in one.items())


def test_plan_counts_the_model(folder: Path) -> None:
    config = ModelConfig(str(folder))
    plan, pipeline = blueprint(plan_configs(config), config), pipeline_of(folder)
    networks = [plan.denoiser(), plan.vae(), *plan.text_encoders()]
    found = [sum(p.numel() for p in network.parameters()) for network in networks]
    kind = kind_of(config)
    assert found == [sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in kind.networks]
    rehearsal = Rehearsal(plan)
    run = TrainConfig(data=DataConfig(resolution=32), run=RunConfig(mixed_precision="bf16", train_batch_size=2))
    assert rehearsal.latents(run, 2) == (2, 4, 8, 8)
    assert min(rehearsal.denoiser(run).flops, rehearsal.loss(run).flops, rehearsal.caching(run)) > 0


CLIP_L, CLIP_G, T5_XXL, VAE_16 = 123_650_304, 694_659_840, 4_762_310_656, 83_819_683


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        (None, [2_567_463_684]),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", [859_520_964]),
        ("Tongyi-MAI/Z-Image", [6_154_908_736, VAE_16, 4_022_468_096]),
        ("stabilityai/stable-diffusion-3.5-medium", [2_243_171_520, VAE_16, CLIP_L, CLIP_G, T5_XXL]),
        ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", [1_604_462_752]),
        ("Alpha-VLLM/Lumina-Image-2.0", [2_609_769_152, VAE_16, 2_614_341_888]),
        ("lodestones/Chroma1-HD", [8_899_983_424, VAE_16, T5_XXL]),
        ("fal/AuraFlow-v0.3", [6_858_605_568, 83_653_863, 1_223_550_976]),
        ("Qwen/Qwen-Image", [20_430_401_088, 126_892_531, 8_292_166_656]),
        ("black-forest-labs/FLUX.2-klein-base-4B", [3_875_544_576, 84_046_115, 4_022_468_096]),
        ("black-forest-labs/FLUX.1-dev", [11_901_408_320, VAE_16, 123_060_480, T5_XXL]),
        ("black-forest-labs/FLUX.1-schnell", [11_891_178_560, VAE_16, 123_060_480, T5_XXL]),
    ],
)
def test_published_models_have_their_published_size(name: str | None, parameters: list[int]) -> None:
    config = ModelConfig(name)
    plan = blueprint(plan_configs(config), config)
    with torch.device("meta"):
        networks = [plan.denoiser()]
        if len(parameters) > 1:
            networks += [plan.vae(), *plan.text_encoders()]
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == parameters
