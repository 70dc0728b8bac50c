"""The memory that `lpl plan` predicts against the memory that real training steps take on a CPU.

    python benchmarks/plan_check.py [case ...]

Each case runs in its own process: two steps with the trainer's own parts (denoiser, diffusion loss, LPL on every
sample, backward, clipping, AdamW, EMA), after steps of a tiny model, so that libraries are loaded. The peak of resident
memory (VmHWM) above the memory before the models were built is measured. glibc is told to return freed memory at once
(MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ below), so that it does not hide the peak's shape; Linux only.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "ACCELERATE_USE_CPU": "true",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
TOLERANCE = 0.15


class Case(NamedTuple):
    """A model's widths and a run's options."""

    unet: tuple[int, int, int]
    vae: tuple[int, int, int, int]
    flags: str


SMALL, MEDIUM, LARGE = (64, 128, 256), (128, 256, 512), (256, 512, 768)
THIN, HALF = (32, 64, 64, 64), (64, 128, 256, 256)
CASES = {
    "full": Case(MEDIUM, THIN, "--resolution 256 --train_batch_size 2 --no_use_lpl"),
    "full, wide, EMA": Case(LARGE, THIN, "--resolution 128 --no_use_lpl --use_ema"),
    "full, accumulation": Case(
        MEDIUM, THIN, "--resolution 384 --train_batch_size 2 --gradient_accumulation_steps 2 --no_use_lpl"
    ),
    "full, bf16 weights": Case(
        LARGE, THIN, "--resolution 128 --no_use_lpl --mixed_precision bf16 --weights_dtype bfloat16"
    ),
    "full, fused backward": Case(
        LARGE, THIN, "--resolution 128 --no_use_lpl --optimizer adafactor --fused_backward_pass --max_grad_norm 0"
    ),
    "full, bf16 weights, fused backward": Case(
        LARGE, THIN,
        "--resolution 128 --no_use_lpl --mixed_precision bf16 --weights_dtype bfloat16 --optimizer adafactor "
        "--fused_backward_pass --max_grad_norm 0",
    ),
    "full, activations": Case(SMALL, THIN, "--resolution 768 --train_batch_size 2 --no_use_lpl"),
    "full, bf16": Case(SMALL, THIN, "--resolution 768 --train_batch_size 2 --no_use_lpl --mixed_precision bf16"),
    "full, checkpointing": Case(
        SMALL, THIN, "--resolution 1024 --train_batch_size 2 --no_use_lpl --gradient_checkpointing"
    ),
    "full, LPL": Case(SMALL, HALF, "--resolution 512"),
    "full, LPL, batch 4": Case(SMALL, HALF, "--resolution 256 --train_batch_size 4"),
    "full, LPL, checkpointing": Case(SMALL, HALF, "--resolution 512 --gradient_checkpointing"),
    "full, LPL in bfloat16": Case(SMALL, HALF, "--resolution 512 --lpl_dtype bfloat16"),
    "LoRA": Case(MEDIUM, THIN, "--resolution 512 --train_batch_size 2 --rank 16 --no_use_lpl"),
    "LoRA, bf16, checkpointing": Case(
        MEDIUM, THIN,
        "--resolution 1024 --train_batch_size 2 --rank 16 --no_use_lpl --gradient_checkpointing --mixed_precision bf16",
    ),
    "LoRA, bf16, checkpointing, LPL": Case(
        MEDIUM, HALF, "--resolution 512 --rank 16 --gradient_checkpointing --mixed_precision bf16"
    ),
}  # fmt: skip


def model_configs(case: Case) -> dict[str, Any]:
    """SDXL's configs at the case's widths."""
    from lpl.families.sdxl_configs import PUBLISHED

    unet = {
        "block_out_channels": list(case.unet),
        "attention_head_dim": [max(1, width // 64) for width in case.unet],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 256,
        "addition_time_embed_dim": 64,
        "projection_class_embeddings_input_dim": 6 * 64 + 128,
    }
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    return {
        **PUBLISHED,
        "unet": PUBLISHED["unet"] | unet,
        "vae": PUBLISHED["vae"] | {"block_out_channels": list(case.vae)},
        "text_encoder": PUBLISHED["text_encoder"] | text,
        "text_encoder_2": PUBLISHED["text_encoder_2"] | text,
    }


def options(case: Case) -> Any:
    """The run's configuration: a constant weight, and a gate that lets all samples pass."""
    from lpl.config.command_line import parse_train

    gate = [] if "--no_use_lpl" in case.flags else ["--lpl_weight=1.0", "--lpl_t_threshold=1000"]
    return parse_train([*case.flags.split(), *gate])


