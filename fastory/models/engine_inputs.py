"""What a call of an exported UNet reads, by the names of its graph's inputs."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor

from fastory.conditioning.references import ReferenceContext, mask_name
from fastory.conditioning.regions import LEVELS, Grid
from fastory.models.protocol import UnetInputs


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
        levels = [level for level in LEVELS if mask_name(level) in wanted]
        tensors |= context.mask_inputs(Grid(*inputs.latents.shape[2:]), levels)
    return {**tensors, **context.inputs()}
