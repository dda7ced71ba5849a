"""The components of a story model as modules with named inputs: what is exported, and what parity compares with.

text_encoder, text_encoder_2    ids -> caption tokens (SDXL: the second one gives the pooled text as well)
image_encoder                   pixels -> T tokens of one reference
text_projector                  caption tokens -> every layer's K and V, side by side
reference_projector             reference tokens -> the same through the IP-Adapter
unet                            latents and contexts, K and V only -> prediction
vae_decoder                     latents -> pixels
and of causal mode, whose UNet has updates of its own:
unet_causal, text_projector_causal, history_encoder, history_keys_values, history_attention, history_adapter
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastory.checkpoints.history_encoder import LocalCausalAttention
from fastory.conditioning.history import HistoryContext
from fastory.conditioning.references import ReferenceContext
from fastory.errors import InputError
from fastory.kernels.banded import banded_causal_attention
from fastory.models.export_folder import factored
from fastory.models.torch_model import StoryModel
from fastory.processors.projected import CrossAttentionLayers, Layer

Axis = int | str
"""A number, or a name of Component.ranges with an optional factor: `batch`, `4*references`."""

BEHIND_ALL = 2**30  # the group of queries that see every key

# Sizes of a run. Upsampling's guard allows the exporter no more than 63 rows.
RANGES = {
    "batch": (1, 63),
    "text": (1, 1024),
    "references": (1, 4096),
    "keys": (1, 65536),
}


@dataclass(frozen=True)
class Input:
    """An input of a component. make(generator, shape) gives values of the right kind; None is a normal distribution."""

    shape: tuple[Axis, ...]
    dtype: torch.dtype
    make: Callable[[torch.Generator, tuple[int, ...]], Tensor] | None = None

    def sample(self, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        """A tensor for these sizes, on the CPU."""
        shape = tuple(size_of(axis, sizes) for axis in self.shape)
        values = torch.randn(shape, generator=generator) if self.make is None else self.make(generator, shape)
        return values.to(self.dtype)


@dataclass(frozen=True)
class Component:
    """A module whose forward takes `inputs` in their order and gives `outputs`.

    ranges: least and most of every name in a shape. traced: sizes for the exporter, which takes 0 and 1 for constants.
    checks: sizes at which parity is measured. hot: those of most calls, for which engines are tuned.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Input]
    outputs: Mapping[str, tuple[Axis, ...]]
    ranges: Mapping[str, tuple[int, int]]
    traced: Mapping[str, int]
    checks: Sequence[Mapping[str, int]]
    dtype: torch.dtype
    hot: Mapping[str, int]

    def sample(self, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        """Inputs of these sizes."""
        generator = torch.Generator().manual_seed(seed)
        return {name: one.sample(sizes, generator) for name, one in self.inputs.items()}


def size_of(axis: Axis, sizes: Mapping[str, int]) -> int:
    """The length of an axis."""
    if isinstance(axis, int):
        return axis
    factor, name = factored(axis)
    return factor * sizes[name]


def components(model: StoryModel, groups: int) -> Iterator[Component]:
    """Everything that a run of `model` computes. groups: G, of the UNet with references."""
    if model.device.type != "cpu":
        raise InputError(
            f"export wants the model on the CPU, where the graphs are traced; it is on {model.device}"
        )
    family = _sdxl_text(model) if model.family == "sdxl" else [_text_encoder(model)]
    yield from family
    causal = model.checkpoint.history is not None
    if model.adapter is not None:
        yield image_encoder(model)
        yield reference_projector(model)
    if model.adapter is not None or not causal:
        yield text_projector("text_projector", model)
        yield unet(model, groups)
    yield vae_decoder(model)
    if causal:
        twin = model.causal
        yield text_projector("text_projector_causal", twin)
        yield unet_causal(twin)
        yield from history(model)


class _Reads(nn.Module):
    """A function of tensors as a module, which holds the modules whose weights it reads."""

    def __init__(self, function: Callable[..., Any], holds: Sequence[nn.Module]) -> None:
        super().__init__()
        self.function, self.holds = function, nn.ModuleList(holds)

    def forward(self, *inputs: Tensor) -> Any:
        """What the function gives."""
        return self.function(*inputs)


def _ids(vocabulary: int) -> Callable[[torch.Generator, tuple[int, ...]], Tensor]:
    return lambda generator, shape: torch.randint(vocabulary, shape, generator=generator)


def _some(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """True for about half, the first row all False: a row that sees nothing is checked everywhere."""
    chosen = torch.rand(shape, generator=generator) < 0.5
    if len(shape) > 1 and shape[0] > 1:
        chosen[0] = False
    return chosen


class _TextEncoder(nn.Module):
    """One CLIP text encoder as the pipelines call it."""

    def __init__(self, encoder: nn.Module, penultimate: bool, pooled: bool) -> None:
        super().__init__()
        self.encoder, self.penultimate, self.pooled = encoder, penultimate, pooled

    def forward(self, ids: Tensor) -> Any:
        """ids (B, Lt) -> tokens (B, Lt, C), and pooled (B, P) where asked for."""
        out = self.encoder(ids, output_hidden_states=self.penultimate)
        tokens = out.hidden_states[-2] if self.penultimate else out.last_hidden_state
        return (tokens, out.text_embeds) if self.pooled else tokens


def _text_encoder(model: StoryModel) -> Component:
    return _clip("text_encoder", model.pipeline.text_encoder, model.pipeline.tokenizer, False, False)


def _sdxl_text(model: StoryModel) -> list[Component]:
    """Both encoders' last but one states; the second one's pooled text."""
    pipeline = model.pipeline
    return [
        _clip("text_encoder", pipeline.text_encoder, pipeline.tokenizer, True, False),
        _clip("text_encoder_2", pipeline.text_encoder_2, pipeline.tokenizer_2, True, True),
    ]


def _clip(name: str, encoder: Any, tokenizer: Any, penultimate: bool, pooled: bool) -> Component:
    if getattr(encoder.config, "use_attention_mask", False):
        raise InputError(f"{name} wants an attention mask, which no Stable Diffusion text encoder has")
    length = int(tokenizer.model_max_length)
    tokens = ("batch", length, int(encoder.config.hidden_size))
    extra: dict[str, tuple[Axis, ...]] = (
        {"pooled": ("batch", int(encoder.config.projection_dim))} if pooled else {}
    )
    return Component(
        name,
        _TextEncoder(encoder, penultimate, pooled),
        {"ids": Input(("batch", length), torch.int64, _ids(int(encoder.config.vocab_size)))},
        {"tokens": tokens, **extra},
        {"batch": RANGES["batch"]},
        {"batch": 2},
        [{"batch": n} for n in (1, 2, 5)],
        encoder.dtype,
        {"batch": 1},
    )


class _ImageEncoder(nn.Module):
    """CLIP's vision model with the adapter's projection."""

    def __init__(self, encoder: Any, projection: nn.Module, embedding: str, width: int) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.embedding, self.width = embedding, width

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, s, s) -> (B, T, C_x)."""
        if self.embedding == "image_embeds":
            embeds = self.encoder(pixels).image_embeds
        else:
            embeds = self.encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return self.projection(embeds).reshape(pixels.shape[0], -1, self.width)


def image_encoder(model: StoryModel) -> Component:
    """pixels -> the T tokens of a reference."""
    adapter, encoder = model.adapter, model.checkpoint.image_encoder
    assert adapter is not None and encoder is not None
    width, side = model.cross_attention_dim, model.checkpoint.image_processor.crop_size["height"]
    return Component(
        "image_encoder",
        _ImageEncoder(encoder, adapter.image_projection, adapter.embedding, width),
        {"pixels": Input(("batch", 3, side, side), model.dtype)},
        {"tokens": ("batch", adapter.tokens, width)},
        {"batch": RANGES["batch"]},
        {"batch": 2},
        [{"batch": n} for n in (1, 2, 3)],
        model.dtype,
        {"batch": 1},
    )


class _ReferenceProjector(nn.Module):
    """CrossAttentionLayers.project_references with the adapter's weights as parameters."""

    def __init__(self, layers: CrossAttentionLayers) -> None:
        super().__init__()
        pairs = zip(layers.key_weights, layers.value_weights, strict=True)
        weights = [nn.Parameter(weight, requires_grad=False) for pair in pairs for weight in pair]
        self.weights = nn.ParameterList(weights)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (1, Lr, C_x) -> (1, Lr, W)."""
        return torch.cat([nn.functional.linear(tokens, weight) for weight in self.weights], -1)


def reference_projector(model: StoryModel) -> Component:
    """Tokens of all references -> K and V of all layers."""
    length = f"{model.tokens_per_ref}*references"
    return Component(
        "reference_projector",
        _ReferenceProjector(model.layers),
        {"tokens": Input((1, length, model.cross_attention_dim), model.dtype)},
        {"kv": (1, length, model.layers.width)},
        {"references": RANGES["references"]},
        {"references": 9},
        [{"references": n} for n in (1, 7, 100)],
        model.dtype,
        {"references": 9},
    )


def text_projector(name: str, model: StoryModel) -> Component:
    """Tokens of captions -> K and V of all layers."""
    text = int(model.pipeline.tokenizer.model_max_length)
    parts = [part for one in model.layers.layers for part in (one.attn.to_k, one.attn.to_v)]
    return Component(
        name,
        _Reads(model.layers.project_text, parts),
        {"tokens": Input(("batch", "text", model.cross_attention_dim), model.dtype)},
        {"kv": ("batch", "text", model.layers.width)},
        {"batch": RANGES["batch"], "text": RANGES["text"]},
        {"batch": 2, "text": text},
        [{"batch": rows, "text": tokens} for rows, tokens in ((1, text), (2, 1), (3, 2 * text))],
        model.dtype,
        {"batch": 1, "text": text},
    )


class _Unet(nn.Module):
    """The UNet with references; SDXL's and LCM's further inputs by name."""

    def __init__(self, unet: nn.Module, tokens_per_ref: int, added: tuple[str, ...]) -> None:
        super().__init__()
        self.unet, self.tokens_per_ref, self.added = unet, tokens_per_ref, added

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        text_kv: Tensor,
        ref_kv: Tensor,
        ref_visible: Tensor,
        ref_offsets: Tensor,
        scale: Tensor,
        *added: Tensor,
    ) -> Tensor:
        """The inputs of ReferenceContext beside latents and timestep -> prediction (B, c, h, w)."""
        context = ReferenceContext(text_kv, ref_kv, scale, ref_visible, ref_offsets, self.tokens_per_ref)
        return call_unet(self.unet, sample, timestep, context, dict(zip(self.added, added, strict=True)))


class _CausalUnet(nn.Module):
    """The UNet of causal mode: K and V of the caption and the window, and which of them are padding."""

    def __init__(self, unet: nn.Module, added: tuple[str, ...]) -> None:
        super().__init__()
        self.unet, self.added = unet, added

    def forward(
        self, sample: Tensor, timestep: Tensor, kv: Tensor, padding: Tensor, *added: Tensor
    ) -> Tensor:
        """kv (B, n, W), padding (B, n) -> prediction (B, c, h, w)."""
        return call_unet(
            self.unet,
            sample,
            timestep,
            _AllPast(kv, padding, 0, 1),
            dict(zip(self.added, added, strict=True)),
        )


class _AllPast(HistoryContext):
    """A window of any length in a graph, where a band's sizes are constants: all that is not padding is seen."""

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        keys, values = layer.keys_values(self.kv)
        return banded_causal_attention(
            query,
            keys,
            values,
            group_size=1,
            window=0,
            query_group=BEHIND_ALL,
            query_group_size=0,
            key_padding=self.padding,
        )


def call_unet(
    unet: Any, sample: Tensor, timestep: Tensor, context: Any, added: Mapping[str, Tensor]
) -> Tensor:
    """One UNet call as the sampler makes it."""
    further = dict(added)
    timestep_cond = further.pop("timestep_cond", None)
    output: Tensor = unet(
        sample,
        timestep,
        encoder_hidden_states=None,
        timestep_cond=timestep_cond,
        added_cond_kwargs=further or None,
        cross_attention_kwargs={"context": context},
        return_dict=False,
    )[0]
    return output


def _latents(model: StoryModel) -> tuple[dict[str, Input], dict[str, tuple[int, int]], tuple[Axis, ...]]:
    """Inputs sample and timestep, the ranges of their sizes, and the shape of the prediction."""
    factor = model.size_factor // model.vae_factor
    channels = int(model.unet.config.in_channels)
    shape: tuple[Axis, ...] = ("batch", channels, f"{factor}*height", f"{factor}*width")
    inputs = {
        "sample": Input(shape, model.dtype),
        # 500 in every type; a step is a whole number that half types hold up to 2048, bfloat16 up to 256.
        "timestep": Input((), torch.float32, lambda generator, size: torch.tensor(500.0)),
    }
    out = ("batch", int(model.unet.config.out_channels), *shape[2:])
    return inputs, {"batch": RANGES["batch"], "height": (1, 64), "width": (1, 64)}, out


def _added(model: StoryModel) -> dict[str, Input]:
    """SDXL's and LCM's further inputs."""
    added: dict[str, Input] = {}
    if model.family == "sdxl":
        width = int(model.pipeline.text_encoder_2.config.projection_dim)
        added["text_embeds"] = Input(("batch", width), model.dtype)
        added["time_ids"] = Input(("batch", 6), model.dtype, lambda generator, size: torch.full(size, 256.0))
    if model.unet.config.time_cond_proj_dim is not None:
        added["timestep_cond"] = Input(("batch", int(model.unet.config.time_cond_proj_dim)), model.dtype)
    return added


def _sides(model: StoryModel) -> tuple[int, int]:
    """The model's own (height, width) in steps of the UNet's factor."""
    width, height = model.native_size
    return height // model.size_factor, width // model.size_factor


def _unet_sizes(
    model: StoryModel, **most: int
) -> tuple[dict[str, int], list[dict[str, int]], dict[str, int]]:
    """Sizes for the exporter, of the parity checks (one row that sees nothing; usual; the most), and of most calls.

    most: the largest number of references, or of keys, that is checked.
    """
    height, width = _sides(model)
    text = int(model.pipeline.tokenizer.model_max_length)
    names = {"batch", "height", "width", *(("text", "references") if "references" in most else ("keys",))}
    hot = {"batch": 8, "height": height, "width": width, "text": text, "references": 9, "keys": 3 * text}
    traced = {"batch": 2, "height": 3, "width": 5, "text": text, "references": 9, "keys": 3 * text}
    if is_large(model):  # the arithmetic of small pictures is the same, the time is not
        height, width = 1, 1
    usual = {"batch": 2, "height": height, "width": width, "text": text, "references": 7, "keys": 3 * text}
    one = {"batch": 1, "height": height, "width": width, "text": text, "references": 1, "keys": text}
    other = {"batch": 3, "height": height + 1, "width": max(1, width - 1), "text": 2 * text, **most}
    parts = [{name: sizes[name] for name in sorted(names)} for sizes in (traced, one, usual, other, hot)]
    return parts[0], parts[1:4], parts[4]


def is_large(model: StoryModel) -> bool:
    """Whether the UNet is of full size, not one for a test."""
    return sum(p.numel() for p in model.unet.parameters()) > 5e7


def unet(model: StoryModel, groups: int) -> Component:
    """The UNet of iterative mode with G = groups."""
    latents, ranges, out = _latents(model)
    kind, width, tokens = model.dtype, model.layers.width, model.tokens_per_ref

    def offsets(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """All references in the first group; the others are empty."""
        return torch.tensor([0] + [tokens * 1_000_000] * groups, dtype=torch.int32)

    inputs = {
        **latents,
        "text_kv": Input(("batch", "text", width), kind),
        "ref_kv": Input((1, f"{tokens}*references", width), kind),
        "ref_visible": Input(("batch", "references"), torch.bool, _some),
        "ref_offsets": Input((groups + 1,), torch.int32, offsets),
        "scale": Input((groups,), torch.float32, lambda generator, shape: torch.full(shape, 0.4)),
    }
    added = _added(model)
    traced, checks, hot = _unet_sizes(model, references=7 if is_large(model) else 100)
    return Component(
        "unet",
        _Unet(model.unet, tokens, tuple(added)),
        {**inputs, **added},
        {"prediction": out},
        {**ranges, "text": RANGES["text"], "references": RANGES["references"]},
        traced,
        checks,
        kind,
        hot,
    )


def unet_causal(model: StoryModel) -> Component:
    """The UNet of causal mode with a window of any length. model: StoryModel.causal."""
    latents, ranges, out = _latents(model)
    inputs = {
        **latents,
        "kv": Input(("batch", "keys", model.layers.width), model.dtype),
        "padding": Input(("batch", "keys"), torch.bool, _some_padding),
    }
    added = _added(model)
    text = int(model.pipeline.tokenizer.model_max_length)
    traced, checks, hot = _unet_sizes(model, keys=9 * text)
    return Component(
        "unet_causal",
        _CausalUnet(model.unet, tuple(added)),
        {**inputs, **added},
        {"prediction": out},
        {**ranges, "keys": RANGES["keys"]},
        traced,
        checks,
        model.dtype,
        hot,
    )


def _some_padding(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """True for about half; the first of several rows all True: it sees nothing."""
    return ~_some(generator, shape)


class _VaeDecoder(nn.Module):
    """The decoding half of the autoencoder."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, c, h, w) -> pixels (B, 3, H, W)."""
        pixels: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return pixels


def vae_decoder(model: StoryModel) -> Component:
    """latents as the VAE takes them -> pixels about -1 .. 1."""
    channels, factor = int(model.vae.config.latent_channels), model.vae_factor
    height, width = (side // factor for side in reversed(model.native_size))
    checks = [(1, min(height, 16), min(width, 16)), (2, 8, 12), (3, 12, 4)]
    return Component(
        "vae_decoder",
        _VaeDecoder(model.vae),
        {"latents": Input(("batch", channels, "height", "width"), model.vae.dtype)},
        {"pixels": ("batch", 3, f"{factor}*height", f"{factor}*width")},
        {"batch": RANGES["batch"], "height": (1, 512), "width": (1, 512)},
        {"batch": 2, "height": 6, "width": 10},
        [dict(zip(("batch", "height", "width"), sizes, strict=True)) for sizes in checks],
        model.vae.dtype,
        {"batch": 1, "height": height, "width": width},
    )


class _NewestFrame(nn.Module):
    """The local causal attention of the newest frame: a ring holds its window alone, so all but padding is seen."""

    def __init__(self, local: LocalCausalAttention) -> None:
        super().__init__()
        self.local = local

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor, padding: Tensor) -> Tensor:
        """tokens (B, S, C_x) of the frame; keys, values (B, n, H, d) and padding (B, n) of its window -> (B, S, C_x)."""
        # Frames of one token, the query's own behind all of them: a band's sizes are constants of a graph, and the
        # window's length is not.
        out: Tensor = self.local(
            tokens, keys, values, padding, frame_tokens=1, window=0, first_frame=BEHIND_ALL
        )
        return out


def history(model: StoryModel) -> Iterator[Component]:
    """The history encoder (Blip), and what makes its tokens history: local causal attention and adapter."""
    encoder = model.require_history().encoder
    size, width = encoder.config.frame_tokens, encoder.config.width
    one: tuple[Axis, ...] = ("batch", size, width)
    rows: Any = {"batch": RANGES["batch"]}, {"batch": 2}, [{"batch": n} for n in (1, 2, 5)]
    rest: Any = model.dtype, {"batch": 1}
    tokens = {"tokens": Input(one, model.dtype)}
    yield Component(
        "history_encoder", _Reads(encoder.multimodal, [encoder]), _seen(model), {"tokens": one}, *rows, *rest
    )
    local = encoder.local_attention
    if local is not None:
        heads: tuple[Axis, ...] = (local.heads, width // local.heads)
        pair = {"keys": ("batch", size, *heads), "values": ("batch", size, *heads)}
        yield Component("history_keys_values", _Reads(local.keys_values, [local]), tokens, pair, *rows, *rest)
        ring = Input(("batch", "keys", *heads), model.dtype)
        padding = Input(("batch", "keys"), torch.bool, _some_padding)
        yield Component(
            "history_attention",
            _NewestFrame(local),
            {**tokens, "keys": ring, "values": ring, "padding": padding},
            {"history": one},
            {"batch": RANGES["batch"], "keys": RANGES["keys"]},
            {"batch": 2, "keys": 3 * size},
            [{"batch": n, "keys": n * size} for n in (1, 2, 5)],
            model.dtype,
            {"batch": 1, "keys": 3 * size},
        )
    if encoder.adapter is not None:
        yield Component("history_adapter", encoder.adapter, tokens, {"history": one}, *rows, *rest)


def _seen(model: StoryModel) -> dict[str, Input]:
    """A frame's caption and picture as the history encoder takes them."""
    config = model.require_history().encoder.config
    size, side = config.frame_tokens, int(config.vision["image_size"])

    def words(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """1 for the words of a caption, which come first."""
        ends = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        return (torch.arange(shape[1])[None] < ends).long()

    return {
        "ids": Input(("batch", size), torch.int64, _ids(int(config.text["vocab_size"]))),
        "mask": Input(("batch", size), torch.int64, words),
        "pixels": Input(("batch", 3, side, side), model.dtype),
    }


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