def predict(case: Case) -> tuple[int, str]:
    """Peak in bytes, and its phase."""
    from lpl.analysis.needs import estimate
    from lpl.families import blueprint
    from lpl.training.rehearsal import Rehearsal

    needs = estimate(options(case), Rehearsal(blueprint(model_configs(case)), "cpu"))
    steps = {phase: peak for phase, peak in needs.phases.items() if phase != "caching"}
    phase = max(steps, key=lambda name: steps[name])
    return steps[phase], phase


def measure(case: Case) -> int:
    """Peak in bytes, of this process."""
    tiny = case._replace(unet=(32, 32, 64), vae=(32, 32, 32, 32))
    resolution = options(case).data.resolution
    take_steps(tiny._replace(flags=case.flags.replace(f"--resolution {resolution}", "--resolution 64")))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    take_steps(case)
    return _status("VmHWM") - before


def take_steps(case: Case) -> None:
    """Two optimizer steps, as Trainer takes them."""
    import torch
    from accelerate.state import AcceleratorState

    from lpl.data.dataset import Batch
    from lpl.diffusion.latent_space import LatentSpace
    from lpl.families import blueprint
    from lpl.training.engine import add_lora, build_accelerator, build_objective
    from lpl.training.optimizers import build_optimizer
    from lpl.training.per_parameter import FusedBackward
    from lpl.training.step import TrainingStep
    from lpl.training.trainer import WEIGHT_DTYPES
    from lpl.training.weights import Average

    config, plan = options(case), blueprint(model_configs(case))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = build_accelerator(config)
    denoiser, vae = plan.denoiser(), plan.vae()
    if config.model.rank is not None:
        denoiser.to(dtype=WEIGHT_DTYPES[accelerator.mixed_precision])
        add_lora(denoiser, config.model, plan.lora_targets, 0)
    elif config.optim.weights_dtype == "bfloat16":
        denoiser.to(dtype=torch.bfloat16)
    if config.run.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    trained = [p for p in denoiser.train().parameters() if p.requires_grad]
    ema = Average(trained, config.optim) if config.optim.use_ema else None
    denoiser, optimizer = accelerator.prepare(denoiser, build_optimizer(trained, config.optim, 1e-4))
    fused = FusedBackward(trained, optimizer) if config.optim.fused_backward_pass else None
    family: Any = SimpleNamespace(
        denoise=plan.denoise, vae=vae, schedule=plan.schedule, latent_space=LatentSpace.from_config(vae.config),
        latent_stride=plan.stride,
    )  # fmt: skip
    objective = build_objective(config, family) if config.lpl.use_lpl else None
    step = TrainingStep(family, config.diffusion, objective, 0)
    size, side = config.run.train_batch_size, config.data.crop_size // plan.stride
    for i in range(2):
        for _ in range(config.run.gradient_accumulation_steps):
            batch = Batch(
                sample_ids=[str(sample) for sample in range(size)],
                counts=[i] * size,
                raw_latents=torch.randn(size, plan.latent_channels, side, side),
                text={name: torch.randn(value.shape) for name, value in plan.text(size).items()},
                extra={"sizes": torch.full((size, 6), 64.0)},
            )
            with accelerator.accumulate(denoiser):
                loss = step(denoiser, batch, accelerator.device, True, i).loss
                if fused is not None:
                    fused(accelerator.backward, loss, i + 1)
                    continue
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        if ema is not None:
            ema.after_step(i + 1, trained)


def _status(name: str) -> int:
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def main(names: list[str]) -> int:
    if names[:1] == ["--measure"]:
        print(json.dumps(measure(Case(*json.loads(names[1])))))
        return 0
    print("| case | phase of the peak | predicted | measured | ratio |\n|---|---|---|---|---|")
    worst = 0.0
    for name in names or CASES:
        case = CASES[name]
        command = [sys.executable, __file__, "--measure", json.dumps(case)]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
        measured, (predicted, phase) = int(done.stdout.splitlines()[-1]), predict(case)
        ratio = predicted / measured
        worst = max(worst, abs(ratio - 1))
        sizes = f"{predicted / 2**20:.0f} MiB | {measured / 2**20:.0f} MiB"
        print(f"| {name} | {phase} | {sizes} | {ratio:.2f} |", flush=True)
    print(f"\nfurthest from 1: {100 * worst:.0f} %, allowed {100 * TOLERANCE:.0f} %")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
