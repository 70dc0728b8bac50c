"""Options as YAML: presets, --config files, and the config.yaml that every run leaves beside its output."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from lpl.base.errors import UserError, all_faults, on_one_line, require
from lpl.base.files import write_output
from lpl.base.json_files import REST, Shape, require_shape, whole
from lpl.base.text import read_text
from lpl.config import Facts, TrainConfig, declared
from lpl.config.checks import check_path, check_text
from lpl.config.environment import environment
from lpl.config.loss import GATES, acting
from lpl.config.run_folder import CONFIG_FILE, PLAIN
from lpl.presets import preset_text, presets

RECORD = "environment"
"""Key of config.yaml that holds versions and git state; it is no option."""

EMPTY = ("null", "~", "")
"""How YAML says None."""

UNSAID_GATE = ("lpl_t_threshold", 200)
"""The gate of a run whose config.yaml states none: it was written while this was the default."""

CACHED = "latents and text embeddings are always cached: --latent_cache_dir says where"
MEMORY_EFFICIENT = "PyTorch's own memory-efficient attention is always used"
NOTHING = "there is nothing like it here: leave it out"
REFUSED = {
    "local_rank": "start several processes with `accelerate launch -m lpl train` or torchrun",
    "debug_loss": "every logged step already has the losses, by term and layer (--log_every 1)",
    "network_module": "--rank trains a LoRA, --use_dora a DoRA",
    "network_args": "--lora_targets and --use_dora say what is trained",
    "network_train_unet_only": "that is what happens without --train_text_encoder",
    "output_name": "--output_dir names the run's folder, and its files are named after that",
    "save_model_as": "every result is .safetensors",
    "save_precision": "results are float32; lpl export writes other precisions",
    "save_last_n_epochs": "the weights of every --save_steps are kept",
    "output_config": "config.yaml in --output_dir has the options of the run",
    "dim_from_weights": "--lora_weights takes the rank from the file anyway",
    "network_train_text_encoder_only": "the denoiser is always trained; --train_text_encoder trains text encoders too",
    **dict.fromkeys(
        ("dataset_config", "data_backend_config"),
        "--train_data_dir, --dataset_name, --repeats and --resolution say the same",
    ),
    "config_file": "--config FILE reads these options from a YAML file; `lpl presets` lists what ships",
    **dict.fromkeys(
        ("caption_extension", "caption_extention"),
        "captions are read from .txt files beside the images, or from metadata.jsonl",
    ),
    **dict.fromkeys(
        ("min_bucket_reso", "max_bucket_reso"),
        "all --buckets have one area, the square of --resolution, and --bucket_max_aspect bounds their sides",
    ),
    "bucket_no_upscale": "smaller images are scaled up, with a warning that says how many: `lpl data` shows them",
    "debug_dataset": "`lpl data` with the same options shows what the model would see",
    "vae_batch_size": "a megapixel is encoded at once, whatever --train_batch_size",
    "persistent_data_loader_workers": "images are read once, by threads, while the cache is filled",
    "random_crop": "crops are random unless --center_crop",
    "disable_tf32": "TF32 is off unless --allow_tf32",
    "no_half_vae": "the VAE of LPL and of the cache runs in float32 anyway",
    "model_type": "--rank trains a LoRA; without it the whole denoiser is trained",
    **dict.fromkeys(("model_family", "model_flavour", "v2"), "the model's own files say what it is"),
    "full_fp16": "float16 alone does not train: --mixed_precision fp16, or --weights_dtype bfloat16",
    **dict.fromkeys(("highvram", "lowram"), "`lpl plan` with the same options says what fits a GPU, and what would"),
    **dict.fromkeys(
        ("validation_guidance", "validation_num_inference_steps", "sample_sampler"),
        "samples are drawn with the model's own scheduler at its usual guidance; `lpl eval` takes other settings",
    ),
    "sample_at_first": "samples of step 0 are always drawn",
    **dict.fromkeys(
        ("tracker_run_name", "tracker_project_name", "wandb_run_name", "log_prefix"),
        "--output_dir and --logging_dir say where a run and its logs are",
    ),
    **dict.fromkeys(("lora_type", "lycoris_config"), "--rank trains a LoRA, --use_dora a DoRA; there is no LyCORIS"),
    "resolution_type": "--resolution is in pixels; with --buckets its square is the area of every shape",
    "set_grads_to_none": "that always happens",
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk"), CACHED),
    **dict.fromkeys(("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), CACHED),
    **dict.fromkeys(("xformers", "enable_xformers_memory_efficient_attention"), MEMORY_EFFICIENT),
    **dict.fromkeys(("sdpa", "mem_eff_attn", "enable_npu_flash_attention", "attention_mechanism"), MEMORY_EFFICIENT),
    **dict.fromkeys(("scale_weight_norms", "loraplus_lr_ratio", "stop_text_encoder_training"), NOTHING),
    **dict.fromkeys(("ip_noise_gamma", "input_perturbation", "adaptive_noise_scale"), NOTHING),
    **dict.fromkeys(("color_aug", "face_crop_aug_range", "weighted_captions", "caption_tag_dropout_rate"), NOTHING),
    **dict.fromkeys(("token_warmup_min", "token_warmup_step", "caption_dropout_every_n_epochs"), NOTHING),
}
"""Flags of the diffusers scripts, kohya's and SimpleTuner that have no counterpart, and what to do instead."""


