"""Time and memory of LPL on SDXL's decoder with random weights, as ratios.

    python benchmarks/loss_time.py time [pixels [samples [rounds]]]
    python benchmarks/loss_time.py sweep
    python benchmarks/loss_time.py memory [pixels]

time: the ways alternate in one process; medians over rounds, relative to a plain vae.decode() and to the textbook with
per-block checkpointing. sweep: the same over sizes, samples and blocks. memory: the peak of resident memory beyond the
loaded model, each way in its own process. Set OMP_NUM_THREADS=1 on a busy machine.
"""

import ctypes
import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from lpl import LatentPerceptualLoss
from lpl.perceptual.textbook import textbook_lpl

sys.path.insert(0, str(Path(__file__).parent))
from loss_cost import sdxl_vae

LPL = {
    "lpl": {},
    "lpl, checkpointing": {"checkpointing": True},
    "lpl, bfloat16": {"dtype": torch.bfloat16},
    "lpl, bfloat16, checkpointing": {"dtype": torch.bfloat16, "checkpointing": True},
}
TEXTBOOK = "textbook, checkpointing"


def ways(vae, pixels, samples, names, num_blocks=4):
    """Functions by name: each does one full pass, with the gradient (except decode)."""
    target = torch.randn(samples, 4, pixels // 8, pixels // 8, generator=torch.Generator().manual_seed(0))
    pred = (target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()

    def decode():
        with torch.no_grad():
            vae.decode(target / vae.config.scaling_factor)

    def textbook(checkpointing):
        value = textbook_lpl(vae, pred, target, num_blocks=num_blocks, checkpointing=checkpointing)
        torch.autograd.grad(value.sum(), pred)

    def ours(name):
        loss_fn = LatentPerceptualLoss(vae, num_blocks=num_blocks, **LPL[name])
        return lambda: torch.autograd.grad(loss_fn(pred, target).per_sample.sum(), pred)

    known = {
        "decode": lambda: decode,
        "textbook": lambda: lambda: textbook(False),
        TEXTBOOK: lambda: lambda: textbook(True),
    } | {name: lambda name=name: ours(name) for name in LPL}
    return {name: known[name]() for name in names}


def measure(functions, rounds):
    """Median seconds by name; with several rounds the first is not counted."""
    seconds = {name: [] for name in functions}
    for i in range(rounds + 1 if rounds > 1 else 1):
        for name, function in functions.items():
            gc.collect()
            start = time.perf_counter()
            function()
            if i or rounds == 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def compare(vae, pixels, samples, rounds, num_blocks=4, names=("decode", TEXTBOOK, *LPL)):
    found = measure(ways(vae, pixels, samples, names, num_blocks), rounds)
    for name, value in found.items():
        textbook = f"{value / found[TEXTBOOK]:.2f}" if TEXTBOOK in found else ""
        print(
            f"| {pixels} | {samples} | {num_blocks} | {name} | {value / found['decode']:.2f} | {textbook} |", flush=True
        )


def head():
    print(f"{torch.get_num_threads()} threads\n")
    print("| px | samples | blocks | way | in decodes | of the textbook's |\n|---|---|---|---|---|---|", flush=True)


def sweep(vae):
    head()
    for pixels, rounds in ((64, 5), (128, 3)):
        compare(vae, pixels, 1, rounds)
    compare(vae, 512, 1, 1, names=("decode", TEXTBOOK, "lpl", "lpl, bfloat16"))
    for samples in (2, 4):
        compare(vae, 128, samples, 3, names=("decode", TEXTBOOK, "lpl", "lpl, bfloat16"))
    for blocks in range(4):
        compare(vae, 128, 1, 3, blocks, names=("decode", TEXTBOOK, "lpl", "lpl, bfloat16"))


def peak_of(name, pixels, samples):
    """Peak resident memory of one pass beyond the loaded model, in KiB; run in its own process."""
    vae = sdxl_vae("cpu")
    run = ways(vae, pixels, samples, [name])[name]
    ways(vae, 16, 1, [name])[name]()  # loads what libraries load at first use
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    run()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) - before


RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def memory(pixels):
    """Prints peaks against the textbook with glibc's defaults, and over samples with freed memory returned."""
    print("| px | samples | way | peak over the model | of the first |\n|---|---|---|---|---|", flush=True)
    defaults = [(TEXTBOOK, 2), *((name, 2) for name in LPL)]
    returned = [("lpl", samples) for samples in (1, 2, 4, 8)]
    for rows, settings in ((defaults, {}), (returned, RETURNING)):
        base = None
        for name, samples in rows:
            command = [sys.executable, __file__, "peak", name, str(pixels), str(samples)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | settings)
            kib = int(done.stdout.split()[-1])
            base = base or kib
            label = f"{name}, freed memory returned" if settings else name
            print(f"| {pixels} | {samples} | {label} | {kib / 1024:.0f} MiB | {kib / base:.3f} |", flush=True)


def main(what="time", *rest):
    if what == "peak":
        print(peak_of(rest[0], int(rest[1]), int(rest[2])))
    elif what == "memory":
        memory(*map(int, rest or (256,)))
    elif what == "sweep":
        sweep(sdxl_vae("cpu"))
    else:
        pixels, samples, rounds = (*map(int, rest), *(256, 2, 3)[len(rest) :])
        head()
        compare(sdxl_vae("cpu"), pixels, samples, rounds)


if __name__ == "__main__":
    main(*sys.argv[1:])
