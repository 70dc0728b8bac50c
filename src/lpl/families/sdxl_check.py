"""Whether an SDXL model can be trained right here: its files, and configs of sizes that a network can have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lpl.base.errors import UserError
from lpl.base.json_files import ANY, NULL, SWITCH, TEXT, Kind, Shape, number, read_object, require_shape, whole
from lpl.config import ModelConfig
from lpl.families import sdxl_configs
from lpl.families.sdxl_file import FLAG, check_single_file, check_weights, chosen_schedule, read_header

SIZE, LAYERS = whole(1, 2**16), whole(1, 256)
SIZES = Kind("a list of 1 to 16 sizes", lambda v: isinstance(v, list) and 1 <= len(v) <= 16 and all(map(SIZE.fits, v)))
ABOVE_0 = number(1e-6, 1e6)
BETA = number(1e-9, 0.9999)

UNET: Shape = {
    "cross_attention_dim": SIZE,
    "addition_time_embed_dim": SIZE,
    "projection_class_embeddings_input_dim": SIZE,
    **{
        f"{name}?": SIZE for name in ("in_channels", "out_channels", "norm_num_groups", "addition_embed_type_num_heads")
    },
    **{f"{name}?": (SIZE, NULL) for name in ("sample_size", "time_embedding_dim", "num_class_embeds")},
    **{f"{name}?": whole(0, 31) for name in ("downsample_padding", "freq_shift")},
    **{f"{name}?": whole(1, 31) for name in ("conv_in_kernel", "conv_out_kernel")},
    **{f"{name}?": ABOVE_0 for name in ("mid_block_scale_factor", "resnet_out_scale_factor")},
    **{f"{name}?": SWITCH for name in ("center_input_sample", "flip_sin_to_cos", "use_linear_projection")},
    **{f"{name}?": [TEXT] for name in ("down_block_types", "up_block_types")},
    "block_out_channels?": SIZES,
    "layers_per_block?": (LAYERS, [LAYERS]),
    "transformer_layers_per_block?": (LAYERS, [(LAYERS, [LAYERS])]),
    "attention_head_dim?": (SIZE, [SIZE]),
    "num_attention_heads?": (SIZE, [SIZE], NULL),
    "norm_eps?": number(0, 1),
    "dropout?": number(0, 0.999),
}
VAE_CONFIG: Shape = {
    "scaling_factor?": ABOVE_0,
    "shift_factor?": (number(-1e6, 1e6), NULL),
    "latents_mean?": ([number(-1e6, 1e6)], NULL),
    "latents_std?": ([ABOVE_0], NULL),
    **{f"{name}?": SIZE for name in ("in_channels", "out_channels", "latent_channels", "norm_num_groups")},
    "sample_size?": (SIZE, SIZES, NULL),
    "block_out_channels?": SIZES,
    **{f"{name}?": [TEXT] for name in ("down_block_types", "up_block_types")},
    "layers_per_block?": LAYERS,
    **{f"{name}?": SWITCH for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")},
}
SCHEDULER: Shape = {
    "num_train_timesteps?": whole(1, 10**5),
    "beta_start?": BETA,
    "beta_end?": BETA,
    "beta_schedule?": TEXT,
    "trained_betas?": ([BETA], NULL),
    "prediction_type?": (TEXT, NULL),
    "rescale_betas_zero_snr?": SWITCH,
    "steps_offset?": whole(0, 10**5),
    "timestep_spacing?": TEXT,
}
TEXT_ENCODER: Shape = {
    **{f"{name}?": SIZE for name in ("hidden_size", "intermediate_size", "num_attention_heads", "projection_dim")},
    "num_hidden_layers?": LAYERS,
    "max_position_embeddings?": whole(3, 2**16),
    "vocab_size?": whole(1, 10**7),
    "layer_norm_eps?": number(0, 1),
    "attention_dropout?": number(0, 0.999),
    "hidden_act?": TEXT,
    "eos_token_id?": whole(0, 2**31),
    **{f"{name}?": (whole(0, 2**31), NULL) for name in ("bos_token_id", "pad_token_id")},
}
INDEX: Shape = {
    "_class_name?": (TEXT, NULL),
    "text_encoder?": ([ANY], NULL),
    "force_zeros_for_empty_prompt?": (SWITCH, NULL),
}
SHAPES = {
    "model_index.json": INDEX,
    "unet/config.json": UNET,
    "vae/config.json": VAE_CONFIG,
    "scheduler/scheduler_config.json": SCHEDULER,
    "text_encoder/config.json": TEXT_ENCODER,
    "text_encoder_2/config.json": TEXT_ENCODER,
}


def check_shape(file: str, found: dict[str, Any], where: str) -> None:
    """Refuses a config with a value that no such model has.

    Args:
        file: by its path in the model's folder.
        found: what it holds.
        where: what errors call it.

    Raises:
        UserError: the key, what it is, and what it must be.
    """
    then = "fetch or write the file anew"
    require_shape(found, SHAPES[file], where, then)
    lists = ("block_out_channels", "down_block_types", "up_block_types")
    lengths = {name: len(found[name]) for name in lists if name in found}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise UserError(f"{where}: {told}, which must be as many of each: {then}")


PIPELINE = "StableDiffusionXLPipeline"
VAE = "AutoencoderKL"
FULL_SIZE = 1024
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def model_configs(config: ModelConfig) -> dict[str, Any]:
    """Refuses a model that this trainer would not train right.

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
    if path.suffix in (".safetensors", ".ckpt", ".pt", ".bin", ".pth"):
        check_single_file(path, config)
        if config.single_file_config is None:
            _check_clip_skip(sdxl_configs.PUBLISHED, config)
            _check_vae(config, sdxl_configs.PUBLISHED)
            _with_options(sdxl_configs.PUBLISHED, config)
            return {}
        path, name = Path(config.single_file_config), config.single_file_config
    if config.single_file_config is None and path.is_dir():
        _check_complete(path, config.variant)
    configs = _with_options(_read(_reader(path, name, config), name), config)
    _check_configs(configs, config)
    _check_vae(config, configs)
    return configs


