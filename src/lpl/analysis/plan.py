"""`lpl train --dry_run`: what a run will train, compare and need, from configs alone, before anything loads."""

from __future__ import annotations

import math
from typing import Any

import torch

from lpl.analysis.memory import count_saved_bytes
from lpl.config import TrainConfig
from lpl.errors import UserError
from lpl.families import meta_models
from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.training.lora import add_lora
from lpl.training.preflight import Checked

HALF = ("fp16", "bf16")


def describe(config: TrainConfig, checked: Checked) -> str:
    """The plan as text.

    Memory is an estimate: weights, gradients and optimizer state are exact; activations are the float32 bytes that
    autograd keeps, counted on the meta device and halved under mixed precision; workspace and
    fragmentation are not in it.

    Raises:
        UserError: a single file without --single_file_config, whose configs are needed.
    """
    if not checked.model_configs:
        raise UserError("--dry_run of a .safetensors file needs --single_file_config, a folder with its configs")
    unet, vae, lora_targets = meta_models(checked.model_configs)
    run, precision = config.run, config.run.mixed_precision or "no"
    half = precision in HALF
    weight_bytes = 2 if half and config.model.rank is not None else 4
    frozen = sum(p.numel() for p in unet.parameters())
    if config.model.rank is not None:
        add_lora(unet, config.model.rank, lora_targets, run.seed)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    stride = 2 ** (len(vae.config.block_out_channels) - 1)
    side = config.data.crop_size // stride
    shape = (run.train_batch_size, vae.config.latent_channels, side, side)
    samples, per_step = len(checked.source), run.train_batch_size * run.gradient_accumulation_steps
    steps = run.max_train_steps or math.ceil(run.num_train_epochs * samples / per_step)

    lines = [
        f"model        {config.model.pretrained_model_name_or_path}",
        f"trains       {trained:,} parameters "
        + (f"(LoRA of rank {config.model.rank} on {frozen:,})" if config.model.rank else "(the whole UNet)"),
        f"data         {samples} samples at {config.data.crop_size} px, latents {shape[1]} x {side} x {side}",
        f"steps        {steps} of {per_step} samples per process, {steps * per_step / samples:.2f} epochs per process",
        f"rate         {config.learning_rate:g}, {config.optim.lr_scheduler}; mixed precision {precision}",
    ]
    state = 1 if config.optim.use_8bit_adam else 4
    rows = [("UNet weights", frozen * weight_bytes + (trained * 4 if config.model.rank else 0))]
    rows += [("gradients", trained * 4), ("AdamW state", 2 * trained * state)]
    if config.optim.use_ema:
        rows.append(("EMA", trained * 4))
    rows.append(("VAE, float32", sum(p.numel() for p in vae.parameters()) * 4))
    rows.append(("UNet activations", _unet_bytes(unet, shape, config) // (2 if half else 1)))
    if config.lpl.use_lpl:
        loss = LatentPerceptualLoss(
            vae, num_blocks=config.lpl.lpl_num_blocks, checkpointing=config.lpl_checkpointing,
            norm_type=config.lpl.lpl_norm_type, remove_outliers=config.lpl.lpl_remove_outliers,
        )  # fmt: skip
        rows.append(("LPL, one gated sample", _lpl_bytes(loss, (1, *shape[1:]), config)))
        lines.append(
            f"LPL          weight {config.lpl.lpl_weight}, {config.lpl.lpl_norm_type}, {config.lpl.lpl_loss_type}"
        )
        for tap, weight in zip(loss.taps, loss.weights, strict=True):
            cells = config.data.crop_size // tap.stride
            lines.append(f"  tap {tap.name:6}  {tap.channels} x {cells} x {cells}, weight {weight:g}")
    total = sum(size for _, size in rows)
    lines.append(f"memory       about {_readable(total)} on the device, of which")
    lines += [f"  {name:22} {_readable(size):>10}" for name, size in rows]
    return "\n".join(lines)


def _unet_bytes(unet: Any, shape: tuple[int, ...], config: TrainConfig) -> int:
    if config.run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    batch, settings = shape[0], unet.config
    pooled = settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim
    with torch.device("meta"):
        inputs = (
            torch.empty(shape),
            torch.zeros(batch, dtype=torch.long),
            torch.empty(batch, 77, settings.cross_attention_dim),
        )
        conditions = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}
    return count_saved_bytes(lambda: unet(*inputs, added_cond_kwargs=conditions), unet.parameters())


def _lpl_bytes(loss: LatentPerceptualLoss, shape: tuple[int, ...], config: TrainConfig) -> int:
    weights = [p for module in loss.decoder.modules() for p in module.parameters()]
    pred, target = torch.empty(shape, device="meta", requires_grad=True), torch.empty(shape, device="meta")
    size = count_saved_bytes(lambda: loss(pred, target), weights)
    return size if config.lpl.lpl_dtype == "float32" else size // 2


def _readable(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
