"""Results for inference, every N steps and at the end, each folder saying what it holds; publishing them on the Hub."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from torch import Tensor

from lpl.base.errors import TrainingStoppedError, UserError, on_one_line
from lpl.base.output_folder import OutputFolder
from lpl.base.tensor_file import write_tensors
from lpl.config import TrainConfig
from lpl.config.run_folder import CONFIG_FILE, FINISHED, RESULT, SAMPLES, SAVED, UNPUBLISHED, WEIGHTS
from lpl.families.export import LORA_FILE
from lpl.training.weights import Weights

ALL_WEIGHTS = "a folder for diffusers; `lpl export` makes the file for ComfyUI, A1111 and Forge"
"""Which result is for which programs, where all weights were trained."""


def save_weights(
    output: OutputFolder, step: int, weights: Weights, write: Callable[[Path], None], writes: bool = True
) -> Path:
    """Writes saved-<step>/raw and, with an average, /ema, each as inference loads it; training is undisturbed.

    weights.json beside them has the step, the kinds that are there, and which of them the run's result is made of.
    The folder appears whole, or not at all.

    Args:
        write: writes the denoiser, or its adapter, as it is then, into a folder; every process calls it.
        writes: whether this is the process that writes.
    """
    final = output.folder / f"{SAVED}-{step}"
    temporary = output.folder / f".tmp-{final.name}"
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
    for kind in weights.kinds:
        if writes:
            (temporary / kind).mkdir(parents=True)
        with weights.use(kind):
            write(temporary / kind)
    if writes:
        contents = {"step": step, "kinds": list(weights.kinds), "final": weights.final}
        (temporary / WEIGHTS).write_text(json.dumps(contents), encoding="utf-8")
        output.put({final.name: temporary})
    return final


def save_result(
    output: OutputFolder, step: int, weights: Weights, write: Callable[[Path], None], writes: bool, data: str
) -> None:
    """Writes the result, of the weights that --final_weights names, into the output folder, and marks it as finished.

    Args:
        write: writes the pipeline or the adapter into a folder; every process calls it.
        writes: whether this is the process that writes.
        data: digest of the samples that the run was trained on.

    Raises:
        TrainingStoppedError: something else took one of its names since the run began; the result is beside it.
    """
    weights.put(weights.final)
    temporary = output.folder / RESULT
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    if not writes:
        return
    content = json.dumps({"step": step, "weights": weights.final, "data": data}).encode()
    try:
        output.put({part.name: part for part in sorted(temporary.iterdir())}, (FINISHED, content))
    except UserError as error:
        aside = next(path for n in count(1) if not (path := output.folder / f"result-{step}-{n}").exists())
        temporary.rename(aside)
        raise TrainingStoppedError(f"{error}; the result of this run is in {aside}") from error


def write_beside(
    lora: Path,
    name: str,
    renamed: Callable[[Path, str], tuple[dict[str, Tensor], dict[str, str]]],
    readers: str,
    others: str,
) -> str:
    """Writes a LoRA a second time, beside diffusers' file, which does nothing in A1111 or kohya's programs.

    Args:
        renamed: makes its tensors and metadata from the first file and a title.
        readers: the programs that read the first.
        others: those that read the second.

    Returns:
        Which file is for which programs, or why there is one only.
    """
    try:
        tensors, metadata = renamed(lora, Path(name).stem)
    except UserError as error:
        return f"{lora.name} for {readers}; none for others: {str(error).removeprefix(f'{lora}: ')}"
    write_tensors(tensors.items(), lora.with_name(name), metadata)
    return f"{lora.name} for diffusers; {name} for {others}"


def next_commands(folder: Path, readers: str | None, place: str | None = None) -> str:
    """What to do with a result, for the last line that a run prints.

    Args:
        readers: of a LoRA, the programs that read diffusers' file; None: all weights were trained.
        place: the folder that ComfyUI has single files of the model in; None: it reads none.
    """
    shown, where = shlex.quote(str(folder)), ""
    beside = [path for path in sorted(folder.glob("*.safetensors")) if path.name != LORA_FILE]
    if readers is not None and "ComfyUI" in readers:
        beside = [folder / LORA_FILE]
    if readers is None and place is not None:
        file = shlex.quote(f"{folder.resolve().name}.safetensors")
        where = f"`lpl export {shown} --output {file}` for ComfyUI's {place}; "
    elif readers is not None and beside:
        where = f"copy {shlex.quote(str(beside[0]))} into ComfyUI's models/loras; "
    return f"{where}`lpl report {shown}` for a page of losses and images"


def create_repository(config: TrainConfig) -> str:
    """Makes sure, before training, that the push at its end can work; returns the repository's full name.

    Raises:
        UserError: no network, or no right to create the repository.
    """
    from huggingface_hub import create_repo
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    name = config.logging.hub_model_id or Path(config.run.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=config.logging.hub_token).repo_id
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = on_one_line(error, 200)
        raise UserError(f"--push_to_hub: cannot create {name}: {reason}; see `hf auth login`, --hub_token") from error


def push(config: TrainConfig, repository: str) -> None:
    """Uploads the result, its samples and config.yaml; no checkpoints, no logs, nothing that shows or names images."""
    from huggingface_hub import upload_folder

    folder = Path(config.run.output_dir)
    write_model_card(config, folder)
    upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="End of training",
        ignore_patterns=[*UNPUBLISHED, f"{config.logging.logging_dir}/*"],
        token=config.logging.hub_token,
    )


def write_model_card(config: TrainConfig, folder: Path) -> Path:
    """Writes folder/README.md: base model, data, method, how to load it, and the configuration."""
    from huggingface_hub import ModelCard, ModelCardData

    lora = config.model.rank is not None
    base, merged = str(config.model.pretrained_model_name_or_path), config.model.merged_lora
    whole = f"`{base}`" if merged is None else f"`{base}` with `{Path(merged).name}` merged into it"
    data = ModelCardData(
        base_model=base if not Path(base).exists() else None,
        library_name="diffusers",
        tags=["text-to-image", "diffusers", "latent-perceptual-loss", *(["lora"] if lora else [])],
        datasets=[config.data.dataset_name] if config.data.dataset_name else None,
    )
    samples = sorted((folder / SAMPLES).glob("*.png"))
    picture = (
        f"![{config.logging.validation_prompt or 'validation images'}](samples/{samples[-1].name})\n\n"
        if samples
        else ""
    )
    load = "pipeline.load_lora_weights(...)" if lora else "DiffusionPipeline.from_pretrained(...)"
    method = (
        "the Latent Perceptual Loss (Berrada et al., ICLR 2025, arXiv 2411.04873)"
        if config.lpl.use_lpl
        else "the plain diffusion objective"
    )
    optim = config.optim
    averaged = optim.use_ema and optim.final_weights != "raw"
    weights = f"their exponential moving average (decay {optim.ema_decay:g})" if averaged else "those of the last step"
    text = f"""---
{data.to_yaml()}
---
# {folder.resolve().name}

{"A LoRA" if lora else "A full fine-tune"} of {whole}, trained with {method}. Load it with `{load}`.
The weights are {weights}.

{picture}```yaml
{(folder / CONFIG_FILE).read_text(encoding="utf-8")}```
"""
    ModelCard(text).save(folder / "README.md")
    return folder / "README.md"
