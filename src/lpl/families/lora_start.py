"""A LoRA that a run continues: the options that its file decides, and its layers matched to a model's."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lpl.base.errors import UserError, require
from lpl.config import ModelConfig
from lpl.families.joint import JointModel
from lpl.families.kind import Kind
from lpl.families.lora_files import text_module
from lpl.families.lora_names import Layer, read_layers, underscored

logger = logging.getLogger("lpl")

FLAG = "--lora_weights"
DECIDED = ("rank", "lora_alpha", "use_dora", "train_text_encoder", "lora_targets")
"""Options that the file decides."""


def with_file(config: ModelConfig, kind: Kind) -> ModelConfig:
    """The options with those that the file decides; where layers differ in rank, the most frequent one.

    Raises:
        UserError: a file that cannot be trained further, or an option that contradicts it.
    """
    file = Path(str(config.lora_weights))
    require(file.is_file() and file.suffix == ".safetensors", f"{FLAG} {file}: no .safetensors file")
    parts, (layers, _) = kind.lora_parts(file, FLAG), read_layers(file)
    of_text = [part for part in parts if part.startswith("text_encoder")]
    require(
        not of_text or "train_text_encoder" in kind.options,
        f"{FLAG} {file}: holds layers of {', '.join(of_text)}, which are not trained in {kind.name}: merge it "
        "(--merge_lora_weights)",
    )
    has_scale = any(layer.magnitude is not None for layer in layers.values())
    in_kohya = any("." not in name for name in layers)
    require(
        not (has_scale and in_kohya),
        f"{FLAG} {file}: a DoRA in kohya's naming, whose magnitudes programs take for different things: give "
        "diffusers' file of it (pytorch_lora_weights.safetensors)",
    )
    sizes = Counter((layer.rank, layer.alpha) for layer in layers.values())
    ((rank, alpha),) = (size for size, _ in sizes.most_common(1))
    found: dict[str, Any] = {
        "rank": rank,
        "lora_alpha": alpha,
        "use_dora": has_scale,
        "train_text_encoder": bool(of_text),
    }
    usual = ModelConfig()
    for name in DECIDED:
        asked, own = getattr(config, name), found.get(name, getattr(usual, name))
        require(
            asked in (own, getattr(usual, name)),
            f"--{name} {asked}: {FLAG} {file} decides that ({own}): drop it, or merge the file (--merge_lora_weights)",
        )
    return replace(config, **found)


def layers_of(config: ModelConfig, kind: Kind, denoiser: Any) -> dict[str, Layer]:
    """The layers of the file by the modules of a denoiser, without those on which no output depends.

    Raises:
        UserError: a layer that the model does not have, or has in another size.
    """
    file = Path(str(config.continued_lora))
    layers, _ = read_layers(file)
    found: dict[str, Layer] = {}
    idle = {id(parameter) for parameter in denoiser.idle()} if isinstance(denoiser, JointModel) else set()
    unused = 0
    for name, names, module in _modules(denoiser, kind):
        layer = next((layers.pop(own) for own in names if own in layers), None)
        if layer is None:
            continue
        shape = _shape(module)
        outputs, inputs = shape[0], math.prod(shape[1:])
        if layer.up.shape[0] != outputs or layer.down[0].numel() != inputs or layer.up[0].numel() != layer.rank:
            raise UserError(
                f"{FLAG} {file}: {name} is {outputs} x {inputs} in the model, and {layer.up.shape[0]} x "
                f"{layer.down[0].numel()} in the file: is it a LoRA of another kind of model?"
            )
        if id(module.weight) in idle:
            unused += 1
            continue
        ones = [1] * (len(shape) - 2)
        down = layer.down.reshape(layer.rank, *shape[1:])
        found[name] = layer._replace(down=down, up=layer.up.reshape(outputs, layer.rank, *ones))
    if layers:
        raise UserError(
            f"{FLAG} {file}: {len(layers)} of its layers are none of this model's, first: {next(iter(layers))}: is it "
            "a LoRA of another kind of model?"
        )
    if unused:
        logger.warning("%s %s: %d of its layers do not act in this model, and are left out", FLAG, file, unused)
    return found


def _shape(module: Any) -> tuple[int, ...]:
    """The shape of a layer's matrix, also where its weights are quantised."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape)


def _modules(denoiser: Any, kind: Kind) -> Iterator[tuple[str, list[str], Any]]:
    """Modules with a matrix: their name in the denoiser, the names that files have for them, and the module."""
    is_joint = isinstance(denoiser, JointModel)
    parts: Mapping[str, Any] = dict(denoiser.named_children()) if is_joint else {kind.networks[0]: denoiser}
    kohya_layer = kind.find("kohya_layer") if "to_kohya" in kind.parts else None
    config = parts[kind.networks[0]].config
    for part, network in parts.items():
        is_text = part.startswith("text_encoder")
        for name, module in network.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            plain = text_module(name) if is_text else name
            names = [f"{part}.{plain}", f"{part}.{name}"]
            if kohya_layer is not None:
                names.append(kohya_layer(part, name, config))
            if not is_text:
                names.append(underscored("lora_unet", name))
            yield f"{part}.{name}" if is_joint else name, names, module
