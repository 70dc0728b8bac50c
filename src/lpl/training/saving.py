"""Weights for inference: every N steps beside the checkpoints, and as the result; each folder says what it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from torch import Tensor

from lpl.base.output_folder import OutputFolder
from lpl.errors import TrainingStoppedError, UserError
from lpl.exporting.tensor_file import write_tensors
from lpl.training.output import RESULT, SAVED
from lpl.training.weights import Weights
from lpl.written_files import FINISHED

ALL_WEIGHTS = "a folder for diffusers; `lpl export` makes the file for ComfyUI, A1111 and Forge"
"""Which result is for which programs, where all weights were trained."""
CONTENTS = "weights.json"


def save_weights(
    output: OutputFolder, step: int, weights: Weights, write: Callable[[Path], None], writes: bool = True
) -> Path:
    """Writes saved-<step>/raw and, with an average, /ema, each as inference loads it; training is undisturbed.

    weights.json beside them has the step, the kinds that are there, and which of them the run's result is made of.
    The folder appears whole, or not at all.

    Args:
        output: the run's output folder.
        step: optimizer steps done.
        weights: of the run.
        write: writes the denoiser, or its adapter, as it is then, into a folder; every process calls it.
        writes: whether this is the process that writes.
    """
    final = output.folder / f"{SAVED}-{step}"
    temporary = output.folder / f".tmp-{final.name}"
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
    for kind in weights.kinds:
        if writes:
            (temporary / kind).mkdir(parents=True)
        with weights.use(kind):
            write(temporary / kind)
    if writes:
        contents = {"step": step, "kinds": list(weights.kinds), "final": weights.final}
        (temporary / CONTENTS).write_text(json.dumps(contents))
        output.put({final.name: temporary})
    return final


def save_result(
    output: OutputFolder, step: int, weights: Weights, write: Callable[[Path], None], writes: bool, data: str
) -> None:
    """Writes the result, of the weights that --final_weights names, into the output folder, and says that it is there.

    Args:
        output: the run's output folder.
        step: optimizer steps done.
        weights: of the run; those of the result stay in place.
        write: writes the pipeline or the adapter into a folder; every process calls it.
        writes: whether this is the process that writes.
        data: digest of the samples that the run was trained on.

    Raises:
        TrainingStoppedError: something has come into the way since the run began; the result is beside it.
    """
    weights.put(weights.final)
    temporary = output.folder / RESULT
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    if not writes:
        return
    content = json.dumps({"step": step, "weights": weights.final, "data": data}).encode()
    try:
        output.put({part.name: part for part in sorted(temporary.iterdir())}, (FINISHED, content))
    except UserError as error:
        aside = next(path for n in count(1) if not (path := output.folder / f"result-{step}-{n}").exists())
        temporary.rename(aside)
        raise TrainingStoppedError(f"{error}; the result of this run is in {aside}") from error


def write_beside(
    lora: Path, name: str, renamed: Callable[[Path, str], tuple[dict[str, Tensor], dict[str, str]]]
) -> str:
    """Writes a LoRA a second time beside diffusers' file: that one does nothing in ComfyUI, A1111 or kohya's programs.

    Args:
        lora: the file.
        name: of the second.
        renamed: makes its tensors and metadata of the first and of a title.

    Returns:
        Which file is for which programs, or why there is one only.
    """
    try:
        tensors, metadata = renamed(lora, Path(name).stem)
    except UserError as error:
        fault = str(error).removeprefix(f"{lora}: ")
        return f"{lora.name} for diffusers; none for ComfyUI, A1111, Forge and kohya's programs: {fault}"
    write_tensors(tensors.items(), lora.with_name(name), metadata)
    return f"{lora.name} for diffusers; {name} for ComfyUI, A1111, Forge and kohya's programs"
