"""What is known of a model family before anything heavy loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from lpl.base.errors import UserError
from lpl.base.tensor_file import read_header as read_tensor_header
from lpl.config import ModelConfig
from lpl.families.files import FLAG, INDEX, SINGLE_FILES, check_complete, check_weights, read_header, reader, vae_stride
from lpl.families.schedulers import chosen_schedule, compare_lora, is_flow


@dataclass(frozen=True)
class Kind:
    """A model family, by what it declares.

    Attributes:
        name: in messages.
        pipelines: how the names of its pipelines' classes begin, as model_index.json has them.
        module: of families/, which has its parts: the classes Model (a Family), Plan (a Blueprint) and Export (an
            Exported), the function to_kohya, and PUBLISHED, configs by component and "index".
        single_files: whether diffusers loads its single files, with the configs of --single_file_config.
        vae_class: of its VAE, in diffusers.
        lora_starts: how the names of a LoRA's tensors begin, for each network it may change.
        parts: where another module has one, or by another name: its name -> "module:name".
        base, base_name: the published model that a plan is of where no model is given, and its Hub id.
        networks, tokenizers: subfolders of a pipeline, the denoiser first, then the VAE.
        denoiser_word: what the denoiser is called.
        is_flow: whether it is trained by flow matching.
        patch: cells of a latent, in height and in width, that the denoiser takes as one.
        options: of those that only some models have (config/, by_model), those that it has.
        resolution, usual_stride: pixels that it was made for, and pixels per latent, where its configs do not say.
        steps, guidance: how images are drawn where nothing else is said.
    """

    name: str
    pipelines: tuple[str, ...]
    module: str
    base: str
    base_name: str
    networks: tuple[str, ...]
    tokenizers: tuple[str, ...]
    denoiser_word: str = "transformer"
    is_flow: bool = True
    patch: int = 2
    options: frozenset[str] = frozenset()
    resolution: int = 1024
    usual_stride: int = 8
    steps: int = 25
    guidance: float = 5.0
    single_files: bool = False
    vae_class: str = "AutoencoderKL"
    parts: Mapping[str, str] = field(default_factory=dict)
    lora_starts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def find(self, name: str) -> Any:
        """A part of it by its name; loads its module, and with it what is heavy."""
        module, _, attribute = self.parts.get(name, f"{self.module}:{name}").partition(":")
        return getattr(import_module(f"lpl.families.{module}"), attribute)

    def owns(self, header: Mapping[str, Any]) -> bool:
        """Whether a single file with this header holds a model of this family."""
        return False

    def model_configs(self, config: ModelConfig) -> dict[str, Any]:
        """Refuses a model that this trainer would not train right.

        Returns:
            The configs that were read, by component and "index"; for a single file those of --single_file_config, or
            nothing.

        Raises:
            UserError: what is missing or wrong, in one line.
        """
        name = str(config.pretrained_model_name_or_path)
        path = Path(name)
        if path.suffix in SINGLE_FILES:
            self._check_single_file(path)
        elif path.is_dir():
            index = reader(path, name, config)(INDEX) if (path / INDEX).is_file() else {}
            networks, tokenizers = (self._present(index, parts) for parts in (self.networks, self.tokenizers))
            check_complete(path, config.variant, networks, tokenizers)
        return self.plan_configs(config)

    @staticmethod
    def _present(index: Mapping[str, Any], parts: tuple[str, ...]) -> tuple[str, ...]:
        """Those that model_index.json does not say to be left out, as [null, null]."""
        return tuple(part for part in parts if index.get(part) != [None, None])

    def _check_single_file(self, path: Path) -> None:
        if not self.single_files or path.suffix != ".safetensors":
            raise UserError(f"{FLAG} {path}: no such single file of {self.name} is read; give a diffusers folder")
        header = read_header(path)
        if header is None:
            raise UserError(f"{FLAG} {path}: not a safetensors file, or cut short")
        check_weights(header, f"{FLAG} {path}")

    def plan_configs(self, config: ModelConfig) -> dict[str, Any]:
        """The configs of a model for a plan: no weights are needed, and nothing is read where they are known.

        Raises:
            UserError: a model of another kind, or one whose configs cannot be read.
        """
        name = config.pretrained_model_name_or_path
        if name is None or (name == self.base_name and not Path(name).exists()):
            configs = dict(self.find("PUBLISHED"))
        else:
            folder = config.single_file_config or name
            read = reader(Path(folder), folder, config)
            configs = {"index": read(INDEX), "scheduler": read("scheduler/scheduler_config.json")}
            present = self._present(configs["index"], self.networks)
            configs |= {part: read(f"{part}/config.json") for part in present}
        if self.is_flow != is_flow(configs["scheduler"]):
            kind = configs["scheduler"].get("_class_name")
            raise UserError(f"{FLAG} {name}: its scheduler is {kind}, which is none of {self.name}'s")
        return configs if self.is_flow else configs | {"scheduler": chosen_schedule(configs["scheduler"], config)}

    def check_export(self, config: ModelConfig, single_file: bool, lora: Path | None) -> None:
        """Refuses a model or a LoRA that cannot be written as asked, before anything heavy loads."""
        self.model_configs(config)
        if lora is not None:
            self.check_lora(config, lora)
        if single_file:
            raise UserError(f"--to safetensors: no single files of {self.name} are written; use --to diffusers")

    def native_resolution(self, configs: Mapping[str, Any]) -> int:
        """Pixels that a model with these configs was made for: what its pipeline draws by default."""
        size = configs[self.networks[0]].get("sample_size") if configs else None
        return int(size) * self.stride(configs) if isinstance(size, int) else self.resolution

    def check_lora(self, config: ModelConfig, lora: Path) -> None:
        """Refuses a LoRA file that is none of this family's, and says so where it predicts another thing."""
        self.lora_parts(lora)
        known = self.model_configs(config).get("scheduler")
        if known and not self.is_flow:
            compare_lora(lora, known)

    def lora_parts(self, file: Path) -> list[str]:
        """The components that a LoRA file changes.

        Raises:
            UserError: no safetensors file, or tensors that belong to none of the family's components.
        """
        try:
            keys = [key for key in read_tensor_header(file) if key != "__metadata__"]
        except UserError as error:
            raise UserError(f"--lora {file}: cannot be read as safetensors ({error})") from error
        parts = [part for part, starts in self.lora_starts.items() if any(key.startswith(starts) for key in keys)]
        known = tuple(start for part in parts for start in self.lora_starts[part])
        strange = [key for key in keys if not key.startswith(known)] if parts else keys
        if strange or not keys:
            found = f"{strange[0]}" if strange else "nothing"
            whose = f"a LoRA of {self.name}, of diffusers' or kohya's naming"
            raise UserError(f"--lora {file}: holds {found}, which is no part of {whose}")
        return parts

    def usual_guidance(self, config: ModelConfig) -> float | None:
        """The guidance that a model is drawn with where nothing else is said; None: it takes none."""
        return self.guidance

    def stride(self, configs: Mapping[str, Any]) -> int:
        """Pixels per latent."""
        return vae_stride(configs["vae"]) or 1

    def pixel_multiple(self, configs: Mapping[str, Any]) -> int:
        """What the sides of images are multiples of."""
        return self.patch * self.stride(configs)
