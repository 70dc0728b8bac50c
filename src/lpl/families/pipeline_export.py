"""A model for export: loaded whole, with a LoRA merged into it."""

from __future__ import annotations

import math
from abc import ABC
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch

from lpl.base.tensor_file import read_header
from lpl.config import ModelConfig
from lpl.families.files import beside, transformer_entries
from lpl.families.kind import Kind
from lpl.families.loading import load_whole, merge_lora
from lpl.families.sdxl_names import modelspec
from lpl.families.transformer_file import original_tensors

IMPLEMENTATION = "https://github.com/huggingface/diffusers"
STORED = {"F16": torch.float16, "BF16": torch.bfloat16}


class PipelineExport(ABC):
    """A model in memory, ready to be written.

    A LoRA is merged in float32 by peft, W + scale * (alpha / rank) B A, or for DoRA m times that divided by the norm of
    its rows; only then is the result rounded to the precision it is written in.

    Args:
        config: which model; its prediction_type and rescale_betas_zero_snr, if given, are written to the result.
        dtype: precision of the result; None: that of each component's files, for a model on the Hub float32.
        lora: a LoRA file of diffusers' or kohya's, or None.

    Raises:
        UserError: a model or LoRA that cannot be loaded whole.
    """

    kind: ClassVar[Kind]
    architecture: str
    """modelspec's name of the architecture."""
    original_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    """How a single file names the transformer's tensors, if not as diffusers does; see original_tensors."""
    original_fused: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    original_swapped: ClassVar[str | None] = None

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None, lora: Path | None, scale: float) -> None:
        self.configs = self.kind.model_configs(config)
        denoiser, *others = self.kind.networks
        found = {denoiser: dtype or stored_dtype(config, denoiser)}
        with beside(config) if self.kind.is_single(config) else nullcontext(config) as whole:
            found |= {part: dtype or stored_dtype(whole, part) for part in others}
        merged = [] if lora is None else self.kind.lora_parts(lora)
        self.pipeline = load_whole(self.kind, config, dtypes=found | dict.fromkeys(merged, torch.float32))
        if lora is not None:
            merge_lora(self.pipeline, lora, scale, merged)
        for part in self.kind.networks:
            network = getattr(self.pipeline, part)
            for parameter in () if network is None else network.parameters():
                parameter.data = parameter.data.to(found[part])

    def single_file(self, title: str) -> tuple[Any, dict[str, str]]:
        """Names and tensors of a single file, and its metadata; by default only the transformer."""
        weights = getattr(self.pipeline, self.kind.networks[0]).state_dict()
        side = self.kind.native_resolution(self.configs)
        said = modelspec(title, self.architecture, IMPLEMENTATION) | {"modelspec.resolution": f"{side}x{side}"}
        return original_tensors(weights, self.original_names, self.original_fused, self.original_swapped), said

    def save_folder(self, folder: Path) -> None:
        """Writes a pipeline in diffusers' format."""
        self.pipeline.save_pretrained(folder, safe_serialization=True)


def stored_dtype(config: ModelConfig, part: str) -> torch.dtype:
    """The precision that most values of a component have in its files: float16, bfloat16 or else float32."""
    name, variant = Path(str(config.pretrained_model_name_or_path)), config.variant
    if part == "vae" and config.pretrained_vae_model_name_or_path is not None:
        files = list(Path(config.pretrained_vae_model_name_or_path).glob("*.safetensors"))
    elif name.suffix == ".safetensors":
        files = [name]
    else:
        found = (name / part).glob("*.safetensors")
        files = [f for f in found if (f".{variant}" in f.name if variant else f.name.count(".") == 1)]
    sizes: Counter[str] = Counter()
    for file in files:
        for entry in transformer_entries(read_header(file)).values():
            sizes[entry["dtype"]] += math.prod(entry["shape"])
    return STORED.get(max(sizes, key=lambda kind: sizes[kind]) if sizes else "F32", torch.float32)
