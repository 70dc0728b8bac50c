"""Loads a complete diffusers pipeline: missing weights, or parts that do not fit each other, give a one-line error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from lpl.base.errors import UserError
from lpl.base.tensor_file import METADATA, read_header
from lpl.base.terminal import quiet
from lpl.config import ModelConfig
from lpl.families.files import FLAG, INDEX, VAE_FLAG, beside, reader
from lpl.families.kind import Kind
from lpl.families.loading_errors import named
from lpl.families.schedulers import set_schedule
from lpl.families.transformer_file import load_transformer


def load_whole(
    kind: Kind, config: ModelConfig, encoders_only: bool = False, dtypes: Mapping[str, torch.dtype] | None = None
) -> Any:
    """A family's pipeline, with or without its denoiser, with the schedule that model and options give, on the CPU.

    Args:
        encoders_only: leave the denoiser out, where it has its own files.
        dtypes: precision by component. By default float32, and for the text encoders before a transformer, which are
            large, that of their files. A single file with all parts has one, the denoiser's.

    Raises:
        UserError: the model cannot be loaded, or lacks weights.
    """
    transformers.utils.logging.disable_progress_bar()  # a bar per text encoder; the pipeline's own bar stays
    own: dict[str, Any] = dict.fromkeys(kind.networks, torch.float32)
    if kind.is_transformer:
        own |= {part: "auto" for part in kind.networks if part.startswith("text_encoder")}
    own |= dtypes or {}
    name, denoiser = str(config.pretrained_model_name_or_path), kind.networks[0]
    checked, options = kind.networks, dict(kind.loaded_with)
    encoders_only = encoders_only and config.merged_lora is None
    cls = kind.find(kind.pipelines[0]) if kind.own_pipeline else getattr(diffusers, kind.pipelines[0])
    if name.endswith(".safetensors") and not kind.is_transformer:
        local, vae = config.single_file_config, load_vae(kind, config, own["vae"])
        options |= {"config": local, "local_files_only": local is not None, "cache_dir": config.cache_dir}
        with named(FLAG, name):
            pipeline = cls.from_single_file(name, dtype=own[denoiser], **options, **vae)
    else:
        parts = ({denoiser: None} if encoders_only else {}) | load_vae(kind, config, own["vae"])
        if kind.is_single(config) and not encoders_only:
            parts[denoiser] = load_transformer(kind, config, own[denoiser])
        with beside(config) if kind.is_single(config) else nullcontext(config) as whole:
            pipeline = _load_folder(cls, whole, parts, own, **options)
        checked = ("vae",) if encoders_only else (denoiser, "vae")
    with named(FLAG, name):
        check_tokenizers(pipeline, kind.tokenizers)
        require_weights(pipeline, checked)
        if not kind.is_transformer:
            set_schedule(pipeline, config)
    of_images(pipeline.vae, kind)
    if config.merged_lora is not None:
        _merge_own(kind, config, pipeline)
    return pipeline


def of_images(vae: Any, kind: Kind) -> Any:
    """Makes a VAE take and give images where diffusers' class of it takes and gives only videos; returns it."""
    if kind.vae_has_frames and type(vae).__name__ == kind.vae_class:
        vae.__class__ = kind.find(kind.vae_class)
    return vae


def _merge_own(kind: Kind, config: ModelConfig, pipeline: Any) -> None:
    """Merges --lora_weights into a model, in float32."""
    file = Path(str(config.merged_lora))
    parts = kind.lora_parts(file, "--lora_weights")
    networks = [getattr(pipeline, part) for part in parts]
    before = [next(network.parameters()).dtype for network in networks]
    with quiet("diffusers.models.modeling_utils"):  # warns of every change of precision
        for network in networks:
            network.float()
        merge_lora(pipeline, file, 1.0, parts, "--lora_weights")
        for network, dtype in zip(networks, before, strict=True):
            network.to(dtype)


