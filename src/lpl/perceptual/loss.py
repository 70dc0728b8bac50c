"""The Latent Perceptual Loss: the distance of two latents as the VAE's decoder sees them.

    L_i = 1/N sum_l w_l d_l(phi_l(pred_i), phi_l(target_i)),    w_l = 2^-log2(resolution_l / resolution_mid)

phi_l: feature maps after the decoder's middle block and up blocks. Source: Berrada et al., "Boosting Latent Diffusion
with Perceptual Objectives", ICLR 2025 (arXiv 2411.04873), section 3.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp import autocast, is_autocast_available

from lpl.base.arguments import flags, integer
from lpl.diffusion.latent_space import LatentSpace
from lpl.perceptual.chosen_taps import chosen_taps, layer_weights_of, merged
from lpl.perceptual.decoders import DecoderTaps, HookTaps, VaeTaps, any_decoder, is_own
from lpl.perceptual.defaults import NORM_TYPE
from lpl.perceptual.distance import NORM_TYPES, FeatureDistance, batch_scale
from lpl.perceptual.feature_maps import mean_of_rows
from lpl.perceptual.input_checks import check_mask, check_mask_values, check_windows
from lpl.perceptual.loss_checks import check_depth, check_latent_space, check_modules, check_options, check_pair
from lpl.perceptual.random_depth import reach_probabilities
from lpl.perceptual.sweep import Crop, Segment, Target, Way, WithGradient, compare, see_target

CHUNK_PIXELS = 256 * 256
"""Pixels that `chunk=None` sends through the decoder at once (one sample, where that has more)."""

READ_MASKS = 3
"""Calls with a mask whose values are checked; reading them waits for the device."""


class LPLOutput(NamedTuple):
    """What the loss returns; every dict maps a tap's name to (B,), detached float32, for the taps that were reached."""

    per_sample: Tensor
    """(B,), float32, differentiable (once) in pred_latents only."""
    per_layer: dict[str, Tensor]
    """Distances d_l, without the layer weight."""
    outlier_fraction: dict[str, Tensor]
    """Share of the target's values that were masked; 0 where a layer has no mask."""
    feature_mean: dict[str, Tensor]
    feature_std: dict[str, Tensor]
    """Mean and standard deviation of the target's features."""
    gradient: Tensor | None
    """dL_i/dpred_latents, (B, C, h, w), detached; None without gradients."""


