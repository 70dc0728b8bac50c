"""`lpl export`: checks first, then loads, merges and writes; a half-written result never has its final name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from lpl.base.errors import UserError, require
from lpl.base.files import alone_at
from lpl.config import MetadataConfig, ModelConfig
from lpl.config.command_line import load_config
from lpl.config.files import is_config_of_run, read_record
from lpl.config.model_commands import ExportConfig
from lpl.config.run_folder import CONFIG_FILE, PATTERN, SAVED
from lpl.families import as_trained, check_export, kind_of

LORA_FILE = "pytorch_lora_weights.safetensors"
INDEX_FILE = "model_index.json"
MODEL_FLAG = "--pretrained_model_name_or_path"


class Request(NamedTuple):
    """What is to be written."""

    model: ModelConfig
    lora: Path | None
    flag: str
    """The option or file that named the model, for errors."""
    said: Mapping[str, str] = {}
    """Metadata that the run was given for the files of its result."""


def resolve(options: ExportConfig, scratch: Path | None = None) -> Request:
    """The model and the LoRA that the options name.

    Args:
        scratch: folder for the LoRA of a checkpoint; None: checkpoints are refused.

    Raises:
        UserError: an unfinished run, a folder that is not one of a result, or options that would have no effect.
    """
    folder = Path(options.source)
    if PATTERN.fullmatch(folder.name) and (folder.parent / CONFIG_FILE).is_file():
        if scratch is None:
            raise UserError(f"{folder}: a checkpoint; make a file or folder of it first (lpl export)")
        return _of_checkpoint(folder, options, scratch)
    lora = None if options.lora is None else _lora_file(Path(options.lora))
    own = folder / LORA_FILE
    if not own.is_file() or (folder / INDEX_FILE).is_file():
        if (folder / CONFIG_FILE).is_file() and not (folder / INDEX_FILE).is_file():
            raise UserError(f"{folder}: an unfinished run; the same `lpl train` command finishes it")
        if folder.name.startswith(f"{SAVED}-") and (inside := sorted(f for f in folder.glob("*") if f.is_dir())):
            raise UserError(f"{folder}: a saved step; name {' or '.join(map(str, inside))}")
        require(options.base is None, f"--base belongs to a run that trained a LoRA; {folder} is a model itself")
        require(
            lora is not None or (options.lora_scale == 1 and options.to != "kohya"),
            f"{'--to kohya' if options.to == 'kohya' else '--lora_scale'} needs a LoRA: give --lora, or the folder of "
            "a run that trained one",
        )
        model = _with(ModelConfig(options.source), options)
        said = _said(folder / CONFIG_FILE) if lora is None else {}
        return Request(model if lora is None else as_trained(model, lora), lora, "", said)
    require(lora is None, f"--lora {options.lora}: {folder} is a LoRA already; merge one after the other")
    file = _config_of(folder)
    if file is None:
        require(options.base is not None, f"{folder}: no {CONFIG_FILE} that names the LoRA's model; give --base")
        return _of_lora(options, as_trained(ModelConfig(), own), own, folder / CONFIG_FILE, {})
    run = load_config(file)
    return _of_lora(options, run.model, own, file, run.metadata.said())


def _said(file: Path) -> dict[str, str]:
    """The metadata options of a run that trained all weights, from its config.yaml."""
    if not is_config_of_run(file):
        return {}
    given, _ = read_record(file)
    return MetadataConfig(**{f.name: given.get(f.name) for f in fields(MetadataConfig)}).said()


def _config_of(folder: Path) -> Path | None:
    """config.yaml of the run whose result, or saved step, is in this folder."""
    above = [folder.parent.parent] if folder.parent.name.startswith(f"{SAVED}-") else []
    return next((path / CONFIG_FILE for path in (folder, *above) if (path / CONFIG_FILE).is_file()), None)


def _of_lora(options: ExportConfig, config: ModelConfig, lora: Path, file: Path, said: Mapping[str, str]) -> Request:
    """A LoRA with the model that a run's config names, or with --base and the run's other options."""
    if options.base is not None:
        kept = ("prediction_type", "rescale_betas_zero_snr", "lora_weights", "merge_lora_weights")
        config = ModelConfig(options.base, **{name: getattr(config, name) for name in kept})
    flag = f"--base (by {file})" if options.base is None else "--base"
    return Request(_with(config, options), lora, flag, said)


def _of_checkpoint(folder: Path, options: ExportConfig, scratch: Path) -> Request:
    from lpl.families.lora_checkpoint import write_lora

    require(options.lora is None, f"--lora {options.lora}: {folder} has a LoRA of its own; merge one after the other")
    file, lora = folder.parent / CONFIG_FILE, scratch / LORA_FILE
    run = load_config(file)
    request = _of_lora(options, run.model, lora, file, run.metadata.said())
    kind = with_flag(request, lambda: kind_of(request.model))
    with_flag(request, lambda: write_lora(folder, run, kind, folder.parent / LORA_FILE, lora))
    return request


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
    _check_output(output, options)
    with tempfile.TemporaryDirectory(prefix="lpl-") as scratch:
        request = resolve(options, Path(scratch))
        with alone_at(output, "--output"):
            _check_output(output, options)  # another command may have written it since
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
    count = _write_file(tensors, output, metadata | dict(request.said))
    return f"{output}: {count} tensors, {output.stat().st_size / 2**20:,.1f} MiB"


def with_flag(request: Request, act: Callable[[], Any]) -> Any:
    """Calls act; in errors about the model, names the option that gave it here."""
    try:
        return act()
    except UserError as error:
        raise UserError(str(error).replace(MODEL_FLAG, request.flag).strip()) from error


def _check_output(output: Path, options: ExportConfig) -> None:
    """Refuses an output that cannot be written; --overwrite allows replacing a file or folder of the same kind."""
    is_folder = options.to == "diffusers"
    if output.is_symlink() or (output.exists() and not options.overwrite):
        raise UserError(f"--output {output}: is there already; name another, or replace it with --overwrite")
    if output.exists():
        inputs = (options.source, options.base, options.lora, options.pretrained_vae_model_name_or_path)
        for read in (Path(name).resolve() for name in inputs if name is not None):
            own = output.resolve()
            beside = own.parent == read and own.name != LORA_FILE  # nothing else in such a folder is read
            if own == read or own in read.parents or (read in own.parents and not beside):
                raise UserError(f"--output {output}: --overwrite would replace what is read ({read}): name another")
        known = (output / INDEX_FILE).is_file() or not any(output.iterdir()) if output.is_dir() else output.is_file()
        if output.is_dir() != is_folder or not known:
            what = "diffusers folder" if is_folder else "file"
            raise UserError(f"--output {output}: is no {what}, so --overwrite does not replace it: name another")
    if not is_folder and output.suffix != ".safetensors":
        raise UserError(f"--output {output}: the file's name must end in .safetensors")
    above = next(folder for folder in (output.absolute()).parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--output {output}: {above} is no folder that can be written to")


def _write_kohya(request: Request, output: Path) -> str:
    from lpl.families import kohya_lora

    assert request.lora is not None
    lora = request.lora
    tensors, metadata = with_flag(request, lambda: kohya_lora(lora, request.model, output.stem))
    count = _write_file(tensors.items(), output, metadata | dict(request.said))
    whose = ", magnitudes as ComfyUI and Forge alone read them" if any("dora" in name for name in tensors) else ""
    return f"{output}: {count} tensors of kohya's naming{whose}"


def _write_file(tensors: Any, output: Path, metadata: dict[str, str]) -> int:
    from safetensors import SafetensorError

    from lpl.base.tensor_file import write_tensors

    try:
        return write_tensors(tensors, output, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output {output}: cannot be written ({error})") from error


def _write_folder(model: Any, output: Path) -> None:
    temporary = output.with_name(f".{output.name}.lpl-tmp")
    replaced = output.with_name(f".{output.name}.lpl-old")
    shutil.rmtree(temporary, ignore_errors=True)
    if replaced.exists() and not output.exists():
        replaced.rename(output)  # an earlier export was interrupted here
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        model.save_folder(temporary)
        if output.exists():
            output.rename(replaced)
        temporary.rename(output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
