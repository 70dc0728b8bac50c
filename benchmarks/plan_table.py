"""What fits a GPU, as tables for docs/training.md.

    python benchmarks/plan_table.py [GiB ...]    # SDXL at 1024 px, batch 1, with the cheapest settings that fit
    python benchmarks/plan_table.py presets      # LoRA presets as they are, on a base in 8 and in 4 bits, and offloaded

Counted (lpl.analysis), not measured on a GPU. Left out: the CUDA context, workspace inside kernels, fragmentation;
5 % of the GPU's memory is left for them.
"""

import sys
from typing import Any

from lpl.analysis.alternatives import RANK, cheapest, smallest
from lpl.analysis.needs import estimate
from lpl.config import TrainConfig
from lpl.config.command_line import parse_train
from lpl.families import blueprint, plan_configs
from lpl.presets import presets
from lpl.training.rehearsal import Rehearsal

BASES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8": {"quantize_base": "int8"},
    "nf4": {"quantize_base": "nf4"},
    "offloaded": {"offload_blocks": 1.0, "offload_text_encoders": True},
}
FIXED = (f"--rank {RANK}", "--no_use_lpl")
KINDS = {
    "LoRA": ["--no_use_lpl", f"--rank={RANK}"],
    "LoRA with LPL": [f"--rank={RANK}"],
    "full": ["--no_use_lpl"],
    "full with LPL": [],
}


def main(sizes: list[float]) -> None:
    configs = {name: parse_train(["--resolution=1024", *flags]) for name, flags in KINDS.items()}
    rehearsal = Rehearsal(blueprint(plan_configs(TrainConfig().model)))
    print("| GPU | " + " | ".join(KINDS) + " |\n|---|" + "---|" * len(KINDS))
    for size in sizes:
        cells = []
        for config in configs.values():
            found = cheapest(config, int(size * 2**30), rehearsal, fixed=FIXED)
            if found is None:
                least = smallest(config, rehearsal, fixed=FIXED)
                cells.append(f"no: at least {least.needs.peak / 2**30:.1f} GiB")
            else:
                flags = found.flags.replace("--", "")
                cells.append(f"{found.needs.peak / 2**30:.1f} GiB" + (f": `{flags}`" if flags else ""))
        print(f"| {size:g} GB | " + " | ".join(cells) + " |", flush=True)


def lora_presets() -> None:
    """Peaks of every LoRA preset, with and without LPL, by how the base weights are stored."""
    print("| preset | " + " | ".join(f"{kind} | without LPL" for kind in BASES) + " |")
    print("|---|" + "---|" * 2 * len(BASES))
    for name in (name for name in presets() if name.endswith("-lora")):
        config = parse_train(["--config", name])
        rehearsal = Rehearsal(blueprint(plan_configs(config.model), config.model))
        cells = []
        for options in BASES.values():
            for use_lpl in (True, False):
                changed = config.changed(use_lpl=use_lpl, **options)
                needs = estimate(changed, rehearsal)
                cells.append(f"{needs.peak / 2**30:.1f} GiB ({needs.phase})")
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["presets"]:
        lora_presets()
        sys.exit()
    main([float(size) for size in sys.argv[1:]] or [8, 12, 16, 24, 48, 80])
