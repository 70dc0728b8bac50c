"""Checks whether an SDXL model can be trained correctly: its files, and the values in its configs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.families import sdxl_configs
from lpl.families.files import (
    FIRST_STAGE,
    FLAG,
    SINGLE_FILES,
    UNET,
    VAE_FLAG,
    check_complete,
    check_inputs,
    check_original,
    checked_header,
    other_vae,
    reader,
)
from lpl.families.kind import Kind, check_clip_skip
from lpl.families.schedulers import chosen_schedule, compare_lora, file_schedule, is_flow, prediction_of
from lpl.families.sdxl_configs import check_shape

PIPELINE = "StableDiffusionXLPipeline"
VAE = "AutoencoderKL"
WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
EDM = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
FIRST_TEXT, SECOND_TEXT = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


def model_configs(config: ModelConfig) -> dict[str, Any]:
    """Refuses a model that this trainer cannot train correctly.

    Returns:
        The configs that were read, by component ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2"); for a
        single file those of --single_file_config, or nothing.

    Raises:
        UserError: what is missing or wrong, in one line.
    """
    name = config.pretrained_model_name_or_path
    if name is None:
        raise UserError(f"{FLAG} is missing: give a diffusers folder, a Hub id or a .safetensors file")
    path = Path(name)
    if path.suffix in SINGLE_FILES:
        check_single_file(path, config)
        if config.single_file_config is None:
            _check_clip_skip(sdxl_configs.PUBLISHED, config)
            _with_vae(sdxl_configs.PUBLISHED, config)
            _with_options(sdxl_configs.PUBLISHED, config)
            return {}
        path, name = Path(config.single_file_config), config.single_file_config
    if config.single_file_config is None and path.is_dir():
        check_complete(path, config.variant, WITH_WEIGHTS, TOKENIZERS)
    configs = _with_options(_read(reader(path, name, config), name), config)
    _check_configs(configs, config)
    return _with_vae(configs, config)


def plan_configs(config: ModelConfig) -> dict[str, Any]:
    """The configs of a model for `lpl plan`: no weights are needed, and configs of the published model are not read.

    The published configs of SDXL base 1.0 are used for no model, for its Hub id, and for a single file whose UNet has
    as many parameters.

    Raises:
        UserError: a model of another kind, or one whose configs cannot be read.
    """
    name = config.pretrained_model_name_or_path
    if name is None or (name == sdxl_configs.NAME and not Path(name).exists()):
        _check_clip_skip(sdxl_configs.PUBLISHED, config)
        return _with_options(sdxl_configs.PUBLISHED, config)
    path = Path(name)
    if path.suffix == ".safetensors":
        check_single_file(path, config)
        if config.single_file_config is None:
            _check_clip_skip(sdxl_configs.PUBLISHED, config)
            return _with_options(SDXL_KIND.published_of(path), config)
        path, name = Path(config.single_file_config), config.single_file_config
    configs = _with_options(_read(reader(path, name, config), name), config)
    _check_configs(configs, config)
    return configs


def _with_options(configs: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The configs with the schedule that a single file and the options ask for."""
    return configs | {"scheduler": chosen_schedule(configs["scheduler"], config)}


