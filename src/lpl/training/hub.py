"""Publishing a result on the Hugging Face Hub, with a model card."""

from __future__ import annotations

from pathlib import Path

from lpl.config import TrainConfig
from lpl.config_io import CHECK_REPORT, CONFIG_FILE, DATA_REPORT
from lpl.data.bad_files import FILE as BAD_FILES
from lpl.errors import UserError
from lpl.training.output import SAVED


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
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--push_to_hub: cannot create {name}: {reason}; see `hf auth login`, --hub_token") from error


def push(config: TrainConfig, repository: str) -> None:
    """Uploads the result, its samples and config.yaml; not checkpoints, logs, nor what shows or names images."""
    from huggingface_hub import upload_folder

    folder = Path(config.run.output_dir)
    write_model_card(config, folder)
    upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="End of training",
        ignore_patterns=[
            "checkpoint-*",
            f"{SAVED}-*",
            ".tmp-*",
            ".lpl*",
            f"{config.logging.logging_dir}/*",
            f"{DATA_REPORT}/*",
            f"{CHECK_REPORT}/*",
            BAD_FILES,
        ],
        token=config.logging.hub_token,
    )


def write_model_card(config: TrainConfig, folder: Path) -> Path:
    """Writes folder/README.md: base model, data, method, how to load it, and the configuration."""
    from huggingface_hub import ModelCard, ModelCardData

    lora = config.model.rank is not None
    base = str(config.model.pretrained_model_name_or_path)
    data = ModelCardData(
        base_model=base if not Path(base).exists() else None,
        library_name="diffusers",
        tags=["text-to-image", "diffusers", "latent-perceptual-loss", *(["lora"] if lora else [])],
        datasets=[config.data.dataset_name] if config.data.dataset_name else None,
    )
    samples = sorted((folder / "samples").glob("*.png"))
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

{"A LoRA" if lora else "A full fine-tune"} of `{base}`, trained with {method}. Load it with `{load}`.
The weights are {weights}.

{picture}```yaml
{(folder / CONFIG_FILE).read_text()}```
"""
    ModelCard(text).save(folder / "README.md")
    return folder / "README.md"
