"""The layers of a LoRA file: read in diffusers' naming and kohya's, and written under kohya's for other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpl.base.errors import UserError, on_one_line
from lpl.base.json_files import REST, number, parse_json, require_shape
from lpl.families.kind import DORA_OF
from lpl.families.lora_files import ADAPTER, TEXT_MODEL

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")
UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight")
MAGNITUDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
ALPHA = (".alpha",)
ENDS = {end: side for side, ends in enumerate((DOWN, UP, MAGNITUDE, ALPHA)) for end in ends}
"""How the names of a layer's tensors end, and the index of the Layer's field that each is."""
KEPT = ("modelspec.", "ss_", "lpl.")
"""How the keys of metadata begin that both files of a LoRA have."""
LayerOf = Callable[[str, str], str]
"""kohya's name of a layer, from a component's name and the name of the module in it."""
WeightOf = Callable[[str, str], Tensor]
"""The weight before training, from the names of a component and of its module."""


class Layer(NamedTuple):
    """A layer's LoRA: W + (alpha / rank) up down, or for DoRA m times that divided by the norm of its rows."""

    down: Tensor
    """(rank, inputs), or (rank, inputs, height, width) of a convolution."""
    up: Tensor
    """(outputs, rank), of a convolution with two axes of 1."""
    alpha: float
    magnitude: Tensor | None = None
    """m, (outputs,)."""

    @property
    def rank(self) -> int:
        """Rows of down."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """(alpha / rank) up down, (outputs, inputs * height * width)."""
        return self.alpha / self.rank * self.up.float().flatten(1) @ self.down.float().flatten(1)


def underscored(prefix: str, module: str) -> str:
    """A module's name as kohya's programs write it."""
    return f"{prefix}_{module}".replace(".", "_")


def read_layers(file: Path, flag: str = "--lora") -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers of a LoRA file by their names in it (unet.mid_block..., lora_unet_mid_block_...), and its metadata.

    alpha comes from the layer's own tensor, else from the adapter's configuration, else it is the rank.

    Raises:
        UserError: no safetensors file, tensors that are not of a LoRA or DoRA, or a missing part.
    """
    tensors, said = _read(file)
    adapter = parse_json(said.get(ADAPTER, "{}"), f"{file}: {ADAPTER}")
    positive = number(0, 1e6)
    known: dict[str, Any] = {f"{part}.lora_alpha?": positive for part in PARTS}
    known |= {f"{part}.alpha_pattern?": {REST: positive} for part in PARTS}
    require_shape(adapter, known, f"{file}: {ADAPTER}", "train it anew, or merge it (--to safetensors)")
    if any(adapter.get(f"{part}.use_rslora") for part in PARTS):
        raise UserError(f"{file}: has peft's use_rslora, which is not renamed: merge it (--to safetensors)")
    found: dict[str, list[Tensor | None]] = {}
    for name, tensor in tensors.items():
        end = max((end for end in ENDS if name.endswith(end)), key=len, default=None)
        fits = end is not None and (ENDS[end] >= 2 or tensor.dim() >= 2)
        if end is None or not fits or not name.startswith((*(f"{part}." for part in PARTS), "lora_")):
            raise UserError(
                f"{file}: holds {name}; only LoRA of peft's naming (unet. or text_encoder. ... lora_A.weight) and of "
                "kohya's (lora_unet_ ... lora_down.weight) is read"
            )
        found.setdefault(name.removesuffix(end), [None] * 4)[ENDS[end]] = tensor
    layers = {}
    for name, (down, up, magnitude, alpha) in found.items():
        if down is None or up is None or down.shape[0] != up.shape[1]:
            raise UserError(f"{file}: not a whole LoRA: {name} lacks its down or its up part, or they do not fit")
        part, _, module = name.partition(".")
        usual = adapter.get(f"{part}.lora_alpha", down.shape[0])
        of_layers = adapter.get(f"{part}.alpha_pattern") or {}
        own = of_layers.get(module, of_layers.get(module.removeprefix(TEXT_MODEL), usual))
        value = float(own if alpha is None else alpha.reshape(()))
        layers[name] = Layer(down, up, value, None if magnitude is None else magnitude.flatten())
    if not layers:
        raise UserError(f"{file}: no LoRA in it")
    whole = [name for name, layer in layers.items() if layer.magnitude is not None]
    if whole and len(whole) < len(layers):
        raise UserError(f"{file}: not a whole DoRA: {len(layers) - len(whole)} of its layers have no magnitude")
    return layers, said


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as content:
            said = content.metadata() or {}
            return {key: content.get_tensor(key) for key in content.keys()}, said  # noqa: SIM118 (it is no dict)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({on_one_line(error)})") from error


def renamed_lora(
    lora: Path, layer_of: LayerOf, metadata: Mapping[str, str], weight_of: WeightOf | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file in diffusers' (peft's) naming, renamed; values and precision stay.

    A layer's tensors end in .lora_down.weight, .lora_up.weight or .alpha. Programs that read this naming add
    (alpha / rank) up down to its weight.

    A DoRA's layers also have a .dora_scale s, (outputs, 1) or (outputs, 1, 1, 1). ComfyUI and Forge make s V / |W| of
    it, V = W + (alpha / rank) up down, where the DoRA is m V / |V|, norms of rows: so s = m |W| / |V|, which suits only
    these two. A1111 divides by the norms of columns, kohya's programs and diffusers drop it or divide by |V|.

    Args:
        layer_of: kohya's name of a component's module.
        metadata: further metadata of the file, besides that on training and adapter.
        weight_of: W, which a DoRA needs; None: not available.

    Raises:
        UserError: a file that holds something else, or a DoRA without weights.
    """
    layers, said = read_layers(lora)
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        part, dot, module = name.partition(".")
        if not dot:
            raise UserError(f"{lora}: is in kohya's naming already ({name})")
        new = layer_of(part, module)
        found[f"{new}.lora_down.weight"], found[f"{new}.lora_up.weight"] = layer.down, layer.up
        found[f"{new}.alpha"] = torch.tensor(layer.alpha)
        if layer.magnitude is not None:
            if weight_of is None:
                raise UserError(f"{lora}: a DoRA, which is renamed beside the weights of its model only")
            found[f"{new}.dora_scale"] = _scale(layer, weight_of(part, module))
    some = max(layers.values(), key=lambda layer: layer.rank)
    own = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(some.rank),
        "ss_network_alpha": f"{some.alpha:g}",
        "ss_output_name": metadata["modelspec.title"],
    }
    if some.magnitude is not None:
        own |= {"ss_network_args": '{"dora_wd": "True"}', DORA_OF: "ComfyUI"}
    # The run's own metadata, such as its title, override those that are the same for every file.
    return found, dict(metadata) | {key: text for key, text in said.items() if key.startswith(KEPT)} | own


def _scale(layer: Layer, weight: Tensor) -> Tensor:
    """m |W| / |W + delta|, norms of rows, as ComfyUI takes it."""
    assert layer.magnitude is not None
    rows = weight.detach().float().cpu().flatten(1)
    scale = layer.magnitude.float() * rows.norm(dim=1) / (rows + layer.delta()).norm(dim=1)
    return scale.reshape(-1, *[1] * (weight.dim() - 1)).to(layer.magnitude.dtype)
