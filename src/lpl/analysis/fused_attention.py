"""Attention as one kernel on the meta device, as every real device runs it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint


class FusedAttention(TorchFunctionMode):
    """While it is active, scaled_dot_product_attention keeps no scores, also where torch would write them out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = _attention if func is scaled_dot_product_attention else func
        return function(*args, **(kwargs or {}))


def checkpoint(function: Any, *args: Any) -> Any:
    """What diffusers checkpoints with, and the mode again where it recomputes: backward() runs without modes."""
    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), FusedAttention()))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
