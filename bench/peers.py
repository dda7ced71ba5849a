"""The other ways to compute the same thing, each with the care it deserves: cached K and V, transposed once, warm.

A peer is a function of a cell's inputs that returns a callable without arguments, or an Absent with the reason. What a
peer may do once is done before the callable is returned; what it must do every step is in the callable.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cells import TOKENS, Cell, group_bounds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastory.kernels.banded.reference import band

Call = Callable[[], Tensor]
Build = Callable[[Cell, dict[str, Any]], Call]


class Absent(Exception):
    """Why a peer is not measured here."""


def _wide(x: Tensor, rows: int) -> Tensor:
    """(B, H, tokens, d), laid out in memory as such."""
    return x.expand(rows, -1, -1, -1).transpose(1, 2).contiguous()


def _group_keys(cell: Cell, keys: Tensor, first: int, last: int) -> Tensor:
    """(B, H, tokens, d) of one group's K or V: its pictures, and for unconditional rows as many null blocks.

    That is what diffusers gives them, and a softmax over equal keys is the one over a single block.
    """
    half, pictures, null = cell.rows // 2, keys[:, first : last - TOKENS], keys[:, last - TOKENS : last]
    unconditional = null.repeat(1, pictures.shape[1] // TOKENS, 1, 1).expand(half, -1, -1, -1)
    rows = torch.cat([unconditional, pictures.expand(cell.rows - half, -1, -1, -1)])
    return rows.transpose(1, 2).contiguous()


def _groups(cell: Cell, inputs: dict[str, Any]) -> list[tuple[Tensor, Tensor, float, Tensor | None]]:
    """Keys and values, weight and mask (1, 1, L, 1) of each group, cut and transposed once."""
    mask = inputs.get("mask")
    return [
        (
            _group_keys(cell, inputs["k_ref"], first * TOKENS, last * TOKENS),
            _group_keys(cell, inputs["v_ref"], first * TOKENS, last * TOKENS),
            0.4,
            None if mask is None else mask[:, g, None, :, None].to(inputs["q"].dtype),
        )
        for g, (first, last) in enumerate(itertools.pairwise(group_bounds(cell)))
    ]


def _twice(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Build:
    """Cached K and V, one attention for the text and one for each group, torch.add with alpha."""

    def build(cell: Cell, inputs: dict[str, Any]) -> Call:
        q = inputs["q"].transpose(1, 2)
        k, v = _wide(inputs["k_text"], cell.rows), _wide(inputs["v_text"], cell.rows)
        groups = _groups(cell, inputs)

        def run() -> Tensor:
            out = attention(q, k, v)
            for k_ref, v_ref, weight, mask in groups:
                part = attention(q, k_ref, v_ref)
                out = torch.add(out, part if mask is None else part * mask, alpha=weight)
            return out.transpose(1, 2)

        return run

    return build


def _sdpa(backend: SDPBackend | None) -> Build:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return _twice(attention)


def _compiled_sdpa(cell: Cell, inputs: dict[str, Any]) -> Call:
    """torch.compile over the best eager composition. Its own CUDA graphs are off: the timing captures."""
    if inputs["q"].device.type != "cuda":
        raise Absent("measured on CUDA")
    return torch.compile(_sdpa(None)(cell, inputs), mode="max-autotune-no-cudagraphs")


def _flex(cell: Cell, inputs: dict[str, Any]) -> Call:
    if inputs["q"].device.type != "cuda":
        raise Absent("measured on CUDA")
    from torch.nn.attention.flex_attention import flex_attention

    return _twice(torch.compile(flex_attention, dynamic=False))(cell, inputs)


def _xformers(cell: Cell, inputs: dict[str, Any]) -> Call:
    if importlib.util.find_spec("xformers") is None:
        raise Absent("xformers is not installed")
    from xformers.ops import memory_efficient_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return _twice(attention)(cell, inputs)


def _flash3(cell: Cell, inputs: dict[str, Any]) -> Call:
    if importlib.util.find_spec("flash_attn_interface") is None:
        raise Absent("FlashAttention 3/4 is not installed")
    from flash_attn_interface import flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return _twice(attention)(cell, inputs)


def _paper(cell: Cell, inputs: dict[str, Any]) -> Call:
    """The paper's way, written anew: K and V projected at every step, bmm, softmax, bmm, for text and references."""
    if cell.masked or cell.groups > 1:
        raise Absent("the paper has one group and no masks")
    q = inputs["q"].transpose(1, 2).flatten(0, 1)
    channels = cell.heads * cell.width
    tokens = {"k_text": cell.text, "k_ref": cell.references * TOKENS}
    context = {name: torch.randn(cell.rows, count, 768).to(q) for name, count in tokens.items()}
    weights = {
        name: torch.randn(768, channels).to(q) * 768**-0.5 for name in ("k_text", "v_text", "k_ref", "v_ref")
    }

    def project(tokens: Tensor, weight: Tensor) -> Tensor:
        return (tokens @ weight).unflatten(-1, (cell.heads, cell.width)).transpose(1, 2).flatten(0, 1)

    def attention(kind: str) -> Tensor:
        k, v = (project(context[f"k_{kind}"], weights[f"{x}_{kind}"]) for x in "kv")
        return torch.bmm(torch.softmax(torch.bmm(q, k.mT) * cell.width**-0.5, -1), v)

    return lambda: attention("text") + 0.4 * attention("ref")


