"""What all tests share: one thread, no network, a tiny SDXL, pictures, and `lpl train` inside the test's process."""

from __future__ import annotations

import os

# Before torch loads: results of one and of two threads differ in the last digit.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import contextlib
import functools
import gc
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tyro._parsers
from process_state import fresh_process_state

LOSSES = ("diffusion_loss", "train_loss", "lpl/loss", "lpl/weighted_loss", "gradient_norm", "learning_rate")
"""Logged values that belong to the trajectory (the others are times and memory)."""


_describe = tyro._parsers.ParserSpecification.from_callable_or_type
_described: dict[Any, Any] = {}


def described_once(f: Any, **given: Any) -> Any:
    """tyro reads the options of a command whenever it parses: most of the time of a refusal, and always the same."""
    key = f, given["description"]
    if given["parent_classes"]:  # a group of options within a command
        return _describe(f, **given)
    if key not in _described:
        _described[key] = _describe(f, **given)
    return _described[key]


tyro._parsers.ParserSpecification.from_callable_or_type = staticmethod(described_once)  # type: ignore[method-assign]


gc.set_threshold(10_000, 10, 10)  # looking at all that torch and diffusers load took the collector a tenth of all time
os.fsync = lambda _: None  # tests kill processes, and take no computer its power


class Run(NamedTuple):
    """One call of `lpl train`."""

    code: int
    folder: Path
    stdout: str
    stderr: str
    """Warnings included; progress bars too."""

    @property
    def errors(self) -> list[str]:
        """Lines of stderr that begin with 'error:'."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]

    def unet(self) -> dict[str, Any]:
        """Weights of the exported UNet, or the exported LoRA."""
        from safetensors.torch import load_file

        lora = self.folder / "pytorch_lora_weights.safetensors"
        return load_file(lora if lora.is_file() else self.folder / "unet" / "diffusion_pytorch_model.safetensors")

    def checkpoint(self, step: int, part: str) -> dict[str, Any]:
        """Tensors of a checkpoint: part is model, optimizer or ema."""
        from safetensors.torch import load_file

        return load_file(self.folder / f"checkpoint-{step}" / f"{part}.safetensors")

    def logged(self) -> dict[str, dict[int, float]]:
        """TensorBoard's scalars: name -> step -> value."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        # Files of one second are read in the order of their names, in which 10 comes before 9: by time, then, and
        # without taking what the later file holds for logged again (`counts` sees to that).
        folder = str(self.folder / "logs" / "lpl")
        events = EventAccumulator(folder, size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        in_time = {tag: sorted(events.Scalars(tag), key=lambda e: e.wall_time) for tag in events.Tags()["scalars"]}
        return {tag: {e.step: e.value for e in found} for tag, found in in_time.items()}

    def counts(self) -> dict[str, int]:
        """How many values of each name TensorBoard shows; where steps are logged twice, more than in `logged`."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / "logs" / "lpl"), size_guidance={"scalars": 0})
        events.Reload()
        return {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}

    def losses(self) -> dict[str, dict[int, float]]:
        """The logged values that belong to the trajectory."""
        return {name: values for name, values in self.logged().items() if name in LOSSES}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says in one line that the browser's tests were skipped, and why; pytest -q would not."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "browser/" in report.nodeid]
    if skipped:
        reason = str(skipped[0].longrepr[2]).removeprefix("Skipped: ")
        terminalreporter.write_line(f"{len(skipped)} browser tests skipped: {reason}")


def flags_of(options: dict[str, Any]) -> list[str]:
    """Options as flags; a boolean becomes --x or --no_x, None is left out."""
    flags = []
    for name, value in options.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


@functools.cache
def settle() -> None:
    """What the first command loaded stays: the collector does not look at it again."""
    gc.collect()
    gc.freeze()


def call(argv: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `lpl ARGV`; log records count as stderr, as they do for a user."""
    from lpl.cli import main

    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("lpl")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), fresh_process_state():
            main(argv)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        logger.removeHandler(handler)
        settle()
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what several tests read."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def model(shared: Path) -> Path:
    """A tiny random SDXL in diffusers' format; not to be changed."""
    from tiny_models import tiny_sdxl

    return tiny_sdxl(shared / "model")


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    """Six small pictures with captions; not to be changed."""
    from tiny_models import tiny_images

    return tiny_images(shared / "data")


@pytest.fixture(scope="session")
def run_cli() -> Callable[[list[str]], tuple[int, str, str]]:
    """Runs `lpl ARGV`; returns (exit code, stdout, stderr)."""
    return call


@pytest.fixture(scope="session")
def as_flags() -> Callable[[dict[str, Any]], list[str]]:
    """Turns options into flags."""
    return flags_of


@pytest.fixture(scope="session")
def read_run() -> Callable[[Path], Run]:
    """What a run that was started elsewhere left in its folder."""
    return lambda folder: Run(0, folder, "", "")


@pytest.fixture(scope="session")
def base_options(model: Path, data: Path, shared: Path) -> dict[str, Any]:
    """Options that make a short run on the tiny model; LPL acts on most samples."""
    return {
        "pretrained_model_name_or_path": model,
        "train_data_dir": data,
        "latent_cache_dir": shared / "cache",
        "resolution": 16,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "log_every": 1,
        "lpl_weight": 1.0,
        "lpl_norm_type": "channel",
        "lpl_t_threshold": 700,
    }


@pytest.fixture(scope="session")
def train_in(base_options: dict[str, Any]) -> Callable[..., Run]:
    """Runs `lpl train` with base_options, changed by keywords (None leaves an option out), and expects success.

    The first argument is the output folder; further ones are put first on the command line as they are.
    expect_error=True expects a failure instead.
    """

    def run(folder: Path, *argv: str, expect_error: bool = False, **options: Any) -> Run:
        code, out, err = call(["train", *argv, *flags_of({"output_dir": folder, **base_options, **options})])
        assert (code != 0) == expect_error, err
        return Run(code, folder, out, err)

    return run


@pytest.fixture
def train(train_in: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """train_in with an output folder of this test: "out", or what `output` names."""

    def run(*argv: str, output: str = "out", **options: Any) -> Run:
        return train_in(tmp_path / output, *argv, **options)

    return run
