"""What same_results.py runs: the commands of each case, and the model and images they are given."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

PROCESSES = 2
TRAIN = (
    "--pretrained_model_name_or_path=inputs/model", "--train_data_dir=inputs/images", "--resolution=16",
    "--train_batch_size=2", "--max_train_steps=4", "--checkpointing_steps=2", "--log_every=1", "--learning_rate=1e-3",
    "--lpl_weight=1.0", "--lpl_norm_type=channel", "--lpl_t_threshold=700",
)  # fmt: skip
"""Given to every command that takes the options of `lpl train`, unless its line overrides them."""
DRAW = "--resolution=16 --num_inference_steps=2 --num_bootstrap=100 --output_dir={case}/eval"
EVAL = f"--reference_dir=inputs/reference --reference_cache_dir={{case}}/reference {DRAW}"

CASES: dict[str, list[str]] = {
    "plain": ["train --no_use_lpl", "train --no_use_lpl", "cache verify --latent_cache_dir={case}/cache"],
    "auto_weight": ["train --lpl_weight=auto --lpl_norm_type=shared --lpl_t_threshold=None --lpl_sigma_threshold=5"],
    "every_norm": [
        f"train --max_train_steps=2 --checkpointing_steps=500 --lpl_norm_type={norm} --output_dir={{case}}/{norm}"
        for norm in ("default", "batch", "channel_detached", "own")
    ],
    "lpl_options": [
        "train --lpl_reduction=gated --lpl_loss_type=l1 --no_lpl_pow_law --no_lpl_remove_outliers --lpl_num_blocks=1"
        " --lpl_max_samples=1 --lpl_start=1 --lpl_warmup_steps=2 --lpl_checkpointing=true --lpl_dtype=bfloat16"
    ],
    "lpl_crop": ["train --lpl_crop=8 --lpl_norm_type=shared"],
    "lpl_random_depth": ["train --lpl_random_depth"],
    "lpl_budget": ["train --lpl_budget=0.3 --lpl_weight=auto"],
    "masks": [
        "train --masked_loss=files --mask_dir=inputs/masks --unmasked_weight=0.1",
        "train --masked_loss=alpha --train_data_dir=inputs/transparent --output_dir={case}/alpha",
    ],
    "buckets": ["train --buckets --bucket_step=4 --crop_variants=2 --random_flip --cache_dtype=float16"],
    "captions": [
        "train --shuffle_caption --keep_tokens=1 --caption_variants=3 --caption_prefix=sks --repeats=b=1.5"
        " --proportion_empty_prompts=0.3 --reg_data_dir=inputs/reg --prior_loss_weight=0.5 --max_token_length=150"
        " --clip_skip=1"
    ],
    "sources": [
        "train --train_data_dir=None --webdataset=inputs/shard.tar --output_dir={case}/tar",
        "train --train_data_dir=None --dataset_name=inputs/rows.parquet --output_dir={case}/parquet",
        "train --train_data_dir=None --dataset_name=inputs/rows.parquet --streaming --output_dir={case}/stream",
    ],
    "lora": [
        "train --rank=2 --lora_alpha=1 --lora_dropout=0.1 --lora_targets=all",
        "export {out} --to=kohya --output={case}/kohya.safetensors",
        "export {out} --to=safetensors --dtype=float16 --output={case}/merged.safetensors",
        f"eval --pretrained_model_name_or_path={{out}} --lora_scale=0.7 --num_samples=4 --guidance_scale=2 {EVAL}",
    ],
    "dora": ["train --rank=2 --use_dora --lora_targets=attention_mlp"],
    "text_encoders": [
        "train --train_text_encoder --text_encoder_lr=1e-4 --text_encoder_2_lr=2e-4 --proportion_empty_prompts=0.3",
        "train --train_text_encoder --rank=2 --output_dir={case}/lora",
    ],
    "huber": ["train --loss_type=huber --huber_schedule=exponential --lpl_scale"],
    "weighting": [
        "train --loss_weighting=debiased --prediction_type=v_prediction --rescale_betas_zero_snr",
        "train --loss_weighting=p2 --p2_gamma=0.5 --output_dir={case}/p2",
    ],
    "noise": [
        "train --pyramid_noise_iterations=3 --snr_gamma=5",
        "train --noise_offset=0.05 --output_dir={case}/offset",
    ],
    "timesteps": [
        "train --timestep_sampling=stratified --timestep_distribution=logit_normal --logit_mean=-0.5"
        " --timestep_bias_strategy=earlier --timestep_bias_multiplier=2"
    ],
    "schedule_free": ["train --optimizer=schedulefree_adamw --lr_warmup_steps=2"],
    "prodigy": ["train --optimizer=prodigy --learning_rate=1.0 --optimizer_args=d_coef=2.0"],
    "bfloat16": [
        "train --weights_dtype=bfloat16 --mixed_precision=bf16 --fused_backward_pass --max_grad_norm=0",
        "train --weights_dtype=bfloat16 --mixed_precision=bf16 --optimizer=adafactor --output_dir={case}/adafactor",
    ],
    "ema": ["train --use_ema --ema_decay=0.9 --save_steps=2 --lr_scheduler=cosine --lr_warmup_steps=1 --decay_all"],
    "accumulation": ["train --gradient_accumulation_steps=2 --lpl_weight=auto --gradient_checkpointing"],
    "resume": [
        "train --max_minutes=1e-9 --use_ema --gradient_accumulation_steps=2 --lpl_weight=auto --random_flip",
        "train --use_ema --gradient_accumulation_steps=2 --lpl_weight=auto --random_flip",
    ],
    "processes": [f"{PROCESSES}x train --lpl_weight=auto --use_ema --ema_decay=0.9 --random_flip"],
    "validation": [
        "train --validation_samples=2 --validation_steps=2 --validation_prompt=red --num_validation_images=1 --use_ema"
    ],
    "commands": [
        "train --validation_samples=2 --validation_steps=2",
        "export {out} --to=safetensors --output={case}/model.safetensors",
        f"eval --pretrained_model_name_or_path={{out}} --num_samples=52 --guidance_scale=1 {EVAL}",
        f"eval --images=inputs/reference --against=reconstructions --pretrained_vae_model_name_or_path=inputs/model/vae"
        f" {EVAL.replace('{case}/eval', '{case}/there').replace(' --num_inference_steps=2', '')}",
        "check --num_images=16 --train_data_dir=inputs/reference",
        "data --buckets --bucket_step=4 --random_flip",
        "report {out} {case}/eval {case}/there {case}/out/check-report --output={case}/page.html",
        "cache prune --latent_cache_dir={case}/cache --days=0",
    ],
    "compare": ["compare --arms=inputs/arms.yaml --seeds 0 1 --validation_samples=2 --validation_steps=2"],
    "plan": [
        "plan --pretrained_model_name_or_path=inputs/model --resolution=32 --memory=1 --lpl_weight=1.0",
        "plan --pretrained_model_name_or_path=inputs/model --resolution=16 --rank=4 --num_processes=4 --sharding=fsdp2",
    ],
}  # fmt: skip

BUILD_MODEL = "import sys; from tiny_models import tiny_sdxl; tiny_sdxl(sys.argv[1])"
"""Runs with this working tree's source (and tests) on the path."""