def layer(cell: Cell, inputs: dict[str, Any]) -> Any:
    """A diffusers cross-attention layer with an IP-Adapter of this cell's shape."""
    from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

    channels, q = cell.heads * cell.width, inputs["q"]
    attention = Attention(channels, cross_attention_dim=768, heads=cell.heads, dim_head=cell.width)
    attention.set_processor(IPAdapterAttnProcessor2_0(channels, 768, (TOKENS,) * cell.groups, scale=0.4))
    return attention.to(q.device, q.dtype).requires_grad_(False)


def _diffusers(cell: Cell, inputs: dict[str, Any]) -> Call:
    """The stock layer whole, projections included: what a step of the plain pipeline runs."""
    attention, q = layer(cell, inputs), inputs["q"]
    hidden = q.flatten(2)
    per_group = cell.references // cell.groups
    text = torch.randn(cell.rows, cell.text, 768).to(q)
    images = [torch.randn(cell.rows, per_group, TOKENS, 768).to(q) for _ in range(cell.groups)]
    masks = None
    if cell.masked:
        # One row of the picture: diffusers resizes masks to the layer, L = height * width.
        height = int(cell.queries**0.5)
        masks = [
            inputs["mask"][:, g].view(1, 1, height, -1).to(q).expand(1, per_group, -1, -1)
            for g in range(cell.groups)
        ]
    return lambda: attention(hidden, (text, images), ip_adapter_masks=masks)


def ours_whole(cell: Cell, inputs: dict[str, Any]) -> Call:
    """The same layer with our operator: to_q, grca over cached K and V, to_out. The match of diffusers' layer."""
    from fastory.kernels.grca import grca

    attention, arguments = layer(cell, inputs), dict(inputs)
    hidden = inputs["q"].flatten(2)
    heads = (cell.heads, cell.width)

    def run() -> Tensor:
        out = grca(**(arguments | {"q": attention.to_q(hidden).unflatten(-1, heads)}))
        return attention.to_out[0](out.flatten(2))

    return run


GRCA: dict[str, Build] = {
    "SDPA x2 + add": _sdpa(None),
    "SDPA flash x2 + add": _sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cudnn x2 + add": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient x2 + add": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA x2 + add, torch.compile": _compiled_sdpa,
    "FlexAttention x2 + add": _flex,
    "xformers x2 + add": _xformers,
    "FlashAttention 3/4 x2 + add": _flash3,
    "the paper's bmm": _paper,
}
WHOLE: dict[str, Build] = {"diffusers layer": _diffusers, "fastory layer": ours_whole}
# The paper's bmm draws its own K and V, diffusers its own weights: their numbers are not ours to compare.
OTHER_NUMBERS = {"the paper's bmm", *WHOLE}


