"""What is known of a model family before anything heavy loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from lpl.base.errors import UserError
from lpl.base.tensor_file import METADATA
from lpl.base.tensor_file import read_header as read_tensor_header
from lpl.config import ModelConfig
from lpl.families.files import (
    BESIDE_FLAG,
    FLAG,
    INDEX,
    SINGLE_FILES,
    beside,
    check_complete,
    check_original,
    check_weights,
    checked_header,
    other_vae,
    read_header,
    reader,
    transformer_entries,
    unet_parameters,
    vae_channels,
    vae_stride,
)
from lpl.families.schedulers import chosen_schedule, compare_lora, is_flow, prediction_of

DORA_OF = "lpl.dora_scale"
"""Metadata key of a DoRA file whose magnitudes suit only one program; the value names that program."""


@dataclass(frozen=True)
class Kind:
    """A model family, by what it declares.

    Attributes:
        name: in messages.
        pipelines: how the names of its pipelines' classes begin, as model_index.json has them; the first is the full
            name of the class that is loaded: from diffusers or, with own_pipeline, from the module.
        loaded_with: further arguments for loading that class.
        module: its module in families/, which has its parts: the classes Model (a Family), Plan (a Blueprint) and
            Export (an Exported), the functions to_kohya and kohya_layer, and PUBLISHED, configs by component and
            "index".
        single_file_keys: groups of tensors' names; a single file that has all names of one group is of this family. Of
            a transformer the first group has diffusers' names, the others those of the original layout; else all have
            the latter.
        parameters: of the denoiser that PUBLISHED describes; a plan of a single file without configs compares them.
        vae_class: the class of its VAE, in diffusers.
        vae_has_frames: that class takes only videos; a class of the same name in the module takes images too.
        lora_starts: how the names of a LoRA's tensors begin, for each network it may change.
        lora_readers: the programs that read its LoRAs of diffusers' naming.
        comfyui_folder: where ComfyUI looks for its single files; None: it reads none.
        parts: for parts in another module or under another name: name -> "module:name".
        base, base_name: the published model that a plan uses where no model is given, and its Hub id.
        others: the Hub ids of other published models whose configs are known, and the configs' names in module.
        networks, tokenizers: subfolders of a pipeline, the denoiser first, then the VAE.
        is_transformer: whether its denoiser is a transformer, not a UNet. All of those are trained by flow matching,
            their single files hold the transformer alone, their text encoders stay in the precision of their files, and
            their LoRAs are trained on weights of the run's precision and written with alpha = rank.
        patch: cells of a latent, in height and in width, that the denoiser takes as one.
        options: those of the options that only some models have (config/, by_model) that this family has.
        trained_text: the text encoders that --train_text_encoder trains, always the first ones; the others stay frozen.
        resolution, usual_stride: pixels that it was made for, and pixels per latent, where its configs do not say.
        steps, guidance: how images are drawn by default.
    """

    name: str
    pipelines: tuple[str, ...]
    module: str
    base: str
    base_name: str
    networks: tuple[str, ...]
    tokenizers: tuple[str, ...]
    is_transformer: bool = True
    patch: int = 2
    options: frozenset[str] = frozenset()
    trained_text: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)
    resolution: int = 1024
    usual_stride: int = 8
    steps: int = 25
    guidance: float = 5.0
    single_file_keys: tuple[tuple[str, ...], ...] = ()
    parameters: int = 0
    lora_readers: str = "diffusers"
    comfyui_folder: str | None = "models/diffusion_models"
    vae_class: str = "AutoencoderKL"
    vae_has_frames: bool = False
    own_pipeline: bool = False
    parts: Mapping[str, str] = field(default_factory=dict)
    loaded_with: Mapping[str, Any] = field(default_factory=dict)
    lora_starts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def denoiser_word(self) -> str:
        """What the denoiser is called."""
        return "transformer" if self.is_transformer else "UNet"

    def is_flow(self, configs: Mapping[str, Any]) -> bool:
        """Whether a model with these configs is trained by flow matching; with none it is a single file."""
        return is_flow(configs["scheduler"]) if configs else self.is_transformer

    def find(self, name: str) -> Any:
        """A part of it by its name; imports its module and the heavy libraries that this needs."""
        module, _, attribute = self.parts.get(name, f"{self.module}:{name}").partition(":")
        return getattr(import_module(f"lpl.families.{module}"), attribute)

    def owns(self, header: Mapping[str, Any]) -> bool:
        """Whether a single file with this header holds a model of this family."""
        return any(
            keys <= header.keys() | transformer_entries(header).keys() for keys in map(set, self.single_file_keys)
        )

    def is_single(self, config: ModelConfig) -> bool:
        """Whether a model is a file with only its transformer; --single_file_config then has the other parts."""
        return self.is_transformer and Path(str(config.pretrained_model_name_or_path)).suffix in SINGLE_FILES

    def published_as(self, name: str | None) -> str | None:
        """The name of a published model's configs in its module; None: they must be read."""
        if name is None or name == self.base_name:
            return "PUBLISHED"
        return self.others.get(name)

    def model_configs(self, config: ModelConfig) -> dict[str, Any]:
        """Refuses a model that this trainer cannot train correctly.

        Returns:
            The configs that were read, by component and "index"; for a single file those of --single_file_config, or
            nothing.

        Raises:
            UserError: what is missing or wrong, in one line.
        """
        name = str(config.pretrained_model_name_or_path)
        path = Path(name)
        if self.is_single(config):
            configs = self.plan_configs(config)
            with beside(config) as others:
                self._check_folder(others, self.networks[1:])
            return self._with_vae(configs, config)
        if path.suffix in SINGLE_FILES:
            check_original(path, config)
            if config.single_file_config is None:
                check_clip_skip(self.find("PUBLISHED"), config)
                self._with_vae(self.find("PUBLISHED"), config)
                return {}
        else:
            self._check_folder(config, self.networks)
        return self._with_vae(self.plan_configs(config), config)

    def _with_vae(self, configs: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
        """The configs with that of --pretrained_vae_model_name_or_path, where it is given."""
        vae = other_vae(config, self.vae_class, vae_channels(configs["vae"]))
        return configs if vae is None else configs | {"vae": vae}

    def _check_folder(self, config: ModelConfig, networks: tuple[str, ...]) -> None:
        """Refuses a folder that lacks one of these networks, or a tokenizer."""
        name = str(config.pretrained_model_name_or_path)
        path = Path(name)
        if path.is_dir():
            index = reader(path, name, config)(INDEX) if (path / INDEX).is_file() else {}
            check_complete(path, config.variant, self._present(index, networks), self._present(index, self.tokenizers))

    def _check_transformer(self, path: Path, config: ModelConfig) -> None:
        """Refuses a file whose header shows no transformer of this family, or one that cannot be trained."""
        where = f"{FLAG} {path}"
        header = checked_header(path, where)
        entries = transformer_entries(header)
        check_weights(entries, where)
        if not self.owns(header):
            found = "a LoRA" if any("lora_" in key for key in entries) else next(iter(entries), "nothing")
            raise UserError(f"{where}: holds {found}, no transformer of {self.name} ({BESIDE_FLAG})")
        if config.single_file_config is None:
            raise UserError(
                f"{where}: a transformer of {self.name}, without text encoders and VAE: name the diffusers folder or "
                f"the Hub id that has them by {BESIDE_FLAG}, such as {self.base_name}"
            )

    @staticmethod
    def _present(index: Mapping[str, Any], parts: tuple[str, ...]) -> tuple[str, ...]:
        """The parts that model_index.json does not mark as left out, [null, null]."""
        return tuple(part for part in parts if index.get(part) != [None, None])

    def plan_configs(self, config: ModelConfig) -> dict[str, Any]:
        """The configs of a model for a plan: no weights are needed, and configs of published models are not read.

        Raises:
            UserError: a model of another kind, or one whose configs cannot be read.
        """
        name = config.pretrained_model_name_or_path
        path = Path(str(name))
        known = self.published_as(name)
        if known is not None and not path.exists():
            configs = dict(self.find(known))
        elif self.is_single(config):
            self._check_transformer(path, config)
            with beside(config) as others:
                configs = self._read_configs(str(config.single_file_config), others)
        elif path.suffix == ".safetensors" and config.single_file_config is None:
            check_original(path, config)
            configs = self.published_of(path)
        else:
            folder = config.single_file_config if path.suffix in SINGLE_FILES else None
            configs = self._read_configs(str(folder or name), config)
        if "clip_skip" in self.options:
            check_clip_skip(configs, config)
        if self.is_transformer and not is_flow(configs["scheduler"]):
            kind = configs["scheduler"].get("_class_name")
            raise UserError(f"{FLAG} {name}: its scheduler is {kind}, which is none of {self.name}'s")
        if self.is_transformer:
            return configs
        return configs | {"scheduler": chosen_schedule(configs["scheduler"], config)}

    def _read_configs(self, folder: str, config: ModelConfig) -> dict[str, Any]:
        read = reader(Path(folder), folder, config)
        configs = {"index": read(INDEX)}
        if not str(found := configs["index"].get("_class_name")).startswith(self.pipelines):
            flag = FLAG if config.single_file_config is None else BESIDE_FLAG
            raise UserError(f"{flag} {folder}: its {INDEX} says {found}, which is no pipeline of {self.name}")
        configs["scheduler"] = read("scheduler/scheduler_config.json")
        present = self._present(configs["index"], self.networks)
        return configs | {part: read(f"{part}/config.json") for part in present}

    def published_of(self, path: Path) -> dict[str, Any]:
        """The published configs, if a single file's denoiser has as many parameters."""
        found = unet_parameters(read_header(path) or {})
        if found != self.parameters:
            raise UserError(
                f"{FLAG} {path}: its {self.denoiser_word} has {found:,} parameters, not the {self.parameters:,} of "
                f"{self.base}: a plan needs --single_file_config, a folder with its configs"
            )
        return dict(self.find("PUBLISHED"))

    def check_export(self, config: ModelConfig, single_file: bool, lora: Path | None) -> None:
        """Refuses a model or a LoRA that cannot be written as asked, before anything heavy loads."""
        configs = self.model_configs(config)
        if single_file and configs and not self.is_transformer:
            prediction_of(configs["scheduler"])
        if lora is not None:
            self.check_lora(config, lora)

    def native_resolution(self, configs: Mapping[str, Any]) -> int:
        """Pixels that a model with these configs was made for: what its pipeline draws by default."""
        size = configs[self.networks[0]].get("sample_size") if configs else None
        return int(size) * self.stride(configs) if isinstance(size, int) else self.resolution

    def check_lora(self, config: ModelConfig, lora: Path) -> None:
        """Refuses a LoRA file of another family, and warns where its prediction type differs."""
        self.lora_parts(lora)
        known = self.model_configs(config).get("scheduler")
        if known and not self.is_transformer:
            compare_lora(lora, known)

    def lora_parts(self, file: Path, flag: str = "--lora") -> list[str]:
        """The components that a LoRA file changes.

        Raises:
            UserError: no safetensors file, tensors that belong to none of the family's components, or a DoRA whose
                magnitudes are made for another program.
        """
        try:
            header = read_tensor_header(file)
        except UserError as error:
            raise UserError(f"{flag} {file}: cannot be read as safetensors ({error})") from error
        keys = [key for key in header if key != METADATA]
        if (program := (header.get(METADATA) or {}).get(DORA_OF)) is not None:
            raise UserError(
                f"{flag} {file}: a DoRA as {program} alone reads it; give diffusers' file of it "
                "(pytorch_lora_weights.safetensors)"
            )
        parts = [part for part, starts in self.lora_starts.items() if any(key.startswith(starts) for key in keys)]
        known = tuple(start for part in parts for start in self.lora_starts[part])
        strange = [key for key in keys if not key.startswith(known)] if parts else keys
        if strange or not keys:
            found = f"{strange[0]}" if strange else "nothing"
            whose = f"a LoRA of {self.name}, of diffusers' or kohya's naming"
            raise UserError(f"{flag} {file}: holds {found}, which is no part of {whose}")
        return parts

    def usual_guidance(self, config: ModelConfig) -> float | None:
        """The default guidance for sampling from a model; None: it takes none."""
        return self.guidance

    def stride(self, configs: Mapping[str, Any]) -> int:
        """Pixels per latent."""
        return vae_stride(configs["vae"]) or 1

    def pixel_multiple(self, configs: Mapping[str, Any]) -> int:
        """The sides of images must be multiples of this."""
        return self.patch * self.stride(configs)

    def longest_side(self, configs: Mapping[str, Any]) -> int | None:
        """Most pixels of an image's side, where the denoiser's position embeddings limit it; None: any."""
        return None


def check_clip_skip(configs: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuses to skip as many layers as a text encoder has."""
    depths = {part: int(own.get("num_hidden_layers", 12)) for part, own in configs.items() if "text_encoder" in part}
    part = min(depths, key=lambda part: depths[part])
    if config.clip_skip is not None and config.clip_skip >= depths[part]:
        raise UserError(
            f"--clip_skip {config.clip_skip}: the model's {part} has {depths[part]} layers; give less than that"
        )
