"""Checks of a model's files before anything loads: JSON from a folder or the Hub, and headers of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lpl.base import tensor_file
from lpl.base.errors import UserError
from lpl.base.json_files import read_object
from lpl.base.tensor_file import METADATA
from lpl.config import ModelConfig

FLAG = "--pretrained_model_name_or_path"
VAE_FLAG = "--pretrained_vae_model_name_or_path"
BESIDE_FLAG = "--single_file_config"
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
WEIGHTS = ("weight", "bias", "embedding", "projection")
"""Endings of weights; other tensors, such as positions and counters, are integers in every model."""
SCALED = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale")
"""Endings of the factors that multiply the weights of scaled fp8."""
INDEX = "model_index.json"
UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
"""How the names of the UNet's weights and of the VAE's begin in the original layout."""
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".bin", ".pth", ".gguf")


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a safetensors file; None where it is none, cannot be read, or is cut short."""
    try:
        return tensor_file.read_header(path)
    except UserError:
        return None


def check_weights(header: Mapping[str, Any], where: str) -> None:
    """Refuses weights whose stored numbers are not their values.

    Args:
        where: the flag and the file, for errors.

    Raises:
        UserError: scaled fp8, weights quantised by bitsandbytes, or integer weights.
    """
    scaled = [key for key in header if key == "scaled_fp8" or key.endswith((*SCALED, ".comfy_quant"))]
    if scaled:
        raise UserError(
            f"{where}: scaled fp8 ({scaled[0]}), whose weights are to be multiplied by factors beside them, which is "
            "not done here; give the model in float16, bfloat16 or float32"
        )
    if packed := [key for key in header if ".bitsandbytes__" in key]:
        raise UserError(
            f"{where}: quantised to {packed[0].rpartition('__')[2]} by bitsandbytes ({packed[0]}); give the model in "
            "float16, bfloat16 or float32"
        )
    odd = [
        key
        for key, entry in header.items()
        if key != METADATA and entry["dtype"] not in FLOATS and key.endswith(WEIGHTS)
    ]
    if odd:
        raise UserError(
            f"{where}: quantised: {len(odd)} weights are no floating-point numbers ({odd[0]} is "
            f"{header[odd[0]]['dtype']}); give the model in float16, bfloat16 or float32"
        )


def checked_header(path: Path, where: str) -> dict[str, Any]:
    """The header of a single file.

    Raises:
        UserError: there is none, or it is of a kind that is not read.
    """
    if path.suffix == ".gguf":
        raise UserError(f"{where}: GGUF, which is quantised, is not read; give the model in bfloat16 as .safetensors")
    if path.suffix != ".safetensors":
        raise UserError(f"{where}: {path.suffix} files are pickles and are not read; convert it to .safetensors")
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    header = read_header(path)
    if header is None:
        raise UserError(f"{where}: not a safetensors file, or cut short")
    return header


def transformer_entries(header: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a single file's header for its denoiser, without the prefix that files with all parts use.

    A file without that prefix holds only the denoiser.
    """
    tensors = {key: entry for key, entry in header.items() if key != METADATA}
    inside = {key.removeprefix(UNET): entry for key, entry in tensors.items() if key.startswith(UNET)}
    return inside or tensors


@contextmanager
def beside(config: ModelConfig) -> Iterator[ModelConfig]:
    """The model that --single_file_config names; errors of the block name that option."""
    others = replace(config, pretrained_model_name_or_path=config.single_file_config, single_file_config=None)
    try:
        yield others
    except UserError as error:
        raise UserError(str(error).replace(FLAG, BESIDE_FLAG)) from error


def check_original(path: Path, config: ModelConfig) -> None:
    """Refuses a single file in the original layout that lacks parts, or whose weights cannot be trained.

    Raises:
        UserError: what it is or lacks, in one line.
    """
    where = f"{FLAG} {path}"
    header = checked_header(path, where)
    if config.single_file_config is not None and not (Path(config.single_file_config) / INDEX).is_file():
        raise UserError(f"--single_file_config {config.single_file_config}: no {INDEX} in it")
    check_weights(header, where)
    check_inputs(header, where)
    if not any(key.startswith(UNET) for key in header):
        raise UserError(f"{where}: no UNet in it ({UNET}...)")
    if not any(key.startswith(FIRST_STAGE) for key in header) and config.pretrained_vae_model_name_or_path is None:
        raise UserError(f"{where}: no VAE in it ({FIRST_STAGE}...); give one with {VAE_FLAG}")


def check_inputs(header: Mapping[str, Any], where: str) -> None:
    """Refuses an inpainting model in the original layout."""
    if header.get(f"{UNET}input_blocks.0.0.weight", {}).get("shape", [])[1:2] == [9]:
        raise UserError(f"{where}: an inpainting model (9 input channels); this trainer needs a text-to-image one")


def unet_parameters(header: Mapping[str, Any]) -> int:
    """The number of parameters of the UNet in a single file of the original layout."""
    return sum(math.prod(entry["shape"]) for key, entry in header.items() if key.startswith(UNET))


def reader(path: Path, name: str, config: ModelConfig) -> Callable[[str], dict[str, Any]]:
    """A function that reads a JSON file of the model, by its path in the model's folder."""
    flag = FLAG if config.single_file_config is None else "--single_file_config"
    if path.is_dir():
        return lambda file: read_json(path / file, flag)
    if path.exists():
        raise UserError(f"{flag} {name}: a file, but not .safetensors; give that or a diffusers folder")
    if config.single_file_config is not None or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{flag} {name}: no such folder")
    return lambda file: read_hub(FLAG, name, file, config.revision, config.cache_dir)


def read_hub(flag: str, name: str, file: str, revision: str | None, cache_dir: str | None) -> dict[str, Any]:
    """A JSON file of a model on the Hub.

    Raises:
        UserError: why it cannot be fetched, in one line.
    """
    from huggingface_hub import errors, hf_hub_download

    where = f"{flag} {name}"
    try:
        found = hf_hub_download(name, file, revision=revision, cache_dir=cache_dir)
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{where}: no such folder, and the Hub cannot be reached for {file}") from error
    except errors.GatedRepoError as error:
        what = f"accept them at https://huggingface.co/{name}, then run `hf auth login`"
        raise UserError(f"{where}: the Hub gives it only to those who have accepted its terms: {what}") from error
    except errors.RepositoryNotFoundError as error:
        what = "check the name; a private one needs `hf auth login`"
        raise UserError(f"{where}: no such folder, and no model that may be read on the Hub: {what}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"--revision {revision}: the Hub has none of this name of {name}") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{where}: the Hub's model has no {file}") from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"{where}: the Hub answers {str(error).splitlines()[0]}") from error
    return read_json(Path(found), flag)