def _dense(cell: Cell, inputs: dict[str, Any]) -> Call:
    """SDPA with the mask as a tensor, built once."""
    q, k, v = inputs["q"].transpose(1, 2), *(_wide(inputs[name], cell.rows) for name in "kv")
    allowed = band(
        cell.queries, cell.text, cell.group_size, cell.window, inputs.get("query_group", 0),
        inputs.get("query_group_size"), cell.prefix, q.device,
    )[None, None]  # fmt: skip
    if inputs["key_padding"] is not None:
        allowed = (allowed & ~inputs["key_padding"][:, None, None, :]).contiguous()
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)


def _windows(cell: Cell, inputs: dict[str, Any]) -> Call:
    """Plain SDPA over windows of K: in the UNet a slice, in self-attention an as_strided view, no copy."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if not cell.self_attention:
        if cell.padded:
            # Padding lies at the ring's end: a slice again. It would have to be known on the host.
            k, v = k[:, : cell.text - cell.group_size], v[:, : cell.text - cell.group_size]
        q, k, v = q.transpose(1, 2), _wide(k, cell.rows), _wide(v, cell.rows)
        return lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    size, window, frames = cell.group_size, cell.window, cell.queries // cell.group_size

    def view(x: Tensor) -> Tensor:
        early = F.pad(x, (0, 0, 0, 0, size * (window - 1), 0))
        row, token, head, _ = early.stride()
        shape = (cell.rows, frames, cell.heads, window * size, cell.width)
        return early.as_strided(shape, (row, token * size, head, token, 1)).flatten(0, 1)

    key = torch.arange(window * size, device=q.device)
    frame = torch.arange(frames, device=q.device)
    seen = key[None] >= (window - 1 - frame)[:, None] * size
    seen = seen[None].expand(cell.rows, -1, -1)
    if inputs["key_padding"] is not None:
        early = F.pad(inputs["key_padding"], (size * (window - 1), 0), value=True)
        seen = seen & ~early.as_strided((cell.rows, frames, window * size), (early.stride(0), size, 1))
    seen = seen.reshape(cell.rows * frames, 1, 1, window * size)
    k, v = view(k), view(v)
    queries = q.unflatten(1, (frames, size)).flatten(0, 1).transpose(1, 2)

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=seen).transpose(1, 2)
        return out.reshape(cell.rows, cell.queries, cell.heads, cell.width)

    return run


def _flex_banded(cell: Cell, inputs: dict[str, Any]) -> Call:
    if inputs["q"].device.type != "cuda":
        raise Absent("measured on CUDA")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = inputs["q"].transpose(1, 2), *(_wide(inputs[name], cell.rows) for name in "kv")
    allowed = band(
        cell.queries, cell.text, cell.group_size, cell.window, inputs.get("query_group", 0),
        inputs.get("query_group_size"), cell.prefix, q.device,
    )  # fmt: skip
    padding = inputs["key_padding"]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return allowed[i, j] if padding is None else allowed[i, j] & ~padding[b, j]

    blocks = create_block_mask(
        visible, cell.rows if cell.padded else None, None, cell.queries, cell.text, q.device
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=blocks).transpose(1, 2)


def _xformers_banded(cell: Cell, inputs: dict[str, Any]) -> Call:
    if importlib.util.find_spec("xformers") is None:
        raise Absent("xformers is not installed")
    if cell.padded or cell.group_size > 1 or not cell.self_attention:
        raise Absent("its local masks know neither padding nor groups")
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    bias = LowerTriangularFromBottomRightMask().make_local_attention(cell.window)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    return lambda: memory_efficient_attention(q, k, v, attn_bias=bias)


def _flash_window(cell: Cell, inputs: dict[str, Any]) -> Call:
    if importlib.util.find_spec("flash_attn") is None:
        raise Absent("flash_attn is not installed")
    if cell.padded or cell.group_size > 1 or not cell.self_attention:
        raise Absent("its window knows neither padding nor groups")
    from flash_attn import flash_attn_func

    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    return lambda: flash_attn_func(q, k, v, causal=True, window_size=(cell.window - 1, 0))


BANDED: dict[str, Build] = {
    "SDPA dense mask": _dense,
    "SDPA over windows": _windows,
    "FlexAttention BlockMask": _flex_banded,
    "xformers local": _xformers_banded,
    "FlashAttention window": _flash_window,
}