def _read(read: Any, name: str) -> dict[str, Any]:
    files = {part: f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
    files["scheduler"] = "scheduler/scheduler_config.json"
    index = read("model_index.json")
    check_shape("model_index.json", index, f"{FLAG} {name}: model_index.json")
    cls = index.get("_class_name")
    if cls is None or cls.startswith("StableDiffusionXL"):  # other classes lack these files
        configs = {part: read(files[part]) for part in ("unet", "vae", "scheduler")}
    if index.get("requires_aesthetics_score") or (index.get("text_encoder") or [None])[0] is None:
        raise UserError(f"{FLAG} {name}: an SDXL refiner (no first text encoder); train the base model")
    if cls != PIPELINE and not (isinstance(cls, str) and cls.startswith("StableDiffusionXL")):
        raise UserError(f"{FLAG} {name}: model_index.json says {cls}; this trainer needs {PIPELINE}")
    if configs["unet"].get("addition_embed_type") != "text_time":
        raise UserError(f"{FLAG} {name}: the UNet lacks SDXL's size conditioning (addition_embed_type text_time)")
    configs |= {part: read(files[part]) for part in ("text_encoder", "text_encoder_2")}
    for part, found in configs.items():
        check_shape(files[part], found, f"{FLAG} {name}: {files[part]}")
    return configs


def _check_configs(configs: dict[str, Any], config: ModelConfig) -> None:
    name = config.pretrained_model_name_or_path
    unet, vae, scheduler = configs["unet"], configs["vae"], configs["scheduler"]
    channels, latent_channels = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    kind = vae.get("_class_name", VAE)
    if kind != VAE:
        raise UserError(f"{FLAG} {name}: its VAE is {kind}; this trainer needs {VAE}")
    if channels == 9 and latent_channels == 4:
        raise UserError(
            f"{FLAG} {name}: an inpainting model (9 input channels); this trainer needs a text-to-image one"
        )
    if channels != latent_channels:
        raise UserError(f"{FLAG} {name}: the UNet takes {channels} channels, the VAE's latents have {latent_channels}")
    kind = str(scheduler.get("_class_name"))
    if kind.startswith("EDM"):
        raise UserError(f"{FLAG} {name}: its scheduler is {kind}; EDM schedules are not trained right here yet")
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction", "sample") and not is_flow(scheduler):
        raise UserError(f"{FLAG} {name}: prediction type {prediction_type} is not trained here; see --prediction_type")
    if scheduler.get("rescale_betas_zero_snr") and prediction_type == "epsilon":
        raise UserError(
            f"{FLAG} {name}: epsilon prediction with a zero-terminal-SNR schedule says nothing at its last timestep; "
            "use --prediction_type v_prediction or a scheduler with rescale_betas_zero_snr false"
        )
    _check_clip_skip(configs, config)


def _check_clip_skip(configs: dict[str, Any], config: ModelConfig) -> None:
    check_clip_skip(configs, config)
    depth = int(configs["text_encoder"].get("num_hidden_layers", 12))
    if config.train_text_encoder and config.rank is not None and (config.clip_skip or 0) >= depth - 1:
        raise UserError(
            f"--clip_skip {config.clip_skip or 0} with --train_text_encoder: no layer of the model's text_encoder "
            "acts, so there is none for a LoRA; give less"
        )


def _with_vae(configs: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The configs with that of --pretrained_vae_model_name_or_path, where it is given."""
    vae = other_vae(config, VAE, configs["unet"].get("in_channels", 4))
    if vae is None:
        return configs
    check_shape("vae/config.json", vae, f"{VAE_FLAG} {config.pretrained_vae_model_name_or_path}: config.json")
    return configs | {"vae": vae}


def check_single_file(path: Path, config: ModelConfig) -> None:
    """Refuses a single file that is no complete SDXL checkpoint, or that cannot be trained correctly.

    Raises:
        UserError: what it is, in one line.
    """
    where = f"{FLAG} {path}"
    header = checked_header(path, where)
    whole = _has_second(header) and all(any(key.startswith(part) for key in header) for part in (UNET, FIRST_TEXT))
    check_inputs(header, where)
    if header and not whole:
        raise UserError(f"{where}: {_what_else(header)}")
    check_original(path, config)
    edm = [key for key in EDM if key in header]
    if edm:
        raise UserError(f"{where}: an EDM model ({', '.join(edm)}), whose schedule is not trained right here yet")
    file_schedule(path, config)


def _what_else(header: Mapping[str, Any]) -> str:
    """Says what a file is that is no SDXL checkpoint."""
    keys = list(header)
    if "conditioner.embedders.0.model.ln_final.weight" in header:
        return "an SDXL refiner; train the base model"
    if any("lora_" in key for key in keys):
        return "a LoRA, not a model; give the model that it belongs to"
    text = any(key.startswith(("conditioner.", "cond_stage_model.")) for key in keys)
    unet = any(key.startswith((UNET, "input_blocks.", "down_blocks.", "double_blocks.")) for key in keys)
    if unet and not text:
        return (
            "not an SDXL checkpoint but a UNet or transformer alone, without text encoders; give a whole one, or a "
            "diffusers folder that has it as its unet"
        )
    if not unet and not text and any(key.startswith((FIRST_STAGE, "decoder.")) for key in keys):
        return f"a VAE alone; give it with {VAE_FLAG}, beside a model"
    lacking = "UNet" if not unet else "first text encoder" if _has_second(header) else "second text encoder"
    return f"not an SDXL checkpoint (no {lacking})"


def _has_second(header: Mapping[str, Any]) -> bool:
    return f"{SECOND_TEXT}ln_final.weight" in header


class SDXLKind(Kind):
    """SDXL, whose single files are known, and whose configs are checked value by value."""

    def owns(self, header: Mapping[str, Any]) -> bool:
        return _has_second(header)

    def model_configs(self, config: ModelConfig) -> dict[str, Any]:
        return model_configs(config)

    def plan_configs(self, config: ModelConfig) -> dict[str, Any]:
        return plan_configs(config)

    def check_export(self, config: ModelConfig, single_file: bool, lora: Path | None) -> None:
        scheduler = self._scheduler(config)
        if single_file:
            prediction_of(scheduler)
        if lora is not None:
            self.check_lora(config, lora)

    def check_lora(self, config: ModelConfig, lora: Path) -> None:
        self.lora_parts(lora)
        compare_lora(lora, self._scheduler(config))

    def _scheduler(self, config: ModelConfig) -> dict[str, Any]:
        """The scheduler's config of a checked model, by its files and the options."""
        known = model_configs(config)
        return dict((known or _with_options(sdxl_configs.PUBLISHED, config))["scheduler"])

    def native_resolution(self, configs: Mapping[str, Any]) -> int:
        if not configs:
            return self.resolution
        size = configs["unet"].get("sample_size") or 128
        return int(size) * 2 ** (len(configs["vae"].get("block_out_channels", [1] * 4)) - 1)


SDXL_KIND = SDXLKind(
    name="SDXL",
    pipelines=(PIPELINE, "StableDiffusionXL"),
    loaded_with={"add_watermarker": False},
    module="sdxl",
    base="SDXL base 1.0",
    base_name=sdxl_configs.NAME,
    networks=WITH_WEIGHTS,
    tokenizers=TOKENIZERS,
    is_transformer=False,
    patch=1,
    comfyui_folder="models/checkpoints",
    options=frozenset({"clip_skip", "max_token_length", "train_text_encoder", "text_encoder_2_lr"}),
    trained_text=("text_encoder", "text_encoder_2"),
    parameters=sdxl_configs.UNET_PARAMETERS,
    lora_starts={
        "unet": ("unet.", "lora_unet_"),
        "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
        "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
    },
    parts={
        "Model": "sdxl:SDXL",
        "PUBLISHED": "sdxl_configs:PUBLISHED",
        "Plan": "sdxl_networks:SDXLBlueprint",
        "Export": "sdxl_export:SDXLExport",
        "to_kohya": "sdxl_names:to_kohya",
        "kohya_layer": "sdxl_names:kohya_layer",
    },
)