def other_vae(config: ModelConfig, cls: str, channels: int) -> dict[str, Any] | None:
    """The config of --pretrained_vae_model_name_or_path; None where it is not given.

    Args:
        cls: class name of the family's VAEs.
        channels: latent channels that the denoiser takes.

    Raises:
        UserError: there is no VAE, it has another class or other latents, or the folder lacks its weights.
    """
    name = config.pretrained_vae_model_name_or_path
    if name is None:
        return None
    where, folder = f"{VAE_FLAG} {name}", Path(name)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"{where}: no config.json in it")
        vae = read_json(folder / "config.json", VAE_FLAG)
        weights = list(folder.glob("*.safetensors"))
        headers = [read_header(file) for file in weights]
        if not weights or None in headers:
            raise UserError(f"{where}: {f'{weights[0].name} is cut short' if weights else 'no .safetensors in it'}")
        for header in headers:
            check_weights(header or {}, where)
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{where}: no such folder")
    else:
        vae = read_hub(VAE_FLAG, name, "config.json", None, config.cache_dir)
    if vae.get("_class_name", cls) != cls:
        raise UserError(f"{where}: {vae['_class_name']}; this trainer needs {cls}")
    if vae_channels(vae) != channels:
        raise UserError(f"{where}: {vae_channels(vae)} latent channels, the denoiser takes {channels}")
    return vae


def read_json(file: Path, flag: str) -> dict[str, Any]:
    """The object in a JSON file; errors begin with the flag."""
    return read_object(file, f"{flag}:")


def check_complete(folder: Path, variant: str | None, networks: Sequence[str], tokenizers: Sequence[str]) -> None:
    """Refuses a folder that lacks one of a pipeline's parts; networks and tokenizers: the subfolders it needs.

    Raises:
        UserError: all that is missing, in one line.
    """
    if not (folder / INDEX).is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"{FLAG} {folder}: no {INDEX}, so no diffusers model; it holds {inside}")
    missing = [name for name in (*networks, *tokenizers, "scheduler") if not (folder / name).is_dir()]
    for name in networks:
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
    for name in tokenizers:
        if name not in missing and not any((folder / name / f).is_file() for f in ("tokenizer.json", "vocab.json")):
            missing.append(f"{name}/tokenizer.json")
    if "scheduler" not in missing and not (folder / "scheduler" / "scheduler_config.json").is_file():
        missing.append("scheduler/scheduler_config.json")
    if missing:
        raise UserError(f"{FLAG} {folder}: missing in it: {', '.join(missing)}")


def vae_stride(vae: Mapping[str, Any]) -> int | None:
    """Pixels per latent from a VAE's config: every block but the last halves the size; None: not stated."""
    widths = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    halving = vae.get("temperal_downsample")  # for a video VAE: which of the halving blocks also halve time
    blocks = widths or (halving and [*halving, None])
    return 2 ** (len(blocks) - 1) if isinstance(blocks, list | tuple) and 1 <= len(blocks) <= 16 else None


def vae_channels(vae: Mapping[str, Any]) -> int:
    """Latent channels from a VAE's config."""
    return int(vae.get("latent_channels", vae.get("z_dim", 4)))
