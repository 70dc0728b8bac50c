"""The command `lpl`. Nothing heavy is imported until a command's options have been checked."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
from dataclasses import dataclass, field
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, Literal

import tyro

from lpl import __version__
from lpl.analysis.check.options import CheckConfig
from lpl.comparison.options import CompareConfig
from lpl.config import TrainConfig, require
from lpl.config_io import DATA_REPORT, REFUSED, as_flags, environment, nearest, read_options
from lpl.errors import StopRequestedError, TrainingStoppedError, UserError
from lpl.evaluation.options import EvalConfig
from lpl.exporting.options import ExportConfig
from lpl.presets import list_presets, preset_text, presets
from lpl.report.options import ReportConfig

COMMANDS = {
    "train": "fine-tune a model with the Latent Perceptual Loss",
    "cache": "encode a run's images and captions beforehand; `cache verify` and `cache prune` look after the cache",
    "plan": "say what memory and arithmetic a run needs, and what fits a GPU: no data, no weights",
    "data": "read the images through, report on them and draw what the model will see: no weights",
    "check": "measure on a few images whether LPL can work: precisions, VAE, gate, weight, cost of a step",
    "export": "write a result for other programs: one file for ComfyUI and A1111, a merged folder, a kohya LoRA",
    "compare": "run sets of options on the same draws, and say whether any makes a measurable difference",
    "report": "write one HTML page about runs, comparisons, evaluations and checks",
    "eval": "samples of a model, or images, against real ones: distances, precision and recall, spectrum",
    "demo": "train a small SDXL on photographs: runs anywhere, needs no download",
    "presets": "list what --config and `accelerate launch --config_file` can begin with; `presets NAME` prints one",
    "env": "print the versions that matter in a bug report",
}

MOST_SHOWN = 300
UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class PlanConfig:
    """Say what a run needs, and what it would need with one option changed; no data and no weights are read.

    Takes every option of `lpl train`. Without --pretrained_model_name_or_path: SDXL base 1.0.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    memory: str = "24GiB"
    """Memory of the GPU: 24GiB or 24 (2^30 bytes each), 24GB (10^9)."""
    num_processes: int | None = None
    """GPUs; unset: as launched, or one."""
    sharding: Literal["none", "fsdp2"] = "none"
    """How they share the model: each has it whole, or it is split over them."""

    def __post_init__(self) -> None:
        require(self.memory_bytes > 0, f"--memory must be above 0, not {self.memory}")
        number = self.num_processes
        require(number is None or number >= 1, f"--num_processes must be at least 1, not {number}")

    @property
    def memory_bytes(self) -> int:
        """Memory of the GPU in bytes.

        Raises:
            UserError: no size.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|MiB|MB)?", self.memory, re.IGNORECASE)
        if found is None:
            raise UserError(f"--memory {self.memory}: expected a size such as 24GiB, 24GB or 24 (GiB)")
        number, unit = found.groups()
        return int(float(number) * UNITS[(unit or "GiB").lower()])


@dataclass(frozen=True)
class VerifyConfig:
    """Read every file of a cache and compare checksums; damage exits with 2."""

    latent_cache_dir: str | None = None
    """The cache; unset: the user's."""
    delete: bool = False
    """Remove what is damaged; the next run encodes it again."""


@dataclass(frozen=True)
class PruneConfig:
    """Remove from a cache what no run has used for a while."""

    latent_cache_dir: str | None = None
    """The cache; unset: the user's."""
    days: float = 30.0
    """For how long it must not have been used; 0: everything goes."""
    dry_run: bool = False
    """Only say what would go."""

    def __post_init__(self) -> None:
        require(self.days >= 0, f"--days must be 0 or more, not {self.days}")


