"""IP-Adapter files: the image projection and the K/V projections of the references, checked against the
UNet they join.

The key layout is that of the published files (tencent-ailab/IP-Adapter): `image_proj.*`, and
`ip_adapter.N.to_k_ip.weight`, `ip_adapter.N.to_v_ip.weight` with N = 1, 3, 5, ... over the UNet's
cross-attention layers in the order of attn_processors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import load_finite, tensor_shapes
from fastory.errors import InputError

Shapes = dict[str, tuple[int, ...]]

# Kinds that take face embeddings or all of CLIP's patch tokens, by a tensor that only they have.
REFUSED_KINDS = {
    "image_proj.perceiver_resampler.proj_in.weight": "FaceID Plus",
    "image_proj.proj.3.weight": "Full Face",
    "image_proj.proj.0.weight": "FaceID",
}
BASE_TOKENS = 4
TEXT_WIDTHS = {768: "SD1.5", 1024: "SD2", 2048: "SDXL"}


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter's tensor shapes say: its kind, tokens per reference, and the widths it joins."""

    path: Path
    kind: Literal["base", "plus"]
    tokens: int
    image_width: int
    text_width: int
    layers: Shapes


@dataclass(frozen=True)
class IPAdapter:
    """An IP-Adapter that fits its UNet, on the CPU, without gradients.

    `image_projection` takes what `embedding` names: (rows, D) image_embeds for base, (rows, patches, D)
    hidden_states[-2] for Plus, and gives `tokens` reference tokens a row. `key_weights` and `value_weights`
    are to_k_ip and to_v_ip, one (C_layer, C_x) matrix for each attn2 layer in the order of
    unet.attn_processors.
    """

    kind: Literal["base", "plus"]
    tokens: int
    image_projection: torch.nn.Module
    key_weights: tuple[torch.Tensor, ...]
    value_weights: tuple[torch.Tensor, ...]
    embedding: Literal["image_embeds", "hidden_states"]


def read_adapter_header(path: Path) -> AdapterHeader:
    """Kind and sizes of an IP-Adapter file; reads no tensor. Raises InputError for unusable ones."""
    shapes = tensor_shapes(path)
    layers = {name: shape for name, shape in shapes.items() if name.startswith("ip_adapter.")}
    if not layers or not any(name.startswith("image_proj.") for name in shapes):
        raise InputError(
            f"{path} is not an IP-Adapter: wanted tensors named image_proj.* and ip_adapter.*, came "
            f"{', '.join(sorted(shapes)[:3]) or 'none'}."
        )
    for name, kind in REFUSED_KINDS.items():
        if name in shapes:
            raise InputError(
                f"{path} is an IP-Adapter of kind {kind}; only base and Plus adapters can be used."
            )
    try:
        if "image_proj.latents" in shapes:
            tokens, image_width = shapes["image_proj.latents"][1], shapes["image_proj.proj_in.weight"][1]
            return AdapterHeader(
                path, "plus", tokens, image_width, shapes["image_proj.proj_out.weight"][0], layers
            )
        rows, image_width = shapes["image_proj.proj.weight"]
        (text_width,) = shapes["image_proj.norm.weight"]
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{path} is not a base or Plus IP-Adapter: its image_proj.* fit neither ({error})."
        ) from error
    if rows != BASE_TOKENS * text_width:
        raise InputError(
            f"{path}: a base IP-Adapter makes {BASE_TOKENS} tokens of a picture, this one "
            f"{rows / text_width:g}."
        )
    return AdapterHeader(path, "base", BASE_TOKENS, image_width, text_width, layers)


def attn2_layers(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """The UNet's cross-attention modules by name, in the order of unet.attn_processors."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {name: cast(Attention, unet.get_submodule(name)) for name in names if name.endswith("attn2")}


def check_text_width(header: AdapterHeader, text_width: object) -> None:
    """Raises InputError if the adapter was made for a UNet of another text width (cross_attention_dim)."""
    if isinstance(text_width, int) and header.text_width != text_width:
        raise InputError(
            f"{header.path} is made for {_named(header.text_width)}; the model's UNet is of "
            f"{_named(text_width)}. Take an IP-Adapter of the model's own family."
        )


def check_adapter_fits(header: AdapterHeader, unet: UNet2DConditionModel) -> None:
    """Raises InputError if the adapter was made for a UNet of other widths or depth."""
    layers = attn2_layers(unet)
    check_text_width(header, next(iter(layers.values())).cross_attention_dim)
    numbers = {int(name.split(".")[1]) for name in header.layers if name.split(".")[1].isdecimal()}
    if numbers != set(range(1, 2 * len(layers), 2)):
        raise InputError(
            f"{header.path} holds {len(numbers)} attention layers; the model's UNet has {len(layers)}. "
            "Take an adapter made for this UNet."
        )
    for index, (name, layer) in enumerate(layers.items()):
        wanted = tuple(layer.to_k.weight.shape)
        for key in (_key(index, "to_k_ip"), _key(index, "to_v_ip")):
            found = header.layers.get(key)
            if found != wanted:
                raise InputError(
                    f"{header.path}: {key} is {found or 'missing'}; the UNet's {name} wants {wanted}. "
                    "Take an adapter made for this UNet."
                )


def load_adapter(header: AdapterHeader, unet: UNet2DConditionModel, dtype: torch.dtype) -> IPAdapter:
    """The adapter in `dtype`; the UNet only lends its key conversion and stays without adapter."""
    check_adapter_fits(header, unet)
    weights = load_finite(header.path)
    projection = _image_projection(header, unet, weights)
    count = len(attn2_layers(unet))
    return IPAdapter(
        kind=header.kind,
        tokens=header.tokens,
        image_projection=projection.to(dtype).eval().requires_grad_(False),
        key_weights=tuple(weights[_key(index, "to_k_ip")].to(dtype) for index in range(count)),
        value_weights=tuple(weights[_key(index, "to_v_ip")].to(dtype) for index in range(count)),
        embedding="image_embeds" if header.kind == "base" else "hidden_states",
    )


def _image_projection(
    header: AdapterHeader, unet: UNet2DConditionModel, weights: dict[str, torch.Tensor]
) -> torch.nn.Module:
    prefix = "image_proj."
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    # Without low_cpu_mem_usage every key is checked; it first fills the module with random numbers, so keep
    # the caller's generator out of it.
    with loading(f"{header.path} is not a {header.kind} IP-Adapter"), torch.random.fork_rng(devices=[]):
        return unet._convert_ip_adapter_image_proj_to_diffusers(state, low_cpu_mem_usage=False)


def _key(index: int, part: str) -> str:
    return f"ip_adapter.{2 * index + 1}.{part}.weight"


def _named(text_width: int) -> str:
    family = TEXT_WIDTHS.get(text_width)
    return f"{family} (text width {text_width})" if family else f"text width {text_width}"
