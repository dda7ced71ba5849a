"""A pipeline that diffusers has loaded, as a Checkpoint.

Every part becomes a copy: modules of its own over the memory of the same weights. What fastory does to a module
(processors, classes, types, evaluation mode) it does to the copy, and the pipeline never changes. Weights that fastory
would change, those under a LoRA, are copies.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from fastory.checkpoints.checkpoint import Checkpoint
from fastory.checkpoints.family import FAMILIES, PIPELINES, Family
from fastory.checkpoints.image_encoder import image_processor
from fastory.checkpoints.ip_adapter import IPAdapter, attn2_layers
from fastory.errors import InputError

KINDS: dict[type, Literal["base", "plus"]] = {ImageProjection: "base", IPAdapterPlusImageProjection: "plus"}
# What accelerate and diffusers leave on a module whose weights they move or cast around each call.
HOOKS = ("_hf_hook", "_diffusers_hook")


def checkpoint_of(pipe: Any) -> Checkpoint:
    """The parts of a loaded StableDiffusionPipeline or StableDiffusionXLPipeline, its LoRAs and IP-Adapter with them.

    On the UNet's device, in the UNet's type. LoRAs are merged as they are weighted at this moment. Raises InputError
    for other pipelines and UNets, for missing parts, for weights that are quantized or offloaded, and for an
    IP-Adapter that a story cannot use.
    """
    family = _family(pipe)
    _check_parts(pipe, family)
    unet = _module(pipe.unet)
    device, dtype = unet.device, unet.dtype
    adapter = _adapter(unet, device, dtype)
    encoder = _image_encoder(pipe, adapter, device, dtype)
    extractor = getattr(pipe, "feature_extractor", None)
    processor = image_processor(CLIPImageProcessorPil(**extractor.to_dict()) if extractor else None, encoder)
    shared = _shared_pipeline(pipe, family, device, dtype)
    weights = {name: getattr(shared, name).state_dict() for name in family.parts}
    if adapter is not None and encoder is not None:
        weights |= {"image_encoder": encoder.state_dict(), "ip_adapter": _adapter_weights(adapter)}
    return Checkpoint(shared, family, encoder, processor, adapter, None, {}, (), weights)


def _family(pipe: Any) -> Family:
    for family in FAMILIES.values():
        if isinstance(pipe, family.pipeline):
            return family
    raise InputError(
        f"wanted a loaded {' or '.join(PIPELINES)}, got {type(pipe).__name__}; "
        f"of another pipeline of these families one is made by {next(iter(PIPELINES))}.from_pipe(pipe)"
    )


def _check_parts(pipe: Any, family: Family) -> None:
    for name, wanted in family.parts.items():
        part = _module(getattr(pipe, name))
        if not isinstance(part, wanted):
            raise InputError(f"the pipeline's {name}: wanted {wanted.__name__}, got {type(part).__name__}")
        if any(hasattr(module, hook) for module in part.modules() for hook in HOOKS):
            raise InputError(
                f"the pipeline's {name} is offloaded or cast call by call; wanted weights that stay where they are: "
                "pipe.remove_all_hooks(), then pipe.to(device)"
            )
        for key, weight in part.named_parameters():
            if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
                raise InputError(
                    f"the pipeline's {name} holds {key} as {type(weight).__name__} of {weight.dtype} on "
                    f"{weight.device}; wanted plain weights, neither quantized nor left unloaded"
                )
    _check_unet(_module(pipe.unet).config, family)


def _check_unet(config: Any, family: Family) -> None:
    if config.in_channels != config.out_channels:
        raise InputError(
            f"the pipeline's UNet takes {config.in_channels} channels and gives {config.out_channels}; wanted a "
            "text-to-image UNet with as many channels in as out"
        )
    wanted = family.addition_embed_type
    if config.addition_embed_type != wanted or config.encoder_hid_dim_type not in (None, "ip_image_proj"):
        raise InputError(
            f"the UNet's conditioning (addition_embed_type {config.addition_embed_type}, encoder_hid_dim_type "
            f"{config.encoder_hid_dim_type}) is not that of {family.title} ({wanted}, None)"
        )


def _adapter(unet: Any, device: torch.device, dtype: torch.dtype) -> IPAdapter | None:
    """The IP-Adapter in the UNet; None where none is loaded."""
    if not isinstance(unet.encoder_hid_proj, MultiIPAdapterImageProjection):
        return None
    projections = unet.encoder_hid_proj.image_projection_layers
    if len(projections) != 1:
        raise InputError(
            f"the pipeline has {len(projections)} IP-Adapters, and a story draws with one; load one, or keep them and "
            "draw with the pipeline itself after fastory.install(pipe)"
        )
    kind = KINDS.get(type(projections[0]))
    if kind is None:
        raise InputError(
            f"the pipeline's IP-Adapter has a {type(projections[0]).__name__}; only base and Plus adapters can be used"
        )
    processors = [unet.attn_processors[f"{name}.processor"] for name in attn2_layers(unet)]
    if not all(hasattr(processor, "to_k_ip") for processor in processors):
        raise InputError(
            "some of the UNet's cross-attention layers have lost the IP-Adapter's processors (as by "
            "set_default_attn_processor); load the IP-Adapter again"
        )
    # Copied, few as they are, into memory that is aligned as load_adapter's: the CPU's product of one row by a matrix
    # rounds by where the matrix lies.
    every = {name for name, _ in projections[0].named_parameters()}
    return IPAdapter(
        kind=kind,
        tokens=int(processors[0].num_tokens[0]),
        image_projection=shared_weights_copy(projections[0], device, dtype, own=every),
        key_weights=tuple(processor.to_k_ip[0].weight.detach() for processor in processors),
        value_weights=tuple(processor.to_v_ip[0].weight.detach() for processor in processors),
        embedding="image_embeds" if kind == "base" else "hidden_states",
    )


def _image_encoder(
    pipe: Any, adapter: IPAdapter | None, device: torch.device, dtype: torch.dtype
) -> CLIPVisionModelWithProjection | None:
    """The encoder that the adapter needs; None without an adapter."""
    if adapter is None:
        return None
    encoder = _module(pipe.image_encoder)
    if not isinstance(encoder, CLIPVisionModelWithProjection):
        raise InputError(
            f"the IP-Adapter needs a CLIP image encoder, and the pipeline has "
            f"{type(encoder).__name__} as image_encoder; wanted: "
            "load_ip_adapter with its image_encoder_folder, or pipe.register_modules(image_encoder=...)"
        )
    projection: Any = adapter.image_projection
    reads = projection.image_embeds if adapter.kind == "base" else projection.proj_in
    gives = encoder.config.projection_dim if adapter.kind == "base" else encoder.config.hidden_size
    if reads.in_features != gives:
        raise InputError(
            f"the IP-Adapter reads pictures of width {reads.in_features}, and the pipeline's image encoder gives "
            f"{gives}; register the encoder that the adapter was made with"
        )
    return shared_weights_copy(encoder, device, dtype)


def _adapter_weights(adapter: IPAdapter) -> dict[str, Tensor]:
    """An IP-Adapter's weights by the names of its files."""
    weights = {f"image_proj.{name}": w for name, w in adapter.image_projection.state_dict().items()}
    for n, (key, value) in enumerate(zip(adapter.key_weights, adapter.value_weights, strict=True)):
        weights[f"ip_adapter.{2 * n + 1}.to_k_ip.weight"] = key
        weights[f"ip_adapter.{2 * n + 1}.to_v_ip.weight"] = value
    return weights


