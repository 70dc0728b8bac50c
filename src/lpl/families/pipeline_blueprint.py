"""Networks with random weights from a model's configs, for a plan: on the meta device they take no memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from torch import Tensor, nn

from lpl.config import ModelConfig
from lpl.families.files import FLAG, vae_channels
from lpl.families.kind import Kind
from lpl.families.loading import of_images
from lpl.families.loading_errors import named
from lpl.families.schedulers import training_schedule
from lpl.families.transformer_file import check_fits


class PipelineBlueprint(ABC):
    """Implements families.base.Blueprint for the classes that configs name.

    Args:
        configs: by component, and "index", as Kind.plan_configs returns them.
        config: the options of the model.
    """

    kind: ClassVar[Kind]
    text_classes: ClassVar[tuple[str, ...]] = ()
    """Classes of the text encoders, where configs has no "index"."""
    lora_targets: Mapping[str, tuple[str, ...]]
    trains_text = False

    def __init__(self, configs: Mapping[str, Any], config: ModelConfig) -> None:
        self.configs, self.config = configs, config
        with named(FLAG, "its scheduler"):
            self.schedule = training_schedule(configs["scheduler"])
        self.latent_channels = vae_channels(configs["vae"])
        self.stride = self.kind.stride(configs)
        self.denoiser_word = self.kind.denoiser_word
        names = [part for part in self.kind.networks if part.startswith("text_encoder") and part in configs]
        found = self.text_classes or [configs["index"][part][1] for part in names]
        self._text_classes = [getattr(transformers, name) for name in found]
        with named(FLAG, "its configs"):
            self.text_configs = [
                cls.config_class.from_dict(configs[part]) for cls, part in zip(self._text_classes, names, strict=True)
            ]

    @property
    def trained_encoders(self) -> int:
        return len(self.kind.trained_text) if self.trains_text else 0

    def denoiser(self) -> Any:
        with named(FLAG, f"the {self.denoiser_word} of its configs"):
            network = self._network(self.kind.networks[0])
        if self.kind.is_single(self.config):
            check_fits(self.kind, self.config, network)
        return network

    def vae(self) -> Any:
        with named(FLAG, "the VAE of its configs"):
            return of_images(self._network("vae"), self.kind).eval().requires_grad_(False)

    def _network(self, part: str) -> Any:
        own = self.configs[part]
        usual = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
        return getattr(diffusers, own.get("_class_name", usual.get(part))).from_config(own)

    def text_encoders(self) -> list[nn.Module]:
        with named(FLAG, "the text encoders of its configs"):
            pairs = zip(self._text_classes, self.text_configs, strict=True)
            # Before a transformer in the precision of their files, see load_whole.
            dtypes = [config.dtype if self.kind.is_transformer else None for config in self.text_configs]
            built = [cls(config).eval() for cls, config in pairs]
            return [network.to(dtype or torch.float32) for network, dtype in zip(built, dtypes, strict=True)]

    @abstractmethod
    def tokens(self, batch: int) -> Sequence[Tensor]:
        """See families.base.Blueprint."""

    @abstractmethod
    def text(self, batch: int) -> dict[str, Tensor]:
        """See families.base.Blueprint."""
