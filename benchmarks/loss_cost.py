"""What LPL costs with SDXL's decoder, counted: FLOPs in plain decodes, bytes kept for the backward pass, peak bytes.

    python benchmarks/loss_cost.py [pixels ...]
    python benchmarks/loss_cost.py cpu [pixels]
    python benchmarks/loss_cost.py causal [pixels]

Runs on the meta device, attention as one kernel: no weights, no arithmetic, the same figures everywhere. With several
sizes it also draws docs/cost.png. cpu: FLOPs of a real call on a CPU in float32. causal: one frame through the decoders
of Qwen-Image and Wan 2.2 at full width, frozen operations against plain blocks: processor time and bytes. "textbook" is
the definition, src/lpl/perceptual/textbook.py: two passes of plain autograd.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from time import process_time

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan

from lpl import LatentPerceptualLoss
from lpl.base.counter import FusedAttention, StepCounter
from lpl.perceptual.textbook import textbook_lpl

sys.path.insert(0, str(Path(__file__).parent))
from saved_bytes import count_saved_bytes

DOCS = Path(__file__).parents[1] / "docs"
WIDTHS = (128, 256, 512, 512)
MIB = 2**20


def sdxl_vae(device, dtype=torch.float32):
    """SDXL's VAE without its weights: none on the meta device, random ones elsewhere."""
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=WIDTHS,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
        )
    # Not vae.to(), which warns at each call.
    return torch.nn.Module.to(vae, dtype).eval().requires_grad_(False)


