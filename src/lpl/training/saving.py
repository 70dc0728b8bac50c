"""Weights for inference: every N steps beside the checkpoints, and as the result; each folder says what it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from lpl.training.weights import Weights

SAVED = "saved"
CONTENTS = "weights.json"


def save_weights(folder: Path, step: int, weights: Weights, write: Callable[[Path], None]) -> Path:
    """Writes folder/saved-<step>/raw and, with an average, /ema, each as inference loads it; training is undisturbed.

    weights.json beside them has the step, the kinds that are there, and which of them the run's result is made of.
    The folder appears whole, or not at all.

    Args:
        folder: the run's output folder.
        step: optimizer steps done.
        weights: of the run.
        write: writes the denoiser, or its adapter, as it is then, into a folder.
    """
    final = folder / f"{SAVED}-{step}"
    temporary = folder / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    for kind in weights.kinds:
        (temporary / kind).mkdir(parents=True)
        with weights.use(kind):
            write(temporary / kind)
    contents = {"step": step, "kinds": list(weights.kinds), "final": weights.final}
    (temporary / CONTENTS).write_text(json.dumps(contents))
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return final
