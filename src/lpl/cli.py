"""The command `lpl`. Nothing heavy is imported until a command's options have been checked."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

from lpl import __version__
from lpl.base.errors import StopRequestedError, TrainingStoppedError, UserError
from lpl.base.terminal import one_line, printable_streams
from lpl.config import TrainConfig, commands
from lpl.config.command_line import completion, parse_compare, parse_options, parse_train
from lpl.config.environment import environment_text
from lpl.config.files import nearest
from lpl.config.model_commands import EvalConfig, ExportConfig
from lpl.config.run_folder import DATA_REPORT
from lpl.presets import list_presets, preset_text

COMMANDS = {
    "train": "fine-tune a model with the Latent Perceptual Loss",
    "cache": "encode a run's images and captions beforehand; `cache verify` and `cache prune` look after the cache",
    "plan": "say what memory and arithmetic a run needs, and what fits a GPU: no data, no weights",
    "data": "read the images through, report on them and draw what the model will see: no weights",
    "check": "measure on a few images whether LPL can work: precisions, VAE, gate, weight, cost of a step",
    "export": "write a result for other programs: one file for ComfyUI and A1111, a merged folder, a kohya LoRA",
    "compare": "run sets of options on the same draws, and say whether any makes a measurable difference",
    "report": "write one HTML page about runs, comparisons, evaluations and checks, or its figures; or watch a run",
    "eval": "samples of a model, or images, against real ones: distances, precision and recall, spectrum",
    "demo": "train a small SDXL on photographs without and with LPL: runs anywhere, needs no download",
    "presets": "list the presets for --config and `accelerate launch --config_file`; `presets NAME` prints one",
    "completion": 'print what lets a shell complete commands and options: eval "$(lpl completion bash)"; zsh, fish',
    "env": "print what a bug report needs: versions, system, GPU, and what is not installed for which feature",
}
OPTIONS = dict.fromkeys(COMMANDS) | {
    "train": TrainConfig,
    "cache": commands.CacheConfig,
    "plan": commands.PlanConfig,
    "data": commands.DataReportConfig,
    "check": commands.CheckConfig,
    "export": ExportConfig,
    "compare": commands.CompareConfig,
    "report": commands.ReportConfig,
    "eval": EvalConfig,
    "demo": commands.DemoConfig,
}
"""The options of each command."""
WITHOUT_OPTIONS = {"presets": " [NAME]", "completion": " bash|zsh|fish", "env": ""}
"""What the commands that have no options take."""
AFTER_INTERRUPTION = {
    **dict.fromkeys(("train", "compare", "demo"), "; the same command continues from the last checkpoint"),
    **dict.fromkeys(("cache", "eval"), "; the same command continues"),
}
OTHERS_WAIT_S = 2.0
"""Seconds that the other processes of a launch wait before they say what failed, for the first to say it."""
ALLOCATOR = "DefaultCPUAllocator"
"""The name in torch's error when the computer's own memory is full."""
OUT_OF_MEMORY = (
    "out of memory: the computer has too little for what the options or files ask for; make them smaller, or see `lpl "
    "plan` with the same options"
)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Exits with 0, 2 (bad input), 3 (had to stop: not finite, disk or GPU memory full), 4 (stopped by a signal or
    --max_minutes, nothing is lost; the same command continues) or 130 (interrupted at once).
    """
    # transformers warns at import about image packages that nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Where torchao is installed diffusers imports all of it, which complains about kernels that nothing here needs.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # diffusers passes it to the Hub's client, which warns of it at every download.
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
    with printable_streams():
        _run(sys.argv[1:] if argv is None else argv)


def _run(argv: list[str]) -> None:
    try:
        _dispatch(argv)
    except UserError as error:
        _fail(error, 2)
    except TrainingStoppedError as error:
        _fail(error, 3)
    except StopRequestedError as stop:
        _fail(stop, 4, "")
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except MemoryError:
        _fail(TrainingStoppedError(OUT_OF_MEMORY), 3)
    except RuntimeError as error:
        if ALLOCATOR in str(error):
            _fail(TrainingStoppedError(OUT_OF_MEMORY), 3)
        if type(error).__name__ != "OutOfMemoryError":  # torch's; without importing it here
            raise
        _out_of_memory(error)
    except KeyboardInterrupt:
        command = next(iter(argv), "")
        print("interrupted" + AFTER_INTERRUPTION.get(command, ""), file=sys.stderr)
        sys.exit(130)


def _fail(error: Exception, code: int, kind: str = "error: ") -> NoReturn:
    # A launcher ends all processes when one ends. If all have failed, the first process reports it and ends the others
    # while they wait here; if the first has not failed, this process has to report.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHERS_WAIT_S)
    for told in error.args if isinstance(error, UserError) else (str(error),):
        print(f"{kind}{one_line(told)}", file=sys.stderr)
    sys.exit(code)


