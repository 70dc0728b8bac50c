"""Weights for inference: every N steps beside the checkpoints, and as the result; each folder says what it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from lpl.training.checkpoint import RESULT
from lpl.training.weights import Weights
from lpl.written_files import FINISHED

SAVED = "saved"
CONTENTS = "weights.json"


def save_weights(folder: Path, step: int, weights: Weights, write: Callable[[Path], None], writes: bool = True) -> Path:
    """Writes folder/saved-<step>/raw and, with an average, /ema, each as inference loads it; training is undisturbed.

    weights.json beside them has the step, the kinds that are there, and which of them the run's result is made of.
    The folder appears whole, or not at all.

    Args:
        folder: the run's output folder.
        step: optimizer steps done.
        weights: of the run.
        write: writes the denoiser, or its adapter, as it is then, into a folder; every process calls it.
        writes: whether this is the process that writes.
    """
    final = folder / f"{SAVED}-{step}"
    temporary = folder / f".tmp-{final.name}"
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
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    return final


def save_result(
    folder: Path, step: int, weights: Weights, write: Callable[[Path], None], writes: bool, data: str
) -> None:
    """Writes the result, of the weights that --final_weights names, into the output folder, and says that it is there.

    Args:
        folder: the run's output folder.
        step: optimizer steps done.
        weights: of the run; those of the result stay in place.
        write: writes the pipeline or the adapter into a folder; every process calls it.
        writes: whether this is the process that writes.
        data: digest of the samples that the run was trained on.
    """
    weights.put(weights.final)
    temporary = folder / RESULT
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    if not writes:
        return
    for part in temporary.iterdir():
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        part.replace(target)
    temporary.rmdir()
    marker = folder / f".tmp-{FINISHED}"
    marker.write_text(json.dumps({"step": step, "weights": weights.final, "data": data}))
    marker.replace(folder / FINISHED)
