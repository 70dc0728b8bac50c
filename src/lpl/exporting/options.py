"""Options of `lpl export`, and what they name: a model, and perhaps a LoRA on it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from lpl.config import ModelConfig
from lpl.config.checks import check_declared, option, require
from lpl.config_io import CONFIG_FILE
from lpl.errors import UserError
from lpl.families import as_trained

LORA_FILE = "pytorch_lora_weights.safetensors"
INDEX_FILE = "model_index.json"


@dataclass(frozen=True)
class ExportConfig:
    """Write a model or the result of a run in the form another program reads.

    --to safetensors: one file as ComfyUI and A1111 read it, a LoRA merged into it. --to diffusers: a folder, a LoRA
    merged into it. --to kohya: a run's LoRA, or that of --lora, as kohya's programs, ComfyUI and A1111 read it.
    """

    source: str = option(MISSING, path=True)
    """A run's folder, a diffusers folder, a Hub id or one .safetensors file."""
    to: Literal["safetensors", "diffusers", "kohya"] = "safetensors"
    """Which form."""
    output: str | None = option(None, path=True)
    """The file to write; for diffusers the folder."""
    base: str | None = option(None, path=True)
    """For a run that trained a LoRA: the model it belongs to; unset: the one in the run's config.yaml."""
    lora: str | None = option(None, path=True)
    """A LoRA file, of diffusers' or kohya's naming, or the folder of a run that trained one."""
    lora_scale: float = 1.0
    """Strength of the LoRA in the merge."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Precision of the result; unset: as the files of the model have it (one on the Hub: float32)."""
    pretrained_vae_model_name_or_path: str | None = option(None, path=True)
    """Another VAE than the model's own: a diffusers folder or a Hub id."""
    variant: str | None = None
    """Variant of the model's weight files, such as fp16."""
    single_file_config: str | None = option(None, path=True)
    """For a .safetensors file without network: a diffusers folder with that model's configs and tokenizers."""

    def __post_init__(self) -> None:
        check_declared(self)
        require(abs(self.lora_scale) < float("inf"), f"--lora_scale must be a number, not {self.lora_scale}")
        require(self.output is not None, "--output is missing: name the file (for --to diffusers the folder) to write")
        if self.to == "kohya":
            for name in ("dtype", "lora_scale", "pretrained_vae_model_name_or_path"):
                idle = getattr(self, name) == ExportConfig.__dataclass_fields__[name].default
                require(idle, f"--{name} acts on a merged model: --to kohya writes the LoRA as it is")


class Request(NamedTuple):
    """What is to be written."""

    model: ModelConfig
    lora: Path | None
    flag: str
    """How to call the model in an error."""


def resolve(options: ExportConfig) -> Request:
    """The model and the LoRA that the options name.

    Args:
        options: of `lpl export`.

    Raises:
        UserError: an unfinished run, a folder that is none, or options that cannot act.
    """
    folder = Path(options.source)
    lora = None if options.lora is None else _lora_file(Path(options.lora))
    own = folder / LORA_FILE
    if not own.is_file() or (folder / INDEX_FILE).is_file():
        if (folder / CONFIG_FILE).is_file() and not (folder / INDEX_FILE).is_file():
            raise UserError(f"{folder}: an unfinished run; the same `lpl train` command finishes it")
        require(options.base is None, f"--base belongs to a run that trained a LoRA; {folder} is a model itself")
        require(
            lora is not None or (options.lora_scale == 1 and options.to != "kohya"),
            f"{'--to kohya' if options.to == 'kohya' else '--lora_scale'} needs a LoRA: give --lora, or the folder of "
            "a run that trained one",
        )
        model = _with(ModelConfig(options.source), options)
        return Request(model if lora is None else as_trained(model, lora), lora, "")
    require(lora is None, f"--lora {options.lora}: {folder} is a LoRA already; merge one after the other")
    if not (folder / CONFIG_FILE).is_file():
        require(options.base is not None, f"{folder}: no {CONFIG_FILE} that names the LoRA's model; give --base")
    from lpl.parsing import load_config

    known = (folder / CONFIG_FILE).is_file()
    config = load_config(folder / CONFIG_FILE).model if known else as_trained(ModelConfig(), own)
    if options.base is not None:
        schedule = {name: getattr(config, name) for name in ("prediction_type", "rescale_betas_zero_snr")}
        config = ModelConfig(options.base, **schedule)
    flag = f"--base (by {folder / CONFIG_FILE})" if options.base is None else "--base"
    return Request(_with(config, options), own, flag)


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
