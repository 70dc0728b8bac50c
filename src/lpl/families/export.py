"""`lpl export`: checks first, then loads, merges and writes; what is half written never has the result's name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lpl.base.errors import UserError, require
from lpl.base.files import alone_at
from lpl.config import ModelConfig
from lpl.config.command_line import load_config
from lpl.config.model_commands import ExportConfig
from lpl.config.run_folder import CONFIG_FILE
from lpl.families import as_trained, check_export

LORA_FILE = "pytorch_lora_weights.safetensors"
INDEX_FILE = "model_index.json"
MODEL_FLAG = "--pretrained_model_name_or_path"


class Request(NamedTuple):
    """What is to be written."""

    model: ModelConfig
    lora: Path | None
    flag: str
    """How to call the model in an error."""


def resolve(options: ExportConfig) -> Request:
    """The model and the LoRA that the options name.

    Raises:
        UserError: an unfinished run, a folder that is none, or options that cannot act.
    """
    folder = Path(options.source)
    lora = None if options.lora is None else _lora_file(Path(options.lora))
    own = folder / LORA_FILE
    if not own.is_file() or (folder / INDEX_FILE).is_file():
        if (folder / CONFIG_FILE).is_file() and not (folder / INDEX_FILE).is_file():
            raise UserError(f"{folder}: an unfinished run; the same `lpl train` command finishes it")
        require(options.base is None, f"--base belongs to a run that trained a LoRA; {folder} is a model itself")
        require(
            lora is not None or (options.lora_scale == 1 and options.to != "kohya"),
            f"{'--to kohya' if options.to == 'kohya' else '--lora_scale'} needs a LoRA: give --lora, or the folder of "
            "a run that trained one",
        )
        model = _with(ModelConfig(options.source), options)
        return Request(model if lora is None else as_trained(model, lora), lora, "")
    require(lora is None, f"--lora {options.lora}: {folder} is a LoRA already; merge one after the other")
    if not (folder / CONFIG_FILE).is_file():
        require(options.base is not None, f"{folder}: no {CONFIG_FILE} that names the LoRA's model; give --base")
    known = (folder / CONFIG_FILE).is_file()
    config = load_config(folder / CONFIG_FILE).model if known else as_trained(ModelConfig(), own)
    if options.base is not None:
        schedule = {name: getattr(config, name) for name in ("prediction_type", "rescale_betas_zero_snr")}
        config = ModelConfig(options.base, **schedule)
    flag = f"--base (by {folder / CONFIG_FILE})" if options.base is None else "--base"
    return Request(_with(config, options), own, flag)


def _with(config: ModelConfig, options: ExportConfig) -> ModelConfig:
    vae = options.pretrained_vae_model_name_or_path
    return replace(
        config,
        pretrained_vae_model_name_or_path=vae or config.pretrained_vae_model_name_or_path,
        variant=options.variant or config.variant,
        single_file_config=options.single_file_config or config.single_file_config,
    )


def _lora_file(path: Path) -> Path:
    if path.is_dir():
        require((path / LORA_FILE).is_file(), f"--lora {path}: no {LORA_FILE} in it")
        return path / LORA_FILE
    require(path.is_file(), f"--lora {path}: no such file")
    require(path.suffix == ".safetensors", f"--lora {path}: only .safetensors is read")
    return path


def export(options: ExportConfig) -> str:
    """Writes what the options ask for.

    Returns:
        A line that says what was written.

    Raises:
        UserError: bad input, in one line; --output is as it was.
    """
    output = Path(str(options.output))
    _check_output(output, options.to)
    request = resolve(options)
    with alone_at(output, "--output"):
        _check_output(output, options.to)  # another command may have written it since
        return _write(options, request, output)


def _write(options: ExportConfig, request: Request, output: Path) -> str:
    if options.to == "kohya":
        return _write_kohya(request, output)
    with_flag(request, lambda: check_export(request.model, options.to == "safetensors", request.lora))
    import torch

    from lpl.families import load_for_export

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = with_flag(request, lambda: load_for_export(request.model, dtype, request.lora, options.lora_scale))
    if options.to == "diffusers":
        _write_folder(model, output)
        return f"{output}: a diffusers folder"
    tensors, metadata = model.single_file(output.stem)
    count = _write_file(tensors, output, metadata)
    return f"{output}: {count} tensors, {output.stat().st_size / 2**20:,.1f} MiB"


def with_flag(request: Request, act: Callable[[], Any]) -> Any:
    """Calls act; errors about the model name the option that it came by here."""
    try:
        return act()
    except UserError as error:
        raise UserError(str(error).replace(MODEL_FLAG, request.flag).strip()) from error


def _check_output(output: Path, to: str) -> None:
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output}: is there already; name another or remove it")
    if to != "diffusers" and output.suffix != ".safetensors":
        raise UserError(f"--output {output}: the file's name must end in .safetensors")
    above = next(folder for folder in (output.absolute()).parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--output {output}: {above} is no folder that can be written to")


def _write_kohya(request: Request, output: Path) -> str:
    from lpl.families import kohya_lora

    assert request.lora is not None
    lora = request.lora
    tensors, metadata = with_flag(request, lambda: kohya_lora(lora, request.model, output.stem))
    count = _write_file(tensors.items(), output, metadata)
    return f"{output}: {count} tensors of kohya's naming"


def _write_file(tensors: Any, output: Path, metadata: dict[str, str]) -> int:
    from safetensors import SafetensorError

    from lpl.base.tensor_file import write_tensors

    try:
        return write_tensors(tensors, output, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output {output}: cannot be written ({error})") from error


def _write_folder(model: Any, output: Path) -> None:
    temporary = output.with_name(f".{output.name}.lpl-tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_folder(temporary)
        temporary.rename(output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
