"""Q, K and V of a self-attention layer as one matrix product: one launch in place of three, and its input is read once.

The same sums of the same products. What a library's kernel for a wider matrix adds up in another order differs in the type's
rounding, so a CPU, whose runs are there already, keeps three products.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn


def fuse_self_attention(unet: nn.Module, only: Container[str] | None = None) -> None:
    """Join the projections of every self-attention layer, or of those that `only` names, where they are plain weights.

    Their own weights become views of the joined one: parameters of this UNet, so that another one with which it shared them
    keeps its own.
    """
    for name, attn in unet.named_modules():
        if isinstance(attn, Attention) and (only is None or name in only) and _can_be_fused(attn):
            attn.fuse_projections()
            joined = attn.to_qkv.requires_grad_(False)
            for part, weight in zip(_parts(attn), joined.weight.detach().chunk(3), strict=True):
                part.weight = nn.Parameter(weight, requires_grad=False)


def is_fused(attn: Attention) -> bool:
    """Whether a layer's joined weight says what its projections do: a LoRA that is trained stands in one's place."""
    return getattr(attn, "fused_projections", False) and all(type(part) is nn.Linear for part in _parts(attn))


def _parts(attn: Attention) -> tuple[Any, Any, Any]:
    return attn.to_q, attn.to_k, attn.to_v


def _can_be_fused(attn: Attention) -> bool:
    """Self-attention as SD1.5 and SDXL have it, which is no more than its projections and the attention."""
    parts = _parts(attn)
    return (
        not attn.is_cross_attention
        and all(type(part) is nn.Linear and part.bias is None for part in parts)
        and len({part.weight.shape for part in parts}) == 1
        and not any((attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.residual_connection))
        and attn.rescale_output_factor == 1.0
    )
