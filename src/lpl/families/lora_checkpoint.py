"""Writes a checkpoint of a LoRA run as the file that the run would write at its end."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpl.base.errors import UserError, on_one_line, require
from lpl.base.tensor_file import METADATA
from lpl.config import TrainConfig
from lpl.config.run_folder import damage
from lpl.families.files import read_header
from lpl.families.kind import Kind
from lpl.families.lora_files import ADAPTER, TEXT_MODEL, fold_alpha, lora_metadata, text_module

FINISHED_AT = "ss_training_finished_at"
TRAINED = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)\.default\.weight")


def write_lora(checkpoint: Path, config: TrainConfig, kind: Kind, result: Path, to: Path) -> None:
    """Writes a checkpoint's adapter in diffusers' naming, from the weights that --final_weights names.

    Args:
        config: the run's options.
        result: the run's LoRA file; its metadata are copied if it exists.

    Raises:
        UserError: a damaged checkpoint, one without an adapter, or of an optimizer that does not store its result in
            it.
    """
    require(config.model.rank is not None, f"{checkpoint}: of a full fine-tune; only LoRAs are taken from those")
    require(
        "schedulefree" not in config.optim.optimizer_name.lower().replace("_", ""),
        f"{checkpoint}: {config.optim.optimizer_name} keeps what it trains, not the average that is used: train with "
        "--save_steps, which writes that",
    )
    if (fault := damage(checkpoint)) is not None:
        raise UserError(f"{checkpoint} is damaged ({fault}); name another")
    averaged = config.optim.use_ema and config.optim.final_weights != "raw"
    try:
        tensors = load_file(checkpoint / ("ema.safetensors" if averaged else "model.safetensors"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{checkpoint}: cannot be read ({on_one_line(error)})") from error
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = TRAINED.fullmatch(name)
        if match is None:
            raise UserError(f"{checkpoint}: holds {name}, which is no part of a LoRA")
        module, side = match.groups()
        part, _, inner = module.partition(".")
        if not config.model.train_text_encoder:
            part, inner = kind.networks[0], module
        if part.startswith("text_encoder"):
            inner = text_module(inner)
        end = "" if side == "lora_magnitude_vector" else ".weight"
        found.setdefault(part, {})[f"{inner}.{side}{end}"] = tensor
    adapter: dict[str, Any] = {}
    for part, own in found.items():
        adapter |= {f"{part}.{key}": value for key, value in _configuration(own, config).items()}
        if kind.is_transformer:
            fold_alpha(own, adapter, part)
    step = int(checkpoint.name.rpartition("-")[2])
    facts = lora_metadata(config.model, kind.plan_configs(config.model)["scheduler"]) | config.metadata.said()
    said = (read_header(result) or {}).get(METADATA, {}) if result.is_file() else {}
    facts = {key: text for key, text in said.items() if key != FINISHED_AT} | facts | {"ss_steps": str(step)}
    content = {f"{part}.{name}": tensor.contiguous() for part, own in found.items() for name, tensor in own.items()}
    save_file(content, to, facts | {"format": "pt", ADAPTER: json.dumps(adapter, indent=2, sort_keys=True)})


def _configuration(tensors: dict[str, Tensor], config: TrainConfig) -> dict[str, Any]:
    """peft's configuration of an adapter with these tensors; peft matches the ends of modules' names."""
    end = ".lora_A.weight"
    found = {name.removesuffix(end): value.shape[0] for name, value in tensors.items() if name.endswith(end)}
    ranks = {name.removeprefix(TEXT_MODEL): rank for name, rank in found.items()}
    ((usual, _),) = Counter(ranks.values()).most_common(1)
    return {
        "r": usual,
        "lora_alpha": config.model.alpha,
        "use_dora": config.model.use_dora,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual},
    }