def plan_configs(config: ModelConfig) -> dict[str, Any]:
    """The configs of a model for `lpl plan`: no weights are needed, and nothing is read where they are known.

    No model, SDXL base 1.0 by its Hub id, and a single file with as many parameters as its UNet: its published configs.

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
            return _with_options(_configs_of_file(path), config)
        path, name = Path(config.single_file_config), config.single_file_config
    configs = _with_options(_read(_reader(path, name, config), name), config)
    _check_configs(configs, config)
    return configs


def _with_options(configs: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The configs with the schedule that a single file and the options ask for."""
    return configs | {"scheduler": chosen_schedule(configs["scheduler"], config)}


def _configs_of_file(path: Path) -> dict[str, Any]:
    header = read_header(path) or {}
    shapes = [entry["shape"] for key, entry in header.items() if key.startswith("model.diffusion_model.")]
    found = sum(math.prod(shape) for shape in shapes)
    if found != sdxl_configs.UNET_PARAMETERS:
        raise UserError(
            f"{FLAG} {path}: its UNet has {found:,} parameters, not the {sdxl_configs.UNET_PARAMETERS:,} of SDXL base: "
            "a plan needs --single_file_config, a folder with its configs"
        )
    return sdxl_configs.PUBLISHED


def _reader(path: Path, name: str, config: ModelConfig) -> Any:
    """What reads a JSON file of the model, by its path in the model's folder."""
    flag = FLAG if config.single_file_config is None else "--single_file_config"
    if path.is_dir():
        return lambda file: _read_json(path / file, flag)
    if path.exists():
        raise UserError(f"{flag} {name}: a file, but not .safetensors; give that or a diffusers folder")
    if config.single_file_config is not None or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{flag} {name}: no such folder")
    return _hub_reader(config)


def native_resolution(configs: dict[str, Any]) -> int:
    """Pixels that a model was made for: what its pipeline draws by default; SDXL's 1024 where no config is at hand."""
    if not configs:
        return FULL_SIZE
    size = configs["unet"].get("sample_size") or 128
    return int(size) * 2 ** (len(configs["vae"].get("block_out_channels", [1] * 4)) - 1)


