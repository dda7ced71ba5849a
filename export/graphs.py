"""The components of a story model as modules with named inputs: what is exported, and what parity compares with.

text_encoder, text_encoder_2    ids -> caption tokens (SDXL: the second one gives the pooled text as well)
image_encoder                   pixels -> T tokens of one reference
text_projector                  caption tokens -> every layer's K and V, side by side
reference_projector             reference tokens -> the same through the IP-Adapter
unet                            latents and contexts, K and V only -> prediction
vae_decoder                     latents -> pixels
vae_encoder                     pixels -> latents, where characters' own references are asked for, who are found in pictures
and of causal mode, whose UNet has updates of its own:
unet_causal, text_projector_causal, history_encoder, history_keys_values, history_attention, history_adapter
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fastory.errors import InputError
from fastory.export.choices import Groups
from fastory.export.component import Component
from fastory.export.encoders import (
    image_encoder,
    reference_projector,
    text_encoders,
    text_projector,
    vae_decoder,
    vae_encoder,
)
from fastory.export.history import history
from fastory.export.unets import unet, unet_causal
from fastory.models.torch_model import StoryModel


def components(model: StoryModel, groups: Groups) -> Iterator[Component]:
    """Everything that a run of `model` computes. groups: of the UNet with references."""
    if model.device.type != "cpu":
        raise InputError(
            f"export wants the model on the CPU, where the graphs are traced; it is on {model.device}"
        )
    yield from text_encoders(model)
    causal = model.checkpoint.history is not None
    if model.adapter is not None:
        yield image_encoder(model)
        yield reference_projector(model)
    if model.adapter is not None or not causal:
        yield text_projector("text_projector", model)
        yield unet(model, groups)
    yield vae_decoder(model)
    if groups.masked:
        yield vae_encoder(model)
    if causal:
        tuned = model.causal
        yield text_projector("text_projector_causal", tuned)
        yield unet_causal(tuned, groups.boxes)
        yield from history(model)


def constants(model: StoryModel) -> dict[str, Tensor]:
    """The unconditional reference (1, T, C_x); type_0 and the positions of causal mode."""
    found: dict[str, Tensor] = {}
    if model.adapter is not None:
        found["null_reference"] = model.null_reference()
    if model.checkpoint.history is not None:
        encoder = model.require_history().encoder
        found["history_types"] = encoder.type_embeddings.weight.detach()
        found["history_times"] = encoder.time_embeddings.weight.detach()
    return {name: tensor.cpu().contiguous().clone() for name, tensor in found.items()}
