"""What a call of an exported UNet reads, by the names of its graph's inputs."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor

from fastory.conditioning.context import Context
from fastory.conditioning.history import HistoryContext
from fastory.conditioning.references import ReferenceContext
from fastory.conditioning.regions import LEVELS, Grid
from fastory.models.protocol import UnetInputs

MASK, TEXT_BIAS, SELF_BIAS = "mask", "text_bias", "self_bias"
HISTORY_BIAS = "history_bias"  # of causal mode: of the caption and the window together


def level_name(what: str, level: int) -> str:
    """The input for masks or biases of the layers at which the latents' sides were halved `level` times."""
    return f"{what}_{2**level}"


def unet_inputs(inputs: UnetInputs, groups: int, wanted: Container[str]) -> dict[str, Tensor]:
    """The tensors of a call. groups: that the UNet was exported for. wanted: the graph's inputs, masks among them or not.

    A call with fewer groups, or without masks, is filled up: groups that nobody sees, and masks of ones.
    """
    tensors = {"sample": inputs.latents, "timestep": inputs.timestep.float(), **(inputs.added or {})}
    if inputs.timestep_cond is not None:
        tensors["timestep_cond"] = inputs.timestep_cond
    context = inputs.context
    if isinstance(context, ReferenceContext):
        context = context.of_groups(groups)
    grid = Grid(*inputs.latents.shape[2:])
    tensors |= {
        name: make()
        for level in LEVELS
        for name, make in _of_level(context, level, grid.sides(2**level)).items()
        if name in wanted
    }
    return {**tensors, **context.inputs()}


def _of_level(context: Context, level: int, sides: tuple[int, int]) -> dict[str, Callable[[], Tensor]]:
    """What a context has for the layers of one level, by the names of inputs."""
    if isinstance(context, ReferenceContext):
        return _of_references(context, level, sides)
    return _of_history(context, level, sides) if isinstance(context, HistoryContext) else {}


def _of_history(
    context: HistoryContext, level: int, sides: tuple[int, int]
) -> dict[str, Callable[[], Tensor]]:
    """The biases of caption and window (B, h, w, Lt + L_M * S) and of self-attention (B, h, w, h, w), of one level."""
    tokens, (rows, keys) = sides[0] * sides[1], context.padding.shape
    like = context.kv.new_zeros((), dtype=torch.float32)

    def history_bias() -> Tensor:
        found = (context.bias or {}).get(tokens)
        return like.new_zeros(rows, *sides, keys) if found is None else found.unflatten(1, sides)

    makers = {HISTORY_BIAS: history_bias, SELF_BIAS: _self_bias(context.self_bias, like, rows, sides)}
    return {level_name(what, level): make for what, make in makers.items()}


def _self_bias(
    biases: Mapping[int, Tensor] | None, like: Tensor, rows: int, sides: tuple[int, int]
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        found = (biases or {}).get(sides[0] * sides[1])
        shape = (rows, *sides, *sides)
        return like.new_zeros(shape) if found is None else found.reshape(shape)

    return make


def _of_references(
    context: ReferenceContext, level: int, sides: tuple[int, int]
) -> dict[str, Callable[[], Tensor]]:
    """The masks (B, G, h, w), and the biases of text (B, h, w, Lt) and of self-attention (B, h, w, h, w), of one level."""
    like, tokens, text = context.scale, sides[0] * sides[1], context.text_kv.shape[1]
    rows = len(context.ref_visible)

    def mask() -> Tensor:
        found = (context.masks or {}).get(tokens)
        shape = (rows, len(like), *sides)
        return like.new_ones(shape) if found is None else found.unflatten(2, sides).expand(shape)

    def text_bias() -> Tensor:
        found = (context.text_bias or {}).get(tokens)
        return like.new_zeros(rows, *sides, text) if found is None else found.unflatten(1, sides)

    self_bias = _self_bias(context.self_bias, like, rows, sides)
    makers = {MASK: mask, TEXT_BIAS: text_bias, SELF_BIAS: self_bias}
    return {level_name(what, level): make for what, make in makers.items()}