def _load_folder(
    cls: Any, config: ModelConfig, parts: dict[str, Any], dtypes: Mapping[str, Any], **options: Any
) -> Any:
    """A pipeline from a diffusers folder or a Hub id; `parts` are used as given."""
    name = str(config.pretrained_model_name_or_path)
    common: dict[str, Any] = {"cache_dir": config.cache_dir, "revision": config.revision, "variant": config.variant}
    common["use_safetensors"] = True
    with named(FLAG, name):
        index = reader(Path(name), name, config)(INDEX)
        # diffusers loads a model without a text encoder only if None is passed for it.
        text = ("text_encoder", "tokenizer")
        parts |= {part: None for part, found in index.items() if found == [None, None] and part.startswith(text)}
        for part, (library, found) in ((k, v) for k, v in index.items() if isinstance(v, list)):
            if library != "transformers" or not part.startswith("text_encoder") or part in parts:
                continue
            # Loaded separately: a pipeline would silently fill missing weights with random numbers.
            encoder, info = getattr(transformers, found).from_pretrained(
                name, subfolder=part, output_loading_info=True, dtype=dtypes[part], **common
            )
            if info["missing_keys"]:
                raise ValueError(f"{part} lacks the weights {sorted(info['missing_keys'])[:3]}")
            parts[part] = encoder
        others = {part: dtype for part, dtype in dtypes.items() if part not in parts} | {"default": torch.float32}
        return cls.from_pretrained(name, dtype=others, **parts, **common, **options)


def load_vae(kind: Kind, config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The VAE of --pretrained_vae_model_name_or_path as a component; nothing where it is not given."""
    name = config.pretrained_vae_model_name_or_path
    if name is None:
        return {}
    with named(VAE_FLAG, name):
        cls = getattr(diffusers, kind.vae_class)
        vae = cls.from_pretrained(name, dtype=dtype, use_safetensors=True, cache_dir=config.cache_dir)
    return {"vae": vae}


def merge_lora(pipeline: Any, lora: Path, scale: float, parts: Sequence[str], flag: str = "--lora") -> None:
    """Merges a LoRA file into the networks of a pipeline: all of it, or none.

    Raises:
        UserError: diffusers does not load every tensor of the file.
    """
    expected = sum(not key.endswith(".alpha") for key in read_header(lora) if key != METADATA)
    # diffusers warns of every network that the file has nothing for; loaded tensors are counted below.
    with named(flag, str(lora)), quiet("diffusers.loaders.lora_base"), quiet("diffusers.loaders.peft"):
        pipeline.load_lora_weights(str(lora.parent.resolve()), weight_name=lora.name, local_files_only=True)
    arrived = sum("lora_" in name for part in parts for name, _ in getattr(pipeline, part).named_parameters())
    if arrived != expected:
        raise UserError(
            f"{flag} {lora}: of its {expected} tensors diffusers loads {arrived} into this model, so the result would "
            "not be the LoRA's: is it of another kind of model or of a newer format?"
        )
    with named(flag, str(lora)):
        pipeline.fuse_lora(components=list(parts), lora_scale=scale, safe_fusing=True)
    pipeline.unload_lora_weights()


def require_weights(pipeline: Any, parts: Iterable[str]) -> None:
    """Refuses networks with weights that the model's files lack."""
    for part in parts:
        absent = [key for key, weight in getattr(pipeline, part).named_parameters() if weight.is_meta]
        if absent:
            raise ValueError(f"{part} lacks the weights {absent[:3]}")


def check_tokenizers(pipeline: Any, names: Iterable[str]) -> None:
    """Refuses tokenizers whose token ids or number of tokens their text encoders do not support."""
    for name in (name.removeprefix("tokenizer") for name in names):
        tokenizer, encoder = getattr(pipeline, f"tokenizer{name}"), getattr(pipeline, f"text_encoder{name}")
        if encoder is None:
            continue  # left out by the model
        known = encoder.config.get_text_config()
        is_clip = known.model_type.startswith("clip")  # others take texts of any length
        if is_clip and not 3 <= tokenizer.model_max_length <= known.max_position_embeddings:
            raise ValueError(
                f"tokenizer{name} makes {tokenizer.model_max_length:.6g} tokens of a text (model_max_length), its text "
                f"encoder takes {known.max_position_embeddings}"
            )
        special = [getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")]
        given = [token for token in special if token is not None]
        if (is_clip and len(given) < 3) or max([*given, *tokenizer.get_vocab().values()]) >= known.vocab_size:
            raise ValueError(f"tokenizer{name} has tokens that its text encoder, of {known.vocab_size}, does not know")
