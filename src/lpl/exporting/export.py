"""`lpl export`: checks first, then loads, merges and writes; what is half written never has the result's name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lpl.base.locks import alone_at
from lpl.errors import UserError
from lpl.exporting.options import ExportConfig, Request, resolve
from lpl.families import check_export

MODEL_FLAG = "--pretrained_model_name_or_path"


def export(options: ExportConfig) -> str:
    """Writes what the options ask for.

    Args:
        options: of `lpl export`.

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
    from lpl.families import load_for_export

    dtype = _dtype(options.dtype)
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


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _write_kohya(request: Request, output: Path) -> str:
    from lpl.families import kohya_lora

    assert request.lora is not None
    lora = request.lora
    tensors, metadata = with_flag(request, lambda: kohya_lora(lora, request.model, output.stem))
    count = _write_file(tensors.items(), output, metadata)
    return f"{output}: {count} tensors of kohya's naming"


def _write_file(tensors: Any, output: Path, metadata: dict[str, str]) -> int:
    from safetensors import SafetensorError

    from lpl.exporting.tensor_file import write_tensors

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
