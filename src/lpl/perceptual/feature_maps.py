"""What goes from stage to stage of a decoder, the map in it that is compared, and a mask at that map's size.

A stage hands on its feature map, or a tuple that begins with it where more is carried beside it (class tokens of a ViT,
latents that later stages read too). A map is (B, C, H, W), (B, C, L) or (B, C, D, H, W). Video decoders hand on
(B, C, T, H, W): each of its frames is compared as a map of its own, so that a sample has T rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

State = Tensor | tuple[Tensor, ...]
"""What a stage hands on: its map, or its map and what is carried beside it."""


def map_of(state: State, frames: bool = False) -> Tensor:
    """The map that is compared; frames: of (B, C, T, H, W) the frames, (B * T, C, H, W)."""
    x = state if isinstance(state, Tensor) else state[0]
    return x.transpose(1, 2).flatten(0, 1) if frames and x.dim() == 5 else x


def with_map(state: State, x: Tensor) -> State:
    """The state with another map, as map_of gave it."""
    old = map_of(state)
    if x.dim() != old.dim():
        x = x.unflatten(0, (len(old), -1)).transpose(1, 2)
    return x if isinstance(state, Tensor) else (x, *state[1:])


def version_of(x: Tensor) -> int:
    """How often it was changed in place; of tensors of torch.inference_mode() that is not known."""
    return 0 if x.is_inference() else x._version


def zeros_like(state: State) -> State:
    """Zeros of a state's shapes: a gradient to add to."""
    return torch.zeros_like(state) if isinstance(state, Tensor) else tuple(map(torch.zeros_like, state))


def mean_of_rows(values: Tensor, batch: int) -> Tensor:
    """Values of rows, (B * T,), as their means over each sample's rows, (B,)."""
    return values if len(values) == batch else values.view(batch, -1).mean(1)


def mask_at(mask: Tensor, features: Tensor, frames: bool = False) -> Tensor:
    """A mask at the size of a map: the nearest cell's value.

    Args:
        mask: (B, 1, *space), how much each location of the latents counts. For frames (B, 1, T, h, w).
        features: the map, (B, C, *space), or the frames of T' = T, T * r or 1 + (T - 1) * r, as a causal decoder makes
            them of a first frame and r of each other.
        frames: the mask has some.

    Raises:
        ValueError: other axes of space than the map's, or frames that are none of these.
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