def _out_of_memory(error: Exception) -> NoReturn:
    # Every process reports for itself: it need not be the first process that runs out.
    rank = os.environ.get("RANK")
    where = "" if rank is None else f" in process {rank}"
    said = ". ".join(str(error).split(". ")[:3]).rstrip(".")
    print(
        f"error: out of GPU memory{where} ({one_line(said)}): `lpl plan` with the same options says what takes "
        "how much, and what would fit",
        file=sys.stderr,
    )
    sys.exit(3)


def _dispatch(argv: list[str]) -> None:
    command, rest = (*argv, "--help")[0], argv[1:]
    if command in ("-h", "--help"):
        print(f"usage: lpl COMMAND [options]\n\nlpl {__version__}: Latent Perceptual Loss\n\ncommands:")
        print("\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))
        print("\n`lpl COMMAND --help` lists its options, `lpl train --help all` every one.")
    elif command == "--version":
        print(__version__)
    elif command == "train":
        config = parse_train(rest)
        if config.run.dry_run:
            from lpl.analysis.plan import describe
            from lpl.training.preflight import preflight

            checked = preflight(config)
            print(describe(checked.config, checked))
        else:
            from lpl.training.run import run_train

            run_train(config)
    elif command == "cache":
        _cache(rest)
    elif command == "plan":
        planned = parse_options(commands.PlanConfig, rest, "lpl plan")
        from lpl.analysis.plan import plan
        from lpl.training.launch import as_launched

        with as_launched(planned.num_processes, planned.sharding == "fsdp2"):
            print(plan(planned.train, planned.memory_bytes))
    elif command == "data":
        _data(parse_options(commands.DataReportConfig, rest, "lpl data"))
    elif command == "check":
        check = parse_options(commands.CheckConfig, rest, "lpl check")
        # Read when torch loads: threads that wait sleep, instead of spinning on cores that others use.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from lpl.analysis.check.run import run_check

        run_check(check)
    elif command == "export":
        exported = parse_options(ExportConfig, rest, "lpl export")
        from lpl.families.export import export

        print(export(exported))
    elif command == "compare":
        from lpl.comparison.run import run_compare

        run_compare(parse_compare(rest))
    elif command == "report":
        reported = parse_options(commands.ReportConfig, rest, "lpl report")
        if reported.serve:
            from lpl.report.serve import serve

            serve(reported)
        else:
            from lpl.report.page import write_report

            write_report(reported)
    elif command == "eval":
        evaluation = parse_options(EvalConfig, rest, "lpl eval")
        from lpl.evaluation.command import run_eval

        run_eval(evaluation)
    elif command == "demo":
        demo = parse_options(commands.DemoConfig, rest, "lpl demo")
        from lpl.demo.run import run_demo

        run_demo(demo)
    elif command in WITHOUT_OPTIONS and {"-h", "--help"} & set(rest):
        print(f"usage: lpl {command}{WITHOUT_OPTIONS[command]}\n\n{COMMANDS[command]}")
    elif command == "presets":
        print(preset_text(rest[0]) if len(rest) == 1 else list_presets())
    elif command == "completion":
        print(completion(OPTIONS, (*rest, "")[0]))
    elif command == "env":
        print(environment_text())
    else:
        raise UserError(f"unknown command {command!r}{nearest(command, list(COMMANDS))}; known: {', '.join(COMMANDS)}")


def _cache(argv: list[str]) -> None:
    """Fills the cache of a run, or verifies or prunes a cache."""
    if argv[:1] == ["verify"]:
        verify = parse_options(commands.VerifyConfig, argv[1:], "lpl cache verify")
        from lpl.data.upkeep import verify_cache

        verify_cache(verify.latent_cache_dir, verify.delete)
    elif argv[:1] == ["prune"]:
        prune = parse_options(commands.PruneConfig, argv[1:], "lpl cache prune")
        from lpl.data.upkeep import prune_cache

        prune_cache(prune.latent_cache_dir, prune.days, prune.dry_run)
    else:
        if argv and not argv[0].startswith("-"):
            raise UserError(f"unknown command cache {argv[0]!r}{nearest(argv[0], ['verify', 'prune'])}")
        options = parse_options(commands.CacheConfig, argv, "lpl cache")
        from lpl.training.run import fill_cache

        fill_cache(options.train)


def _data(options: commands.DataReportConfig) -> None:
    """Reads the data through, writes the report and the pictures, prints the report, and only then refuses the data."""
    from lpl.training.preflight import check_data

    folder = Path(options.train.run.output_dir) / DATA_REPORT
    checked = check_data(options.train, folder)
    from lpl.data.report import make_report

    printed, fault = make_report(checked.config, checked.source, checked.regularisation, folder, options.num_shown)
    print(printed)
    if fault is not None:
        raise fault
