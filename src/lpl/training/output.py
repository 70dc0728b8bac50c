"""The folder of a run: what a run writes into it, whether it may, and whether what lies there is whole."""

from __future__ import annotations

import logging
from pathlib import Path

from lpl.base.errors import UserError
from lpl.base.output_folder import Names, OutputFolder, Proof, check_apart, matches
from lpl.config import TrainConfig
from lpl.config.files import differences, is_config_of_run, read_record
from lpl.config.run import processes
from lpl.config.run_folder import (
    BAD_FILES,
    CHECKPOINT,
    CONFIG_FILE,
    FINISHED,
    MANIFEST,
    NONFINITE,
    RESULT,
    SAMPLES,
    SAVED,
    VALIDATION,
    find_checkpoint,
    read_finished,
    unlisted,
)
from lpl.data.bad_files import is_list
from lpl.families import RESULT_NAMES

logger = logging.getLogger("lpl")

KOHYA, COMFYUI = "_kohya.safetensors", "_comfyui.safetensors"
"""Ends of the names of files: a LoRA with the names that kohya's programs give its layers, and a DoRA."""
LONGEST = 200
"""Most bytes of a folder's name that go into a file's name, which may have 255."""
COMMAND = "lpl train"
INPUTS = (
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "single_file_config", "train_data_dir",
    "dataset_name", "reg_data_dir", "validation_data_dir", "mask_dir", "validation_prompts", "lora_weights",
)  # fmt: skip
"""Options that may name what a run reads."""


def lora_name(folder: Path, end: str, which: str | None = None) -> str:
    """The name of a LoRA's file, as ComfyUI and others show it: that of the run's folder, and `which` file it is."""
    name = folder.resolve().name.encode()[:LONGEST].decode(errors="ignore")
    return (name if which is None else f"{name}-{which}") + end


def output_of(config: TrainConfig) -> OutputFolder:
    """The folder of a run."""
    return OutputFolder(config.run.output_dir, COMMAND)


def names_of(config: TrainConfig, every: bool = False) -> Names:
    """What a run writes into its folder.

    Args:
        every: also the names that these options do not use.

    Raises:
        UserError: --logging_dir is another of these names.
    """
    log, data = config.logging, config.data
    kept = {
        CONFIG_FILE: is_config_of_run,
        FINISHED: lambda path: finished_at(path.parent) is not None,
        BAD_FILES: is_list,
        f"{CHECKPOINT}#/": lambda path: (path / MANIFEST).is_file(),
        **dict.fromkeys((f".tmp-{CHECKPOINT}#/", f".tmp-old-{CHECKPOINT}#/", f".tmp-{SAVED}-#/", f"{RESULT}/")),
        **dict.fromkeys((f"{NONFINITE}#.safetensors", f"{NONFINITE}#-process-#.safetensors")),
    }
    optional = {
        f"{SAMPLES}/": log.draws_images,
        VALIDATION: log.draws_images or data.holds_out,
        "README.md": log.push_to_hub,
    }
    loras = (lora_name(Path(config.run.output_dir), end) for end in (KOHYA, COMFYUI))
    results = (*RESULT_NAMES, *loras, f"{SAVED}-#/")
    if any(matches(name, Path(log.logging_dir).parts[0]) for name in (*kept, *optional, *results)):
        raise UserError(f"--logging_dir {log.logging_dir}: a run writes something else of that name: choose another")
    optional[f"{Path(log.logging_dir).parts[0]}/"] = log.report_to in ("tensorboard", "all")
    kept |= dict.fromkeys(name for name, used in optional.items() if used or every)
    return Names(kept, results)


def claim_output(config: TrainConfig) -> None:
    """Records in the run's folder which names are the run's from now on."""
    folder = output_of(config)
    folder.claim(names_of(config, every=True), _adopts(folder))


def check_inputs_apart(config: TrainConfig) -> None:
    """Refuses a folder inside one of --train_data_dir, --reg_data_dir and --validation_data_dir."""
    folder, options = Path(config.run.output_dir), config.flat()
    for flag in ("train_data_dir", "reg_data_dir", "validation_data_dir"):
        images = options[flag]
        if images is not None and folder.resolve().is_relative_to(Path(images).resolve()):
            raise UserError(
                f"--output_dir {folder} lies in --{flag} {images}: its pictures would be taken for training images; "
                "name a folder outside"
            )