@dataclass(frozen=True)
class DataReportConfig:
    """Read all images once, report on them and draw what the model will see; no weights are needed, nothing is cached.

    Takes every option of `lpl train`. Writes to OUTPUT_DIR/data-report. Streams are read anew for what is drawn.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    num_shown: int = 24
    """Draws on the contact sheet, the first of the run; 0: no pictures."""

    def __post_init__(self) -> None:
        require(0 <= self.num_shown <= MOST_SHOWN, f"--num_shown must lie in 0..{MOST_SHOWN}, not {self.num_shown}")


@dataclass(frozen=True)
class DemoConfig:
    """Fine-tune a small but real SDXL on photographs with LPL, or export its parts."""

    output_dir: str = "lpl-demo"
    """Where model, data and result go."""
    export_model: str | None = None
    """Only write the small SDXL to this folder, in diffusers' format."""
    export_data: str | None = None
    """Only write its photographs to this folder, with metadata.jsonl."""
    max_train_steps: int | None = None
    """Optimizer steps; unset: the preset's."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Exits with 0, 2 (bad input), 3 (training had to stop), 4 (stopped by a signal or --max_minutes, nothing is lost; the
    same command continues) or 130 (interrupted at once).
    """
    # transformers warns at import about image packages that nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Where torchao is installed diffusers imports all of it, which complains about kernels that nothing here needs.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _dispatch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        _fail(error, 2)
    except TrainingStoppedError as error:
        _fail(error, 3)
    except StopRequestedError as stop:
        _fail(stop, 4, "")
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _fail(error: Exception, code: int, kind: str = "error: ") -> None:
    # One process of a launch speaks for all.
    if os.environ.get("RANK", "0") == "0":
        print(f"{kind}{error}", file=sys.stderr)
    sys.exit(code)


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: lpl COMMAND [options]\n\nlpl {__version__}: Latent Perceptual Loss\n\ncommands:")
        print("\n".join(f"  {name:7} {text}" for name, text in COMMANDS.items()))
        print("\n`lpl COMMAND --help` lists its options.")
    elif argv[0] == "--version":
        print(__version__)
    elif argv[0] == "train":
        config = parse_train(argv[1:])
        run_train(config)
    elif argv[0] == "cache":
        run_cache(argv[1:])
    elif argv[0] == "plan":
        options = parse_plan(argv[1:])
        from lpl.analysis.plan import plan
        from lpl.training.launch import as_launched

        with as_launched(options.num_processes, options.sharding == "fsdp2"):
            print(plan(options.train, options.memory_bytes))
    elif argv[0] == "data":
        run_data(parse_data(argv[1:]))
    elif argv[0] == "check":
        check = _parse_options(CheckConfig, argv[1:], "lpl check", [*TrainConfig().flat(), "num_images"])
        # Read when torch loads: threads that wait sleep, instead of spinning on cores that others use.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from lpl.analysis.check.run import run_check

        run_check(check)
    elif argv[0] == "export":
        run_export(argv[1:])
    elif argv[0] == "compare":
        from lpl.comparison.run import run_compare

        run_compare(parse_compare(argv[1:]), parse_train, run_train)
    elif argv[0] == "report":
        from lpl.report.page import write_report

        write_report(_parse(ReportConfig, argv[1:], "lpl report", list(ReportConfig.__dataclass_fields__)))
    elif argv[0] == "eval":
        evaluation = _parse(EvalConfig, argv[1:], "lpl eval", [*EvalConfig.__dataclass_fields__, "no_floor"])
        from lpl.evaluation.command import run_eval

        run_eval(evaluation, lambda file: parse_train(["--config", str(file)]).model)
    elif argv[0] == "demo":
        demo = _parse(DemoConfig, argv[1:], "lpl demo", list(DemoConfig.__dataclass_fields__))
        from lpl.demo.run import run_demo

        run_demo(demo.output_dir, demo.export_model, demo.export_data, demo.max_train_steps)
    elif argv[0] == "presets":
        print(preset_text(argv[1]) if len(argv) == 2 else list_presets())
    elif argv[0] == "env":
        print("\n".join(f"{key}: {value}" for key, value in environment().items()))
    else:
        raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], list(COMMANDS))}; known: {', '.join(COMMANDS)}")


def run_train(config: TrainConfig) -> None:
    """Checks everything that is cheap to check, then trains, or prints the plan under --dry_run."""
    from lpl.training.preflight import preflight

    checked = preflight(config)
    config = checked.config
    if config.run.dry_run:
        from lpl.analysis.plan import describe

        print(describe(config, checked))
    elif checked.has_ended:
        print(f"nothing to do: {config.run.output_dir} holds this run, finished at step {checked.finished_step}")
    else:
        from lpl.training.trainer import train

        train(config, checked)


def run_cache(argv: list[str]) -> None:
    """Fills the cache of a run, or verifies or prunes a cache."""
    if argv[:1] == ["verify"]:
        verify = _parse(VerifyConfig, argv[1:], "lpl cache verify", list(VerifyConfig.__dataclass_fields__))
        from lpl.data.upkeep import verify_cache

        verify_cache(verify.latent_cache_dir, verify.delete)
    elif argv[:1] == ["prune"]:
        prune = _parse(PruneConfig, argv[1:], "lpl cache prune", list(PruneConfig.__dataclass_fields__))
        from lpl.data.upkeep import prune_cache

        prune_cache(prune.latent_cache_dir, prune.days, prune.dry_run)
    else:
        if argv and not argv[0].startswith("-"):
            raise UserError(f"unknown command cache {argv[0]!r}{nearest(argv[0], ['verify', 'prune'])}")
        config = _parse_options(TrainConfig, argv, "lpl cache", list(TrainConfig().flat()))
        from lpl.training.caching import fill_cache

        fill_cache(config)