class LatentPerceptualLoss:
    """LPL per sample.

    It owns no weights: the caller places and saves the VAE. The decoder's parameters are frozen (requires_grad False)
    here, except with HookTaps, whose model may be one that is trained. The decoder runs outside autocast in `dtype`;
    distances are float32. The gradient is computed in the forward pass, `chunk` samples at a time, and only it is kept:
    no feature map outlives the call, and memory does not grow with the batch.

    Args:
        vae: a diffusers VAE in eval mode, of a class that decoders.DECODERS names; or a DecoderTaps or HookTaps.
        num_blocks: up blocks compared after the middle block; the decoder is not run past the last one. None: 4 for a
            VAE, all for one's own stages.
        norm_type: see distance.py.
        loss_type: mse or l1, on normalised features.
        pow_law: weigh layers by w_l above; off: 1.
        remove_outliers: mask the target's outliers, see distance.py.
        checkpointing: keep only the inputs of the stages and recompute the rest for the gradient.
        dtype: precision of the decoder; if the VAE's weights have another, a private copy is made.
        latent_space: how model space maps to raw latents; None: as the VAE's config says; for one's own decoder, the
            identity.
        stages: instead of a VAE, one's own decoder as callables. The first takes raw latents, each other what the one
            before returned: a feature map (B, C, *space) with 1, 2 or 3 axes of space, or a tuple that begins with it
            and carries more to the next stage. They run as they are; they must be in eval mode and in `dtype`.
        strides: of the stages, in pixels (cells) of the decoder's output; None: layer weights follow from the maps'
            sizes, and remove_outliers must be off.
        taps: names of the taps to compare, instead of num_blocks; one's own stages are "stage_0", "stage_1", ...
        layer_weights: w_l instead of pow_law's, one per compared tap, in order or by name.
        chunk: samples that go through the decoder at once; None: as many as fill CHUNK_PIXELS, at least one. With
            norm batch and more samples than that, the targets are decoded once more, for their statistics.
        channels_last: memory layout of the decoder; None: on a CPU, where it is faster.
        compile: fuse pointwise arithmetic with torch.compile.
        crop: compare a random window of this many pixels, cut after the middle block. An approximation: group norms
            see the window alone, and values at the image's edge are seen less often. Calls then need `windows`.
        random_depth: calls may stop at a `depth`; then terms are divided by the probability of reaching them, so that
            the expectation over depths is the full loss. True: those of reach_probabilities(); or the probabilities,
            one per tap, falling from 1.

    Raises:
        ValueError: an unknown option value, or a VAE that cannot be walked.
    """

    def __init__(
        self,
        vae: Any = None,
        num_blocks: int | None = None,
        norm_type: str = NORM_TYPE,
        loss_type: str = "mse",
        pow_law: bool = True,
        remove_outliers: bool = True,
        checkpointing: bool = False,
        dtype: torch.dtype = torch.float32,
        latent_space: LatentSpace | None = None,
        *,
        stages: Sequence[Callable[..., Any]] | None = None,
        strides: Sequence[float] | None = None,
        taps: Sequence[str] | None = None,
        layer_weights: Sequence[float] | Mapping[str, float] | None = None,
        chunk: int | None = None,
        channels_last: bool | None = None,
        compile: bool = False,  # noqa: A002
        crop: int | None = None,
        random_depth: bool | Sequence[float] = False,
    ) -> None:
        if norm_type not in NORM_TYPES:
            raise ValueError(f"norm_type {norm_type!r} is none of {', '.join(NORM_TYPES)}")
        if loss_type not in ("mse", "l1"):
            raise ValueError(f"loss_type {loss_type!r} is neither mse nor l1")
        for name, value, least in (("num_blocks", num_blocks, 0), ("chunk", chunk, 1), ("crop", crop, 1)):
            if value is not None:
                integer(name, value, least)
        flags(pow_law=pow_law, remove_outliers=remove_outliers, checkpointing=checkpointing, compile=compile)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype {dtype!r} is no floating-point torch.dtype, such as torch.float32")
        decoder = any_decoder(vae, stages, strides)
        if latent_space is not None:
            check_latent_space(latent_space, decoder)
        if not isinstance(decoder, HookTaps):
            for module in decoder.modules():
                module.requires_grad_(False)
        self.copied = any(p.dtype != dtype for m in decoder.modules() for p in m.parameters())
        self.decoder = decoder.copy_to(dtype) if self.copied else decoder
        self.latent_space = latent_space or decoder.latent_space
        self.chosen = chosen_taps(decoder.taps, num_blocks, taps, own=is_own(decoder))
        self.taps = tuple(decoder.taps[i] for i in self.chosen)
        self.weights = layer_weights_of(decoder.taps, self.taps, pow_law, layer_weights)
        self.norm_type, self.checkpointing, self.dtype, self.chunk = norm_type, checkpointing, dtype, chunk
        self.channels_last = channels_last
        self.arithmetic = torch.promote_types(dtype, torch.float32)
        fuse = (lambda f: torch.compile(f, dynamic=True)) if compile else (lambda f: f)
        check_options(decoder, self.taps, self.chosen, remove_outliers, checkpointing, crop)
        self.segments = self.clip_segments = []
        if isinstance(self.decoder, DecoderTaps):
            self.segments = merged(self.decoder.segments(fuse), self.chosen)
            # Frozen operations take one frame: several frames run as plain blocks.
            self.clip_segments = merged(self.decoder.plain_segments(), self.chosen)
        self.distances = [FeatureDistance(norm_type, loss_type, t.stride, remove_outliers, fuse) for t in self.taps]
        self.stride = decoder.taps[0].stride
        self.crop = None if crop is None else max(1, crop // int(self.stride))
        self.reach = reach_probabilities(len(self.taps), random_depth)
        self._unread_masks, self._tried = READ_MASKS, False

    def __call__(
        self,
        pred_latents: Tensor,
        target_latents: Tensor,
        mask: Tensor | None = None,
        *,
        depth: int | None = None,
        windows: Tensor | None = None,
        reach: Sequence[float] | None = None,
    ) -> LPLOutput:
        """Compares two batches of latents.

        Args:
            pred_latents: (B, C, h, w), model space, any float dtype; (B, C, T, h, w) for decoders of videos, whose
                frames are compared one by one and averaged; (B, C, *space) for one's own.
            target_latents: like pred_latents; no gradient flows into it.
            mask: (B, 1, h, w), 0 or more: the weight of each location in the mean. None: the same everywhere. It has
                the latents' axes of space.
            depth: with random_depth, how many taps are compared. None: all, each with its full weight.
            windows: with crop, (B, 2) numbers in [0, 1), on the CPU: where each sample's window lies, from top left
                to bottom right.
            reach: instead of depth: probabilities, one per compared tap; each term is divided by its own.

        Raises:
            ValueError: shapes or devices that do not fit each other or the VAE, a depth without random_depth, windows
                without crop or crop without windows, a decoder in training mode or whose dtype was changed, or, in the
                first calls, a mask with negative or infinite values.
        """
        return self._evaluate(pred_latents, target_latents, mask, depth, windows, reach)

    @torch.compiler.disable
    def _evaluate(
        self,
        pred: Tensor,
        target: Tensor,
        mask: Tensor | None,
        depth: int | None,
        windows: Tensor | None,
        reach: Sequence[float] | None,
    ) -> LPLOutput:
        self._check(pred, target, mask, depth, windows, reach)
        if self.decoder.frames and pred.dim() == 5 and pred.shape[2] == 1:
            images = (x if x is None else x.squeeze(2) for x in (pred, target, mask))
            out = self._evaluate(*images, depth, windows, reach)
            return out if out.gradient is None else out._replace(gradient=out.gradient.unsqueeze(2))
        if reach is not None:
            depth = len(reach)
        elif depth is not None and self.reach is not None:
            reach = self.reach
        with_gradient = torch.is_grad_enabled() and pred.requires_grad
        with torch.no_grad(), _without_autocast(pred.device.type):
            if not self._tried:
                self.decoder.try_out(self._raw(target[:1]), self.chosen)
                self._tried = True
            chunks = self._chunks(pred, target, mask, windows)
            if not self.weights:
                self.weights = self._weights_by_size(chunks[0])
            scales = self._scales(chunks, depth)
            out = _join([self._compare(chunk, depth, reach, scales, with_gradient) for chunk in chunks])
        if not with_gradient:
            return out
        return out._replace(per_sample=WithGradient.apply(pred, out.per_sample, out.gradient))

    def uncropped(self) -> "LatentPerceptualLoss":
        """The same loss without crop, on whole images; called without a depth it compares all taps."""
        other = copy.copy(self)
        other.crop = None
        return other

    def on_meta(self) -> "LatentPerceptualLoss":
        """The same loss with a decoder on the meta device, which computes only shapes: for counting FLOPs."""
        if not isinstance(self.decoder, VaeTaps):
            raise ValueError("the cost of your own decoder is not counted: pass a VAE of diffusers")
        other = copy.copy(self)
        other.decoder = decoder = self.decoder.copy_to(self.dtype)
        for module in decoder.modules():
            module.to("meta")
        other.segments = merged(decoder.segments(lambda f: f), self.chosen)
        other.clip_segments = merged(decoder.plain_segments(), self.chosen)
        other.copied, other._unread_masks = False, 0
        return other

    def _chunks(
        self, pred_latents: Tensor, target_latents: Tensor, mask: Tensor | None, windows: Tensor | None
    ) -> list["Chunk"]:
        batch, space = len(pred_latents), pred_latents.shape[2:]
        pixels = math.prod(space[:-2]) * math.prod(side * self.stride for side in space[-2:])
        size = self.chunk or max(1, int(CHUNK_PIXELS // pixels) if pixels else 1)
        chunks = []
        for first in range(0, batch, size):
            part = slice(first, first + size)
            crop = None if windows is None or self.crop is None else Crop(self.crop, windows[part], space)
            masks: list[Tensor | None] = [None] * len(self.taps)
            if mask is not None:
                whole = mask[part].to(self.arithmetic)
                masks = [whole, *[whole if crop is None else crop.cut(whole)] * (len(self.taps) - 1)]
            segments = self._segments(crop, len(space))
            chunks.append(Chunk(pred_latents[part], target_latents[part], masks, segments))
        return chunks

    def _segments(self, crop: Crop | None, axes: int) -> list[Segment]:
        if self.decoder.frames and axes == 3:
            return self.clip_segments
        if crop is None or len(self.taps) == 1:
            return self.segments
        first, second, *rest = self.segments
        return [first, Segment(second.head, [crop, *second.operations]), *rest]

    def _way(self, chunk: "Chunk", depth: int | None) -> Way:
        """The decoder up to the tap number `depth`; None: to the last."""
        if not isinstance(self.decoder, HookTaps):
            return chunk.segments[: None if depth is None else depth + 1]
        return partial(self.decoder.features, chosen=self.chosen[:depth])

    def _weights_by_size(self, chunk: "Chunk") -> list[float]:
        """w_l for taps of unknown strides: resolution of the first tap's map / resolution of the tap's."""
        sizes = [statistics.size for statistics in self._see(chunk, None).statistics]
        return [(sizes[0] / size) ** (1 / (chunk.pred.dim() - 2)) for size in sizes]

    def _see(self, chunk: "Chunk", depth: int | None) -> Target:
        way, raw = self._way(chunk, depth), self._raw(chunk.target)
        return see_target(way, self.distances[:depth], raw, chunk.masks, self.decoder.frames)

    def _scales(self, chunks: list["Chunk"], depth: int | None) -> list[Tensor] | None:
        """For norm `batch` in several chunks: the scale of each tap over all samples."""
        if self.norm_type != "batch" or len(chunks) == 1:
            return None
        seen = [self._see(chunk, depth).statistics for chunk in chunks]
        return [batch_scale(list(tap)) for tap in zip(*seen, strict=True)]

    def _compare(
        self,
        chunk: "Chunk",
        depth: int | None,
        reach: Sequence[float] | None,
        scales: list[Tensor] | None,
        with_gradient: bool,
    ) -> LPLOutput:
        depth = depth or len(self.taps)
        probabilities = [1.0] * depth if reach is None else reach[:depth]
        weights = [w / (len(self.taps) * p) for w, p in zip(self.weights, probabilities, strict=False)]
        # gradients of float16 features can be below float16's smallest number: scale by a power of two, undone exactly
        factor = 2.0**16 if self.dtype == torch.float16 else 1.0
        found = compare(
            self._way(chunk, depth),
            self.distances[:depth],
            self._raw(chunk.pred),
            self._raw(chunk.target),
            chunk.masks,
            scales,
            [factor * w for w in weights] if with_gradient else None,
            self.checkpointing,
            self.decoder.frames,
        )
        batch = len(chunk.pred)
        distances = [mean_of_rows(d, batch) for d in found.distances]
        total = torch.stack([w * d for w, d in zip(weights, distances, strict=True)]).sum(0)
        gradient = found.gradient
        if gradient is not None:
            gradient = self.latent_space.gradient_from_raw(gradient.to(self.arithmetic)) / factor
        names = [tap.name for tap in self.taps[:depth]]

        def by_name(values: Iterable[Tensor]) -> dict[str, Tensor]:
            return dict(zip(names, (mean_of_rows(v, batch) for v in values), strict=True))

        return LPLOutput(
            total,
            by_name(distances),
            by_name(s.outlier_fraction for s in found.statistics),
            by_name(s.mean for s in found.statistics),
            by_name(s.std for s in found.statistics),
            gradient,
        )

    def _raw(self, latents: Tensor) -> Tensor:
        raw = self.latent_space.to_raw(latents.to(self.arithmetic)).to(self.dtype)
        last = latents.device.type == "cpu" if self.channels_last is None else self.channels_last
        last = last and raw.dim() == 4
        return raw.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _check(
        self,
        pred: Tensor,
        target: Tensor,
        mask: Tensor | None,
        depth: int | None,
        windows: Tensor | None,
        reach: Sequence[float] | None,
    ) -> None:
        check_pair(pred, target, self.decoder)
        if mask is not None:
            check_mask(mask, pred)
            if self._unread_masks:
                self._unread_masks -= 1
                check_mask_values(mask)
        check_depth(depth, reach, len(self.taps), self.reach is not None)
        if (windows is None) != (self.crop is None):
            raise ValueError("windows, (B, 2) numbers in [0, 1), go with crop")
        if windows is not None:
            check_windows(windows, len(pred))
        check_modules(self.decoder, self.dtype, pred.device, self.copied)


class Chunk(NamedTuple):
    """Samples that go through the decoder together."""

    pred: Tensor
    target: Tensor
    masks: list[Tensor | None]
    """Per tap, the caller's mask."""
    segments: list[Segment]


def _join(parts: list[LPLOutput]) -> LPLOutput:
    """The chunks' outputs as the batch's."""
    if len(parts) == 1:
        return parts[0]
    values: list[Any] = []
    for same in zip(*parts, strict=True):
        if isinstance(same[0], dict):
            values.append({name: torch.cat([part[name] for part in same]) for name in same[0]})
        else:
            values.append(None if same[0] is None else torch.cat(same))
    return LPLOutput(*values)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    return autocast(device_type, enabled=False) if is_autocast_available(device_type) else nullcontext()