def nearest(name: str, known: list[str]) -> str:
    """A hint at the option that other trainers call by this name, or at the closest known name; else empty."""
    here = next((own for own, facts in declared().items() if name in facts.elsewhere and own in known), None)
    if here is not None:
        return f": here it is --{here}"
    close = difflib.get_close_matches(name, known, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def read_options(name: str) -> dict[str, str]:
    """The options of a preset or of a YAML file, as written (every value a string).

    Raises:
        UserError: neither a preset nor a file, not a mapping, or a key that is no option or is there twice.
    """
    check_text("--config", name, path=True)
    check_path("--config", name)
    path = Path(name)
    if name in presets():
        text = preset_text(name)
    elif path.is_file():
        text = read_text(path, f"--config {name}")
    else:
        raise UserError(f"--config {name}: neither a file nor a preset; presets: {', '.join(presets())}")
    options = read_strings(text, f"--config {name}") or {}
    if not isinstance(options, dict):
        raise UserError(f"--config {name}: expected lines of `option: value`")
    is_record = options.pop(RECORD, None) is not None
    known = list(declared())
    with all_faults():
        for key, value in options.items():
            require(key not in REFUSED, f"--config {name}: {key} is not taken: {REFUSED.get(key)}")
            is_known = key in known or key in REFUSED
            require(is_known, f"--config {name}: unknown key {key}" + ("" if is_known else nearest(key, known)))
            require(isinstance(value, str), f"--config {name}: {key} takes a single value")
    return _as_run(options) if is_record else options


def _as_run(options: dict[str, str]) -> dict[str, str]:
    """The options of a run's config.yaml that acted in that run, with its gate, whatever the defaults are by now."""
    given = TrainConfig().flat() | {key: None if value.lower() in EMPTY else value for key, value in options.items()}
    given["use_lpl"] = options.get("use_lpl", "true").lower() != "false"
    acted = acting(given, UNSAID_GATE)
    gates = {name: str(acted[name]) for name in GATES if acted.get(name) is not None}
    return {key: value for key, value in options.items() if key in acted} | gates


def without_replaced(options: dict[str, str], argv: list[str], is_preset: bool = False) -> dict[str, str]:
    """Options without those that flags of other names replace: gate, length of the run, share of --lpl_weight auto."""
    flags: dict[str, str] = {}
    for token, following in zip(argv, [*argv[1:], "--"], strict=False):
        name, joined, value = token.removeprefix("--").partition("=")
        if token.startswith("--"):
            switched = "true" if following.startswith("--") else following
            flags[name.replace("-", "_")] = value if joined else switched
    given = {name for name, value in flags.items() if value.lower() not in (*EMPTY, "none")}
    stated = {f"{name}={value}" for name, value in flags.items()}
    replaced = {
        name
        for name, facts in declared().items()
        if given & set(facts.replaced_by) or (is_preset and (given | stated) & set(facts.preset_unless))
    }
    if flags.get("lpl_weight", "auto") != "auto":
        replaced.add("lpl_target_share")
    return {name: value for name, value in options.items() if name not in replaced}


class _WithoutAliases:
    """Refuses aliases, which repeat parts of a file: nothing needs them, and a few lines can grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]
            mark = self.peek_event().start_mark  # type: ignore[attr-defined]
            raise UserError(f"line {mark.line + 1}: an alias (*): write the value itself")
        return super().compose_node(parent, index)  # type: ignore[misc]


class _PlainLoader(_WithoutAliases, yaml.SafeLoader):
    """Values as YAML means them."""


class _OnceLoader(_WithoutAliases, yaml.BaseLoader):
    """Every value a string; a key that is given twice is refused, where YAML's own loaders keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise UserError(f"line {key.start_mark.line + 1}: {key.value} is given twice: drop one")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def read_strings(text: str, where: str) -> Any:
    """What YAML holds, every value a string as it is written; `where` is flag and file, for errors.

    Raises:
        UserError: not YAML, or a key that is given twice.
    """
    return _load(text, _OnceLoader, where)


def _load(text: str, loader: Any, where: str) -> Any:
    try:
        return yaml.load(text, loader)
    except RecursionError as error:
        raise UserError(f"{where}: lists or mappings are nested too deep to be read") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: an invalid date or character
        raise UserError(f"{where}: not YAML: {on_one_line(error, 300)}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


RECORDED: Shape = {
    RECORD: {"processes?": whole(1, 10**6), REST: PLAIN},
    "train_batch_size?": whole(1, 10**9),
    "gradient_accumulation_steps?": whole(1, 10**9),
    REST: PLAIN,
}
"""config.yaml of a run."""


def read_record(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options and the versions that a run's config.yaml holds.

    Raises:
        UserError: it cannot be read, or was not written by lpl train.
    """
    try:
        found = _load(file.read_text(encoding="utf-8"), _PlainLoader, str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({on_one_line(error)})") from error
    if not isinstance(found, dict) or RECORD not in found:
        raise UserError(f"{file}: was not written by lpl train")
    found = {str(key): value for key, value in found.items()}
    require_shape(found, RECORDED, f"{file}: was not written by lpl train")
    return found, found.pop(RECORD)


def as_flags(options: dict[str, str]) -> list[str]:
    """Options as command-line flags; booleans become --x or --no_x."""
    flags = []
    for key, value in options.items():
        default = declared()[key].default
        if isinstance(default, bool):
            if value.lower() not in ("true", "false"):
                raise UserError(f"{key}: expected true or false, not {value!r}")
            flags.append(f"--{key}" if value.lower() == "true" else f"--no_{key}")
        elif value.lower() in EMPTY and isinstance(default, str):
            raise UserError(f"{key} is given empty: give a value, or leave it out")
        else:
            flags.append(f"--{key}={'None' if value.lower() in EMPTY else value}")
    return flags


def write_config(config: TrainConfig, folder: Path, processes: int = 1) -> None:
    """Makes the folder and writes its config.yaml; `--config` reads it.

    It has every option that is recorded (the token is not), LPL's gate even if it is the default, and versions.
    """
    stated = config.flat() | {key: value for key, value in acting(config.flat()).items() if key in GATES}
    options = {name: value for name, value in stated.items() if declared()[name].recorded}
    text = yaml.safe_dump(options | {RECORD: environment() | {"processes": processes}}, sort_keys=False)
    write_output(folder / CONFIG_FILE, text.encode(), f"--output_dir {folder}")


def is_config_of_run(path: Path) -> bool:
    """Whether a file is a config.yaml that write_config has written, judged by its last part."""
    try:
        return f"\n{RECORD}:" in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def differences(config: TrainConfig, folder: Path, processes: int = 1) -> list[str]:
    """Options that change the trajectory of the run whose config.yaml lies in folder, as `--flag old -> new`.

    An option that the file lacks had its default; options without effect beside the others are not compared. Of batch
    size, accumulation and processes only the product counts, the samples of a step.

    Raises:
        UserError: a config.yaml of something else, which a run would overwrite.
    """
    try:
        old, versions = read_record(folder / CONFIG_FILE)
    except UserError as error:
        raise UserError(f"--output_dir {folder}: {error}; choose another folder") from error
    before = TrainConfig().flat() | old
    acted, now = acting(before, UNSAID_GATE), acting(config.flat())
    told = [
        f"--{key} {acted[key]} -> {now[key]}"
        for key in now
        if key in acted
        and acted[key] != now[key]
        and not _same_path(declared()[key], acted[key], now[key])
        and not (declared()[key].free or declared()[key].divides)
    ]
    samples, new_samples = (
        int(options["train_batch_size"] * options["gradient_accumulation_steps"] * number)
        for options, number in ((before, versions.get("processes", processes)), (config.flat(), processes))
    )
    return told if samples == new_samples else [*told, f"samples a step {samples} -> {new_samples}"]


def _same_path(facts: Facts, old: Any, new: Any) -> bool:
    """Whether two spellings of a path name the same existing file or folder."""
    are_paths = facts.path and isinstance(old, str) and isinstance(new, str)
    return are_paths and Path(new).exists() and Path(old).expanduser().resolve() == Path(new).resolve()
