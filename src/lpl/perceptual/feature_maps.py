"""What one stage of a decoder passes to the next, the map in it that is compared, and a mask at that map's size.

A stage passes on its feature map, or a tuple that begins with it where more is carried along (class tokens of a ViT,
latents that later stages read too). A map is (B, C, H, W), (B, C, L) or (B, C, D, H, W). Video decoders pass on (B, C,
T, H, W): each frame is compared as a map of its own, so that a sample has T rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

State = Tensor | tuple[Tensor, ...]
"""What a stage passes on: its map, or its map and what is carried along."""


def map_of(state: State, frames: bool = False) -> Tensor:
    """The map that is compared; with frames, (B, C, T, H, W) becomes (B * T, C, H, W)."""
    x = state if isinstance(state, Tensor) else state[0]
    return x.transpose(1, 2).flatten(0, 1) if frames and x.dim() == 5 else x


def with_map(state: State, x: Tensor) -> State:
    """The state with another map, shaped as map_of returns it."""
    old = map_of(state)
    if x.dim() != old.dim():
        x = x.unflatten(0, (len(old), -1)).transpose(1, 2)
    return x if isinstance(state, Tensor) else (x, *state[1:])


def version_of(x: Tensor) -> int:
    """How often x was changed in place; 0 for tensors of torch.inference_mode(), which do not count it."""
    return 0 if x.is_inference() else x._version


def zeros_like(state: State) -> State:
    """Zeros with a state's shapes, to accumulate a gradient in."""
    return torch.zeros_like(state) if isinstance(state, Tensor) else tuple(map(torch.zeros_like, state))


def mean_of_rows(values: Tensor, batch: int) -> Tensor:
    """Values of rows, (B * T,), as their means over each sample's rows, (B,)."""
    return values if len(values) == batch else values.view(batch, -1).mean(1)


def mask_at(mask: Tensor, features: Tensor, frames: bool = False) -> Tensor:
    """A mask at the size of a map: the nearest cell's value.

    Args:
        mask: (B, 1, *space), how much each location of the latents counts. For frames (B, 1, T, h, w).
        features: the map, (B, C, *space), or its T' frames as rows, (B * T', C, H, W), with T' = T, T * r or
            1 + (T - 1) * r: a causal decoder makes one frame of the first and r of each other.
        frames: features are frames; a mask of 5 axes then has T of its own.

    Raises:
        ValueError: the mask has other axes of space than the map, or T' is none of these.
    """
    if frames and mask.dim() == 5:
        mask = _frames_at(mask, len(features) // len(mask))
    if mask.dim() != features.dim():
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit feature maps of shape {tuple(features.shape)}: they "
            "have other axes of space; leave the mask out"
        )
    size = features.shape[2:]
    return mask if mask.shape[2:] == size else interpolate(mask, size=size, mode="nearest")


def _frames_at(mask: Tensor, count: int) -> Tensor:
    """(B, 1, T, h, w) as (B * count, 1, h, w)."""
    frames = mask.shape[2]
    if count % frames == 0:
        index = torch.arange(count) // (count // frames)
    elif frames > 1 and count > 1 and (count - 1) % (frames - 1) == 0:
        ratio = (count - 1) // (frames - 1)
        index = (torch.arange(count) + ratio - 1) // ratio
    else:
        raise ValueError(f"a mask of {frames} frames does not fit {count} frames of features: leave the mask out")
    return map_of(mask[:, :, index.to(mask.device)], frames=True)