def as_begun(config: TrainConfig) -> TrainConfig:
    """The options, with what the run in the folder, if there is one, has chosen in the place of "auto"."""
    file = Path(config.run.output_dir) / CONFIG_FILE
    if config.lpl.lpl_dtype != "auto" or not is_config_of_run(file):
        return config
    return config.changed(lpl_dtype=read_record(file)[0].get("lpl_dtype", "float32"))


def check_output(config: TrainConfig, tell: bool = True) -> int | None:
    """Refuses a folder that a run cannot begin or go on in.

    Args:
        tell: warn in the log of what is unusual but allowed.

    Returns:
        The step at which the very same run has ended there; None: it has not.

    Raises:
        UserError: what a run reads would be overwritten, or a run of other options is there.
    """
    folder, names = Path(config.run.output_dir), names_of(config, every=True)
    check_inputs_apart(config)
    check_apart(folder, (*names.kept, *names.results), {flag: config.flat()[flag] for flag in INPUTS})
    model = config.model.pretrained_model_name_or_path
    if model is not None and folder.resolve().is_relative_to(Path(model).resolve()):
        part = folder.resolve().relative_to(Path(model).resolve()).parts[0]
        if f"{part}/" in RESULT_NAMES:
            raise UserError(f"--output_dir {folder} lies in the {part} of the model {model}: name a folder outside")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: a file is in the way")
    warn = logger.warning if tell else logger.debug
    choice = config.run.resume_from_checkpoint
    if choice not in (None, "latest"):
        _check_same_schedule(config, find_checkpoint(folder, choice, read=False))
    if not (folder / CONFIG_FILE).is_file():
        if choice == "latest":
            warn("--resume_from_checkpoint latest: %s holds no run yet, starting one", folder)
        return None
    changed = differences(config, folder, processes())
    if config.optim.lr_scheduler in ("constant", "constant_with_warmup", "piecewise_constant"):
        # The length does not enter these schedules: a run may be prolonged.
        changed = [c for c in changed if not c.startswith(("--max_train_steps ", "--num_train_epochs "))]
    if changed and not config.run.allow_changes:
        raise UserError(
            f"--output_dir {folder} holds a run of another configuration: {', '.join(changed)}; "
            "choose another folder or the same options, or continue it all the same with --allow_changes"
        )
    if changed:
        warn("--allow_changes: %s continues with %s", folder, ", ".join(changed))
    step = finished_at(folder)
    if step is not None and (gone := _missing(output_of(config))) is not None:
        warn("%s: the run had ended, but %s is missing: it goes on from its last checkpoint", folder, gone)
        return None
    return step


def _check_same_schedule(config: TrainConfig, checkpoint: Path | None) -> None:
    """Refuses another run's checkpoint that learned another prediction or another noise schedule."""
    other = None if checkpoint is None else checkpoint.resolve().parent
    if other is None or other == Path(config.run.output_dir).resolve() or not (other / CONFIG_FILE).is_file():
        return
    options = ("--prediction_type ", "--rescale_betas_zero_snr ")
    changed = [told for told in differences(config, other, processes()) if told.startswith(options)]
    if changed and not config.run.allow_changes:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: its run was of another schedule: {', '.join(changed)}; give the "
            "same options, or continue it all the same with --allow_changes"
        )


def check_writable(config: TrainConfig) -> None:
    """Refuses, before anything loads, a folder in which a run would replace what no run wrote."""
    folder = output_of(config)
    folder.check(names_of(config), _adopts(folder))
    for path in sorted(folder.folder.glob(f"{CHECKPOINT}*")):
        if (extra := unlisted(path)) is not None:
            raise UserError(
                f"--output_dir {folder.folder}: {path.name}/{extra} in it was not written by {COMMAND}, which removes "
                "old checkpoints: move it away"
            )


def finished_at(folder: Path) -> int | None:
    """The step at which the run in a folder ended, or None."""
    found = read_finished(folder)
    return None if found is None else int(found["step"])


def _adopts(output: OutputFolder) -> Proof:
    """Tells what a run of a version without records has written; a result only if that run had ended."""
    folder = output.folder
    is_run = is_config_of_run(folder / CONFIG_FILE)
    had_result = finished_at(folder) is not None or (folder / RESULT).is_dir()
    return lambda path: is_run and (had_result or not any(matches(name, path.name) for name in RESULT_NAMES))


def _missing(output: OutputFolder) -> str | None:
    """The part of an ended run's result that is missing; None: nothing is."""
    folder = output.folder
    if output.has_record:
        return output.missing()
    return None if any((folder / name).is_file() for name in RESULT_NAMES if not name.endswith("/")) else "its result"
