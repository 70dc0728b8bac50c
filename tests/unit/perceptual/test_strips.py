"""Parts of maps: packed masks."""

import pytest
import torch

from lpl.perceptual import strips


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 8, 4, 4), (3, 5, 9), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_packed_mask_is_what_it_was_in_an_eighth_of_its_bytes(shape, channels_last):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7
    if channels_last and mask.dim() == 4:
        mask = mask.contiguous(memory_format=torch.channels_last)
    bits = strips.Bits.of(mask)
    assert torch.equal(bits.mask(), mask)
    assert bits.mask().stride() == mask.stride()
    assert bits.packed.untyped_storage().nbytes() == -(-mask.numel() // 8)
    part = mask[:, :, 1:3]  # rows of a map
    assert torch.equal(strips.Bits.of(part).mask(), part)
