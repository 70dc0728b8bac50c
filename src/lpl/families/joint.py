"""A denoiser and the text encoders before it as one module, for training them together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpl.families.sdxl_names import TEXT_ATTENTION, TEXT_MLP


class JointModel(nn.Module, ABC):
    """A denoiser with CLIP text encoders before it: one module, so that engines wrap, shard and synchronise it once.

    Weights on which no output depends never require gradients.

    Args:
        parts: by their names in a pipeline, the denoiser first.
        used: for text encoders whose last layers do not affect the output, how many layers do.
    """

    def __init__(self, parts: Mapping[str, nn.Module], used: Mapping[str, int]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.used = dict(used)

    @abstractmethod
    def encode(self, text: Mapping[str, Tensor]) -> Any:
        """The denoiser's inputs from captions as tokens, with gradient."""

    @property
    def parts(self) -> list[Any]:
        """The denoiser, then the text encoders."""
        return list(self.children())

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of blocks that FSDP keeps whole, as the parts declare them, if this module has any."""
        known = {name for part in self.parts for name in part._no_split_modules or ()}
        return sorted(known & {type(module).__name__ for module in self.modules()})

    def idle(self) -> Iterator[nn.Parameter]:
        """Weights on which no output depends."""
        for name, count in self.used.items():
            yield from body_of(getattr(self, name)).encoder.layers[count:].parameters()

    def requires_grad_(self, requires_grad: bool = True) -> JointModel:
        """As in torch, except that weights on which no output depends never require gradients."""
        super().requires_grad_(requires_grad)
        for parameter in self.idle():
            parameter.requires_grad_(False)
        return self

    def add_adapter(self, config: LoraConfig) -> None:
        """Adds an adapter to the layers that the config names, in the denoiser and in the text encoders.

        The config names kinds of layers, or layers one by one, by their whole names in this module.
        """
        names, by_kind = set(config.target_modules or ()), {*TEXT_ATTENTION, *TEXT_MLP}
        of_text = sorted(names & by_kind)
        denoiser, *encoders = self._modules
        for part in self._modules:
            module, start = getattr(self, part), f"{part}."
            if one_by_one := sorted(name.removeprefix(start) for name in names if name.startswith(start)):
                ranks = {k.removeprefix(start): n for k, n in config.rank_pattern.items() if k.startswith(start)}
                module.add_adapter(replace(config, target_modules=one_by_one, rank_pattern=ranks))
            elif part == denoiser:
                module.add_adapter(replace(config, target_modules=sorted(names - by_kind)))
            elif of_text:
                acting = list(range(self.used[part])) if part in self.used else None
                module.add_adapter(replace(config, target_modules=of_text, layers_to_transform=acting))
        for part in encoders:
            for own in getattr(getattr(self, part), "peft_config", {}).values():
                own.base_model_name_or_path = None  # else a local path would be published with the adapter

    def enable_gradient_checkpointing(self, function: Callable[..., Any] | None = None) -> None:
        """Recomputes each block, of all parts, in the backward pass, through a function like torch's checkpoint."""
        function = function or partial(checkpoint, use_reentrant=False)
        for part in self.parts:
            part._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)

    def disable_gradient_checkpointing(self) -> None:
        """Keeps all activations again."""
        for part in self.parts:
            part._set_gradient_checkpointing(enable=False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the denoiser, in place: it does nearly all of the arithmetic."""
        self.parts[0].compile(*args, **kwargs)


def body_of(encoder: Any) -> Any:
    """The module with a text encoder's layers: in transformers 5 CLIPTextModel itself."""
    return getattr(encoder, "text_model", encoder)