def _read(read: Any, name: str) -> dict[str, Any]:
    files = {part: f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
    files["scheduler"] = "scheduler/scheduler_config.json"
    index = read("model_index.json")
    check_shape("model_index.json", index, f"{FLAG} {name}: model_index.json")
    configs = {part: read(files[part]) for part in ("unet", "vae", "scheduler")}
    cls = index.get("_class_name")
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


def _hub_reader(config: ModelConfig) -> Any:
    def read(file: str) -> Any:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        name = config.pretrained_model_name_or_path
        try:
            found = hf_hub_download(str(name), file, revision=config.revision, cache_dir=config.cache_dir)
        except LocalEntryNotFoundError as error:
            raise UserError(f"{FLAG} {name}: no such folder, and the Hub cannot be reached for {file}") from error
        except (EntryNotFoundError, HfHubHTTPError) as error:
            raise UserError(
                f"{FLAG} {name}: no such folder, and not on the Hub: {str(error).splitlines()[0]}"
            ) from error
        return _read_json(Path(found), FLAG)

    return read


def _read_json(file: Path, flag: str) -> dict[str, Any]:
    return read_object(file, f"{flag}:")


def _check_complete(folder: Path, variant: str | None) -> None:
    if not (folder / "model_index.json").is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"{FLAG} {folder}: no model_index.json, so no diffusers model; it holds {inside}")
    missing = [name for name in COMPONENTS if not (folder / name).is_dir()]
    for name in WITH_WEIGHTS:
        if name in missing:
            continue
        if not (folder / name / "config.json").is_file():
            missing.append(f"{name}/config.json")
        found = list((folder / name).glob("*.safetensors"))
        weights = [f for f in found if (f".{variant}" in f.name if variant else f.name.count(".") == 1)]
        for file in weights:
            if (header := read_header(file)) is None:
                missing.append(f"the end of {name}/{file.name}")
            else:
                check_weights(header, f"{FLAG} {folder}: {name}/{file.name}")
        if not weights:
            others = list((folder / name).glob("*.bin"))
            hint = " (only .bin, which is not read: convert it to safetensors)" if others else ""
            hint = f" (only {found[0].name}: give its --variant)" if found else hint
            missing.append(f"{name}/*.safetensors{hint}")
    for name in ("tokenizer", "tokenizer_2"):
        if name not in missing and not any((folder / name / f).is_file() for f in ("tokenizer.json", "vocab.json")):
            missing.append(f"{name}/tokenizer.json")
    if "scheduler" not in missing and not (folder / "scheduler" / "scheduler_config.json").is_file():
        missing.append("scheduler/scheduler_config.json")
    if missing:
        raise UserError(f"{FLAG} {folder}: missing in it: {', '.join(missing)}")


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
    if kind.startswith("EDM") or "FlowMatch" in kind:
        raise UserError(
            f"{FLAG} {name}: its scheduler is {kind}; EDM and flow schedules are not trained right here yet"
        )
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"{FLAG} {name}: prediction type {prediction_type} is not trained here; see --prediction_type")
    if scheduler.get("rescale_betas_zero_snr") and prediction_type == "epsilon":
        raise UserError(
            f"{FLAG} {name}: epsilon prediction with a zero-terminal-SNR schedule says nothing at its last timestep; "
            "use --prediction_type v_prediction or a scheduler with rescale_betas_zero_snr false"
        )
    _check_clip_skip(configs, config)


def _check_clip_skip(configs: dict[str, Any], config: ModelConfig) -> None:
    depths = {part: int(configs[part].get("num_hidden_layers", 12)) for part in ("text_encoder", "text_encoder_2")}
    part = min(depths, key=lambda part: depths[part])
    if config.clip_skip is not None and config.clip_skip >= depths[part]:
        raise UserError(
            f"--clip_skip {config.clip_skip}: the model's {part} has {depths[part]} layers; give less than that"
        )
    if config.train_text_encoder and config.rank is not None and (config.clip_skip or 0) >= depths["text_encoder"] - 1:
        raise UserError(
            f"--clip_skip {config.clip_skip or 0} with --train_text_encoder: no layer of the model's text_encoder "
            "acts, so there is none for a LoRA; give less"
        )


def _check_vae(config: ModelConfig, configs: dict[str, Any]) -> None:
    name = config.pretrained_vae_model_name_or_path
    if name is None or not Path(name).exists():
        if name is not None and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
            raise UserError(f"--pretrained_vae_model_name_or_path {name}: no such folder")
        return
    file = Path(name) / "config.json"
    if not file.is_file():
        raise UserError(f"--pretrained_vae_model_name_or_path {name}: no config.json in it")
    vae = _read_json(file, "--pretrained_vae_model_name_or_path")
    check_shape("vae/config.json", vae, f"--pretrained_vae_model_name_or_path {name}: config.json")
    if vae.get("_class_name", VAE) != VAE:
        raise UserError(f"--pretrained_vae_model_name_or_path {name}: {vae['_class_name']}; this trainer needs {VAE}")
    weights = list(Path(name).glob("*.safetensors"))
    headers = [read_header(file) for file in weights]
    if not weights or None in headers:
        found = f"{weights[0].name} is cut short" if weights else "no .safetensors in it"
        raise UserError(f"--pretrained_vae_model_name_or_path {name}: {found}")
    for header in headers:
        check_weights(header or {}, f"--pretrained_vae_model_name_or_path {name}")
    channels = vae.get("latent_channels", 4)
    if channels != configs["unet"].get("in_channels", 4):
        raise UserError(
            f"--pretrained_vae_model_name_or_path {name}: {channels} latent channels, "
            f"the UNet takes {configs['unet'].get('in_channels', 4)}"
        )