def meta_latents(pixels, samples=1):
    return torch.empty(samples, 4, pixels // 8, pixels // 8, device="meta").requires_grad_()


def decode_flops(vae, pixels):
    """FLOPs of one vae.decode() of one sample."""
    with torch.no_grad(), FusedAttention(), StepCounter() as counter:
        vae.decode(meta_latents(pixels).to(vae.dtype))
    return counter.flops


def count_lpl(pixels, samples=1, dtype=torch.float32, **options):
    """FLOPs, bytes kept for the decoder's backward pass, and peak bytes of a call, with its gradient."""
    loss_fn = LatentPerceptualLoss(sdxl_vae("meta", dtype), dtype=dtype, **options)
    return count_call(loss_fn, meta_latents(pixels, samples))


def count_call(loss_fn, pred):
    """The same for any loss.

    Kept: everything alive when that pass begins, except the gradient that it starts from.
    """
    kept = []
    segment = loss_fn.segments[len(loss_fn.taps) - 1]
    backward = segment.backward
    with FusedAttention(), StepCounter() as counter:

        def watched(saved, grads, checkpoint):
            kept.append(counter.live - sum(g.nbytes for g in grads))
            return backward(saved, grads, checkpoint)

        segment.backward = watched
        loss_fn(pred, pred.detach())
    return counter.flops, kept[0], counter.peak


def count_textbook(pixels, checkpointing=False):
    """FLOPs, bytes saved for backward (distinct storages, weights excluded), and peak bytes.

    torch's checkpoint recomputes outside the mode that keeps attention in one kernel, so with checkpointing the
    textbook's numbers include attention scores: 1 % at 512 px.
    """
    vae, pred = sdxl_vae("meta"), meta_latents(pixels)
    attention = nullcontext if checkpointing else FusedAttention

    def run():
        return textbook_lpl(vae, pred, pred.detach(), checkpointing=checkpointing)

    with attention(), StepCounter() as counter:
        run().sum().backward()
    pred.grad = None
    with attention():
        saved = count_saved_bytes(run, vae.parameters())
    return counter.flops, saved, counter.peak


def table(pixels):
    decode = decode_flops(sdxl_vae("meta"), pixels)
    print(f"\n{pixels} px, one sample; a plain decode is {decode / 1e12:.3f} TFLOP\n")
    print("| way | FLOPs, in plain decodes | kept for backward | of the textbook's | peak |\n|---|---|---|---|---|")
    base = None
    for name, (flops, kept, peak) in {
        "textbook": count_textbook(pixels),
        "textbook, checkpointing": count_textbook(pixels, True),
        "lpl": count_lpl(pixels),
        "lpl, checkpointing": count_lpl(pixels, checkpointing=True),
        "lpl, bfloat16": count_lpl(pixels, dtype=torch.bfloat16),
        "lpl, bfloat16, checkpointing": count_lpl(pixels, dtype=torch.bfloat16, checkpointing=True),
    }.items():
        base = base or kept
        print(f"| {name} | {flops / decode:.2f} | {kept / MIB:.0f} MiB | {kept / base:.3f} | {peak / MIB:.0f} MiB |")
    print("\n| blocks | FLOPs, in plain decodes | peak |\n|---|---|---|")
    for blocks in range(5):
        flops, _, peak = count_lpl(pixels, num_blocks=blocks)
        print(f"| {blocks} | {flops / decode:.2f} | {peak / MIB:.0f} MiB |")


def on_cpu(pixels):
    """FLOPs on a CPU in float32, where convolutions take Winograd's F(2, 3)."""
    vae, decode = sdxl_vae("cpu"), decode_flops(sdxl_vae("meta"), pixels)
    pred = torch.randn(1, 4, pixels // 8, pixels // 8).requires_grad_()
    for checkpointing in (False, True):
        with StepCounter() as counter:
            LatentPerceptualLoss(vae, checkpointing=checkpointing)(pred, pred.detach())
        print(f"{pixels} px, float32 on a CPU, checkpointing {checkpointing}: {counter.flops / decode:.2f} decodes")


def causal_vaes(device):
    """Qwen-Image's and Wan 2.2's VAEs without their weights; each with its latents' channels and stride."""
    wan = {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "is_residual": True,
        "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
        "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        qwen, wan22 = AutoencoderKLQwenImage(), AutoencoderKLWan(**wan)
    for name, vae, stride in (("Qwen-Image", qwen, 8), ("Wan 2.2", wan22, 16)):
        vae.encoder = torch.nn.Identity()
        yield name, vae.eval().requires_grad_(False), vae.config.z_dim, stride


def processor_time(function, *arguments):
    """Seconds of one call."""
    start = process_time()
    function(*arguments)
    return process_time() - start


def causal(pixels):
    """Processor time of forward and backward on one thread, the least of three calls, and bytes kept: frozen operations
    against plain blocks.
    """
    torch.set_num_threads(1)
    print(f"\n{pixels} px, one frame, forward and backward on one thread\n")
    print("| decoder | plain blocks | frozen | ratio | kept by plain blocks | by frozen | ratio |")
    print("|---|---|---|---|---|---|---|")
    for (name, vae, channels, stride), (_, empty, *_) in zip(causal_vaes("cpu"), causal_vaes("meta"), strict=True):
        shape = (1, channels, pixels // stride, pixels // stride)
        pred, target = torch.randn(shape).requires_grad_(), torch.randn(shape)
        plain, frozen, counted = LatentPerceptualLoss(vae), LatentPerceptualLoss(vae), LatentPerceptualLoss(empty)
        plain.segments = plain.clip_segments
        rounds = [[processor_time(loss_fn, pred, target) for loss_fn in (plain, frozen)] for _ in range(3)]
        times = [min(own) for own in zip(*rounds, strict=True)]
        kept = []
        for segments in (counted.clip_segments, counted.segments):
            counted.segments = list(segments)
            kept.append(count_call(counted, torch.empty(shape, device="meta").requires_grad_())[1])
        print(
            f"| {name} | {times[0]:.1f} s | {times[1]:.1f} s | {times[1] / times[0]:.2f} | {kept[0] / MIB:.0f} MiB | "
            f"{kept[1] / MIB:.0f} MiB | {kept[1] / kept[0]:.2f} |"
        )


def draw(sizes):
    """docs/cost.png: cost against pixels, blocks and gated samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    counted = [count_lpl(size) for size in sizes]
    megapixels = [size * size / 1e6 for size in sizes]
    axes[0].plot(megapixels, [c[0] / 1e12 for c in counted], "o-", label="TFLOP")
    axes[0].plot(megapixels, [c[2] / 2**30 for c in counted], "s-", label="peak GiB")
    largest = counted[-1][0] / 1e12 / megapixels[-1]
    axes[0].plot(megapixels, [m * largest for m in megapixels], ":", color="gray", label="straight line")
    axes[0].set(xlabel="megapixels", title="by pixels (middle block's attention bends it)")
    decode = decode_flops(sdxl_vae("meta"), 512)
    blocks = [count_lpl(512, num_blocks=n) for n in range(5)]
    axes[1].bar(range(5), [b[0] / decode for b in blocks])
    axes[1].set(xlabel="lpl_num_blocks", ylabel="plain decodes", title="by blocks, 512 px: as the decoder's work lies")
    batches = (1, 2, 4, 8)
    samples = [count_lpl(256, samples=n) for n in batches]
    axes[2].plot(batches, [s[0] / 1e12 for s in samples], "o-", label="TFLOP")
    axes[2].plot(batches, [s[2] / 2**30 for s in samples], "s-", label="peak GiB")
    axes[2].set(xlabel="gated samples, 256 px", title="by samples: straight in time, flat in memory")
    for axis in (axes[0], axes[2]):
        axis.legend()
        axis.set_ylim(bottom=0)
    figure.savefig(DOCS / "cost.png", dpi=80)


def main(*arguments):
    if arguments[:1] == ("cpu",):
        on_cpu(*map(int, arguments[1:] or (256,)))
        return
    if arguments[:1] == ("causal",):
        causal(*map(int, arguments[1:] or (128,)))
        return
    sizes = [int(a) for a in arguments] or [64, 128, 256, 512, 1024]
    for pixels in sizes:
        table(pixels)
    if len(sizes) > 2:
        draw(sizes)


if __name__ == "__main__":
    main(*sys.argv[1:])
