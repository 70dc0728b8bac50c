"""One file with the transformer of a model trained by flow matching, under diffusers' names or in the original layout.

The original layout, which ComfyUI reads too, is converted by diffusers' functions.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import safe_open
from torch import Tensor

from lpl.base.errors import UserError
from lpl.base.tensor_file import METADATA
from lpl.config import ModelConfig
from lpl.config.length import count
from lpl.families.files import BESIDE_FLAG, FLAG, UNET, checked_header, transformer_entries
from lpl.families.kind import Kind
from lpl.families.loading_errors import named

logger = logging.getLogger("lpl")

UNUSED = ("norm_final.weight", "pos_embed", "y_embedder.y_embedding")
"""Tensors of some original layouts that diffusers' transformers do not need: a norm that is never called, positions
that are computed, an embedding of the empty caption."""
SHOWN = 3
"""Maximum number of names in an error."""


def load_transformer(kind: Kind, config: ModelConfig, dtype: torch.dtype) -> Any:
    """The transformer of a single file, in a precision, on the CPU, in eval mode.

    Raises:
        UserError: the file's tensors are not exactly the transformer's; nothing is loaded then.
    """
    path, part = Path(str(config.pretrained_model_name_or_path)), kind.networks[0]
    own_config = kind.plan_configs(config)[part]
    with named(BESIDE_FLAG, str(config.single_file_config)), init_empty_weights():
        network = getattr(diffusers, own_config["_class_name"]).from_config(own_config)
    check_fits(kind, config, network)
    header = checked_header(path, f"{FLAG} {path}")
    prefix = UNET if any(key.startswith(UNET) for key in header) else ""
    if others := [key for key in header if not key.startswith(prefix) and key != METADATA]:
        logger.warning(
            "%s: %s beside its transformer (%s, ...) not read: the other parts are those of %s %s",
            *(path, count(len(others), "tensor"), others[0], BESIDE_FLAG, config.single_file_config),
        )
    with named(FLAG, str(path)), safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(prefix + key) for key in transformer_entries(header)}
        own = {id(value) for value in weights.values()}
        found = _arranged(kind, weights, network, str(path))
        # A view would keep its whole tensor in memory, and could not be saved as a separate tensor.
        found = {key: value.to(dtype, copy=id(value) not in own) for key, value in found.items()}
        network.load_state_dict(found, assign=True)
    return network.eval()


def check_fits(kind: Kind, config: ModelConfig, network: Any) -> None:
    """Compares the header of a single file with a transformer, name by name and shape by shape.

    Raises:
        UserError: what is missing, unexpected or of another shape.
    """
    path = Path(str(config.pretrained_model_name_or_path))
    where = f"{FLAG} {path}"
    entries = transformer_entries(checked_header(path, where))
    with named(FLAG, str(path)):
        given = {key: torch.empty(entry["shape"], device="meta") for key, entry in entries.items()}
    unused = sum(given[key].numel() for key in UNUSED if key in given)
    total = sum(value.numel() for value in given.values())
    found, expected = _arranged(kind, given, network, where), network.state_dict()
    faults = [
        _told("missing", [key for key in expected if key not in found]),
        _told("unknown to it", [key for key in found if key not in expected]),
        _told(
            "of another shape",
            [
                f"{key} {list(found[key].shape)}, not {list(value.shape)}"
                for key, value in expected.items()
                if key in found and found[key].shape != value.shape
            ],
        ),
    ]
    if not any(faults) and total - sum(value.numel() for value in found.values()) not in (0, unused):
        faults.append("values that arrive nowhere")
    if any(faults):
        raise UserError(
            f"{where}: no transformer as {BESIDE_FLAG} {config.single_file_config} describes it: "
            f"{'; '.join(filter(None, faults))}"
        )


def _told(what: str, names: list[str]) -> str:
    """The number of these tensors and the first names; empty where there are none."""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{count(len(names), 'tensor')} {what} ({', '.join(names[:SHOWN])}{more})" if names else ""


def _arranged(kind: Kind, weights: dict[str, Tensor], network: Any, where: str) -> dict[str, Tensor]:
    """Weights under diffusers' names; tensors of the original layout without such a name keep their own."""
    if all(key in weights for key in kind.single_file_keys[0]):
        return weights
    left = dict(weights)
    try:
        convert = SINGLE_FILE_LOADABLE_CLASSES[type(network).__name__]["checkpoint_mapping_fn"]
        found = convert(checkpoint=left, config=network.config)
    except KeyError as error:
        raise UserError(f"{where}: in the original layout of {kind.name}, but without {error}") from error
    except (IndexError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: in no layout of {kind.name} that is known ({error})".split("\n")[0]) from error
    return {key: value for key, value in (left | found).items() if value is not None}


def original_tensors(
    weights: Mapping[str, Tensor],
    names: Iterable[tuple[str, str]],
    fused: Mapping[str, tuple[str, ...]],
    swapped: str | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """A transformer's tensors under names of the original layout.

    Args:
        weights: by diffusers' names.
        names: regular expressions and their replacements, applied to names one after the other.
        fused: for modules of the original whose rows are those of several modules of diffusers, one after the other:
            name before the replacements -> the names of those modules.
        swapped: a module whose two halves of rows are in the opposite order in diffusers.
    """
    for name, value in weights.items():
        module, _, end = name.rpartition(".")
        whole = next(
            (whole for whole, owns in fused.items() if module.endswith(tuple(f".{own}" for own in owns))), None
        )
        if whole is not None:
            first, *_ = owns = fused[whole]
            if not module.endswith(f".{first}"):
                continue
            above = module.removesuffix(first)
            name, value = f"{above}{whole}.{end}", torch.cat([weights[f"{above}{own}.{end}"] for own in owns])
        elif module == swapped:
            value = torch.cat(value.chunk(2)[::-1])
        for old, new in names:
            name = re.sub(old, new, name)
        yield name, value