def write_inputs(folder: Path, repository: Path) -> None:
    """Writes the model and the images that both sides get."""
    path = os.pathsep.join(str(repository / name) for name in ("src", "tests"))
    subprocess.run(
        [sys.executable, "-c", BUILD_MODEL, str(folder / "model")],
        check=True, capture_output=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    images = [_picture(seed, shape) for seed, shape in zip(range(9), 3 * [(24, 24), (36, 18), (18, 33)], strict=True)]
    captions = [[f"picture {n}, red, round, small", f"another {n}"] if n % 2 else f"tags {n}, blue" for n in range(9)]
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        name = f"{'ab'[n > 5]}/{n}.png"
        for kind in ("images", "masks", "transparent"):
            (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / "images" / name)
        mask = _picture(n + 20, image.size).convert("L").point(lambda v: 255 * (v > 127))
        mask.save(folder / "masks" / name)
        image.putalpha(mask)
        image.save(folder / "transparent" / name)
        for kind in ("images", "transparent"):
            _add_line(folder / kind / "metadata.jsonl", {"file_name": name, "text": caption})
    for kind, count in (("reg", 3), ("reference", 52)):
        (folder / kind).mkdir()
        for n in range(count):
            _picture(n + 100, (24, 20) if kind == "reg" else (16, 16)).save(folder / kind / f"{n}.png")
            row = {"file_name": f"{n}.png", "text": f"thing {n % 5}"}
            _add_line(folder / kind / "metadata.jsonl", row)
    _write_rows(folder)
    arms = "baseline: {lpl_weight: 0}\nlpl: {lpl_weight: 5}\nrepeat: {lpl_weight: 0}\n"
    (folder / "arms.yaml").write_text(arms)


def _add_line(file: Path, row: Any) -> None:
    with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")


def _picture(seed: int, size: tuple[int, int]) -> Any:
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def _write_rows(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(f"thing {n}", (folder / "reference" / f"{n}.png").read_bytes()) for n in range(6)]
    images = [{"bytes": data, "path": f"{n}.png"} for n, (_, data) in enumerate(rows)]
    pq.write_table(pa.table({"image": images, "text": [text for text, _ in rows]}), folder / "rows.parquet")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for n, (text, data) in enumerate(rows):
            for suffix, content in (("png", data), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{n}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