def run_export(argv: list[str]) -> None:
    """Writes a model or a run's result in another form, and says what was written."""
    options = _parse(ExportConfig, argv, "lpl export", list(ExportConfig.__dataclass_fields__))
    from lpl.exporting.export import export

    print(export(options, lambda file: parse_train(["--config", str(file)]).model))


def run_data(options: DataReportConfig) -> None:
    """Reads the data through, writes the report and the pictures, and prints the report.

    Raises:
        UserError: bad input; where a run would refuse the data, only after the report.
    """
    from lpl.training.preflight import check_data

    folder = Path(options.train.run.output_dir) / DATA_REPORT
    checked = check_data(options.train, folder)
    from lpl.data.report import make_report

    printed, fault = make_report(checked.config, checked.source, checked.regularisation, folder, options.num_shown)
    encoding = sys.stdout.encoding or "utf-8"
    print(printed.encode(encoding, "backslashreplace").decode(encoding))
    if fault is not None:
        raise fault


def parse_train(argv: list[str]) -> TrainConfig:
    """Options of `lpl train`: --config (a file or preset) first, flags after it win.

    Raises:
        UserError: an unknown, refused or malformed option, or values that fail the config's checks.
    """
    return _parse_options(TrainConfig, argv, "lpl train", list(TrainConfig().flat()))


def parse_plan(argv: list[str]) -> PlanConfig:
    """Options of `lpl plan`: those of `lpl train`, --memory, --num_processes and --sharding.

    Raises:
        UserError: as parse_train, or a --memory that is no size.
    """
    return _parse_options(PlanConfig, argv, "lpl plan", [*TrainConfig().flat(), "memory", "num_processes", "sharding"])


def parse_compare(argv: list[str]) -> CompareConfig:
    """Options of `lpl compare`: those of `lpl train`, and its own.

    Raises:
        UserError: as parse_train, or nothing to compare.
    """
    own = [name for name in CompareConfig.__dataclass_fields__ if name != "train"]
    return _parse_options(CompareConfig, argv, "lpl compare", [*TrainConfig().flat(), *own])


def parse_data(argv: list[str]) -> DataReportConfig:
    """Options of `lpl data`: those of `lpl train`, and --num_shown.

    Raises:
        UserError: as parse_train, or a --num_shown that is out of range.
    """
    return _parse_options(DataReportConfig, argv, "lpl data", [*TrainConfig().flat(), "num_shown"])


def _parse_options(cls: Any, argv: list[str], prog: str, known: list[str]) -> Any:
    argv, config_name = _take_config(argv)
    base = [] if config_name is None else as_flags(read_options(config_name))
    intro = cls.__doc__.splitlines()[0]
    help_text = f"{intro} --config FILE-or-preset is read first, flags win. Presets: {', '.join(presets())}."
    return _parse(cls, base + argv, prog, known, help_text)


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    rest, name = [], None
    tokens = iter(argv)
    for token in tokens:
        if token == "--config":
            name = next(tokens, None)
            if name is None:
                raise UserError("--config needs a file or the name of a preset")
        elif token.startswith("--config="):
            name = token.split("=", 1)[1]
        else:
            rest.append(token)
    return rest, name


def _parse(cls: Any, argv: list[str], prog: str, known: list[str], description: str | None = None) -> Any:
    _check_flags(argv, known)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                cls,
                args=argv,
                prog=prog,
                description=description,
                use_underscores=True,
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.PositionalRequiredArgs,
                ),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(errors.getvalue())) from None


def _check_flags(argv: list[str], known: list[str]) -> None:
    for i, token in enumerate(argv):
        if not token.startswith("--") or token == "--help":
            continue
        name = token[2:].split("=", 1)[0].replace("-", "_")
        if name in REFUSED:
            raise UserError(f"--{name} is not taken: {REFUSED[name]}")
        plain = name.removeprefix("no_")
        if name not in known and not _is_switch(plain):
            raise UserError(f"unknown option --{name}{nearest(name, known)}")
        value = token.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
        if value.lower() in ("true", "false") and _is_switch(plain):
            raise UserError(f"--{name} takes no value: write --{plain} or --no_{plain}")


def _is_switch(name: str) -> bool:
    return isinstance(TrainConfig().flat().get(name), bool)


def _one_line(box: str) -> str:
    """The message in tyro's box (drawn or, where stdout is not UTF-8, blank), without title and help, on one line."""

    def is_rule(line: str) -> bool:
        return set(line) <= {"─", "-"}

    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    return " ".join(takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines)))