def _shared_pipeline(pipe: Any, family: Family, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline over the same weights, without IP-Adapter and image encoder."""
    made = copy.copy(pipe)
    for name, part in pipe.components.items():
        part = _module(part)
        if name == "image_encoder":
            part = None
        elif name == "vae":
            part = shared_weights_copy(part, device, family.vae_dtype(dtype, part))
        elif isinstance(part, nn.Module):
            part = _without_lora(part, device, dtype)
        else:
            part = copy.deepcopy(part)
        setattr(made, name, part)
    made.unet.encoder_hid_proj = None
    made.unet.register_to_config(encoder_hid_dim_type=None)
    made.unet.set_attn_processor(AttnProcessor2_0())
    return made


def shared_weights_copy(
    module: Any, device: torch.device, dtype: torch.dtype, own: Container[str] = ()
) -> Any:
    """A module like `module`, in eval mode, without gradients, over the same weights.

    Copies are the parameters named in `own` and those that lie on another device or in another type.
    """
    weights: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().clone() if name in own else weight.detach(), False)
        for name, weight in module.named_parameters()
    }
    # nn.Module's own: diffusers' to() warns of parts that must stay in float32 although there are none.
    return nn.Module.to(copy.deepcopy(module, memo=weights).eval(), device=device, dtype=dtype)


def _without_lora(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """A copy over the same weights whose LoRAs are merged into its own, as fuse_loras does it with files."""
    under = {name for name, _ in module.named_parameters() if ".base_layer." in name}
    made = shared_weights_copy(module, device, dtype, own=under)
    for layer in list(made.modules()):
        if isinstance(layer, BaseTunerLayer):
            if layer.disable_adapters:
                if layer.merged:
                    layer.unmerge()
            elif set(layer.active_adapters) - set(layer.merged_adapters):
                layer.merge()
    if under:
        recurse_remove_peft_layers(made)
    return made


def _module(part: Any) -> Any:
    """The module that torch.compile(part) wraps, or `part` itself."""
    return getattr(part, "_orig_mod", part)
