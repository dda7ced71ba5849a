"""What modes, the sampler and a run ask of a model. StoryModel (PyTorch) and EngineModel (an export) are two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from fastory.checkpoints.history_encoder import HistoryConfig
from fastory.conditioning.context import Context
from fastory.conditioning.history import EncodedFrame
from fastory.errors import InputError
from fastory.runtime import Placement

# Why a picture is left out whose decoder gave NaN or infinity.
NOT_FINITE = "holds non-finite values"


@dataclass(frozen=True)
class Caption:
    """An encoded caption. tokens: (1, Lt, C_x); pooled: (1, P) for SDXL, else None."""

    tokens: Tensor
    pooled: Tensor | None


@dataclass(frozen=True)
class Decoded:
    """A decoded frame: 8-bit RGB, and why it must not become a reference (None where it may)."""

    image: Image.Image
    left_out: str | None


@dataclass(frozen=True)
class UnetSizes:
    """Sizes of a UNet that a run needs to know.

    latent_channels: c of its input. first_channels: of its first level, from which memory is estimated.
    guidance_embedding: width of the guidance scale as an input (LCM), None where there is none. pooled_width: of SDXL's
    pooled text, None for SD1.5.
    """

    latent_channels: int
    first_channels: int
    guidance_embedding: int | None
    pooled_width: int | None


@dataclass(frozen=True)
class UnetInputs:
    """What one UNet call reads, in buffers that stay where they are.

    latents: (R, c, h, w). timestep: (). timestep_cond: (R, D), the guidance scale for LCM. added: SDXL's text_embeds (R, P)
    and time_ids (R, 6).
    """

    latents: Tensor
    timestep: Tensor
    context: Context
    timestep_cond: Tensor | None
    added: Mapping[str, Tensor] | None

    def last_rows(self, count: int) -> UnetInputs:
        """The last `count` rows, in the same memory."""
        cond = None if self.timestep_cond is None else self.timestep_cond[-count:]
        added = self.added and {name: value[-count:] for name, value in self.added.items()}
        return UnetInputs(self.latents[-count:], self.timestep, self.context.last_rows(count), cond, added)


class Projections(Protocol):
    """A UNet's cross-attention projections, all layers side by side: W = 2 * sum of their channels."""

    @property
    def value_columns(self) -> Tensor | None:
        """(W,) bool: True where the wide tensor holds values; None where that is not known."""

    def project_text(self, tokens: Tensor) -> Tensor:
        """tokens (B, Lt, C_x) -> (B, Lt, W)."""

    def project_references(self, tokens: Tensor) -> Tensor:
        """tokens (1, Lr, C_x) -> (1, Lr, W)."""


class HistoryEncoding(Protocol):
    """The history encoder of causal mode: what a mode and its ring call."""

    config: HistoryConfig
    local_attention: Any
    adapter: Any

    def caption_type(self) -> Tensor:
        """type_0 of the caption's tokens: (C_x,)."""

    def positions(self) -> Tensor:
        """type_1 + time_p for every position p of a window: (P, C_x)."""


class WithHistory(Protocol):
    """The history of a model."""

    @property
    def encoder(self) -> HistoryEncoding: ...

    @property
    def tokenizer(self) -> Any:
        """Of captions as history tokens stand for them."""


class Blocks(Protocol):
    """Blocks of a UNet that are compiled. kinds: how many graphs they are."""

    kinds: int

    def calls(self) -> AbstractContextManager[None]:
        """Within it `predict` calls them compiled."""

    def compile(self, call: Callable[[], object]) -> Iterator[int]:
        """Compile what `call`, an eager call of the UNet, needs; yields how many kinds are done."""


class Features(Protocol):
    """Deep features of a UNet, kept of whole calls of `predict` for shallow ones, under a key of the caller's."""

    def kept(self, key: int) -> AbstractContextManager[None]:
        """Within it a call is whole, and its deep features are kept."""

    def reused(self, key: int) -> AbstractContextManager[None]:
        """Within it a call is shallow: its deep features are those that were kept."""

    def forget(self, key: int) -> None:
        """They go."""


class Model(Protocol):
    """A story model on its device."""

    name: str
    placement: Placement

    @property
    def compile(self) -> str:
        """Whether the UNet's blocks are compiled: auto, on or off."""

    @property
    def attention(self) -> str:
        """What computes self-attention: auto, PyTorch's choice, or measured."""

    @property
    def compiled(self) -> Model:
        """This model as it draws with compiled blocks, where `compile` is not off."""

    idle_samplers: list[
        Any
    ]  # what fastory.sampling keeps from one story to the next, `causal` sharing the list

    # What a run asks before it draws.

    @property
    def sizes(self) -> UnetSizes: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def scheduler_config(self) -> Mapping[str, Any]: ...

    @property
    def layers(self) -> Projections: ...

    @property
    def defaults(self) -> Mapping[str, Any]: ...

    @property
    def world(self) -> str | None:
        """`builtin` for a model that knows the words of the drawn world alone; None for one of any words."""

    @property
    def distilled(self) -> str | None:
        """What the checkpoint was distilled for few steps as, a name of presets.FAST; None where nothing says that it was."""

    @property
    def hashes(self) -> dict[str, str]: ...

    @property
    def requested_dtype(self) -> str | None: ...

    @property
    def native_size(self) -> tuple[int, int]: ...

    @property
    def vae_factor(self) -> int: ...

    @property
    def tokens_per_ref(self) -> int: ...

    @property
    def most_rows(self) -> int | None:
        """Most rows that a UNet call takes; None where memory alone bounds them."""

    def on(self, machine: Mapping[str, Any]) -> Model:
        """This model where `machine`, a manifest's, says a run began."""

    def check_drawable(self, width: int, height: int, references: int, groups: int, rows: int) -> None:
        """InputError for a run that this model cannot draw.

        width, height: in pixels. references: most blocks that a call holds, in `groups` groups. rows: of a UNet call.
        """

    def require_references(self) -> None:
        """InputError where this model cannot take references."""

    def self_attention_levels(self) -> list[int]:
        """How often the latents' sides were halved where the UNet has self-attention.

        InputError where frames cannot see each other in it.
        """

    def require_history(self) -> WithHistory:
        """The history encoder. InputError where this model cannot draw frame after frame."""

    @property
    def causal(self) -> Model:
        """This model as causal mode draws with it: the UNet and the projections of that mode."""

    # What a mode asks while it draws.

    def lost_words(self, prompt: str) -> str:
        """What the tokenizer's limit cuts off `prompt`; empty where it fits."""

    def encode_caption(self, prompt: str) -> Caption:
        """A caption as the text encoders see it, cut at the tokenizer's limit."""

    def encode_negative(self, negative_prompt: str) -> Caption:
        """The unconditional caption."""

    def caption_padding(self, prompt: str) -> Tensor:
        """(1, Lt) bool: True where the tokens of `prompt` are padding."""

    def encode_reference(self, image: Image.Image, fit: str = "pad") -> Tensor:
        """An 8-bit RGB picture -> its reference tokens (1, T, C_x)."""

    @property
    def takes_masks(self) -> bool:
        """Whether groups of references may have masks, and `encode_picture` is there to find them."""

    @property
    def takes_biases(self) -> bool:
        """Whether scores of text and of self-attention may have a bias, by which characters keep to their boxes."""

    def encode_picture(self, image: Image.Image) -> Tensor:
        """An 8-bit RGB picture as the UNet's latents (1, c, h, w), without noise."""

    def null_reference(self) -> Tensor:
        """Tokens (1, T, C_x) of the unconditional reference."""

    def encode_frame(self, prompt: str, image: Image.Image) -> EncodedFrame:
        """A caption and its 8-bit RGB picture as the history takes them."""

    def null_frame(self) -> EncodedFrame:
        """What the unconditional row has in place of every frame."""

    def decode(self, latents: Tensor) -> Decoded:
        """latents (1, c, h, w) -> an 8-bit RGB picture; black and marked where it must not be used."""

    # What the sampler asks.

    def predict(self, inputs: UnetInputs) -> Tensor:
        """One UNet call -> (R, c, h, w)."""

    def deep_features(self) -> Features:
        """The deep features of the UNet. InputError where none can be kept."""

    def blocks(self) -> Blocks:
        """The blocks of the UNet that are compiled, of a model whose placement says so."""

    def guidance_embedding(self, scale: float, rows: int) -> Tensor:
        """The guidance scale as an input (rows, D) of a UNet distilled with it (LCM)."""

    def added_conditions(self, pooled: Tensor, width: int, height: int) -> dict[str, Tensor]:
        """SDXL's text_embeds and time_ids of one row. width, height: in pixels."""


def distilled_as(sizes: UnetSizes, scheduler: Any, lcm_lora: bool = False, said: str = "auto") -> str | None:
    """A name of presets.FAST, or None. scheduler: the checkpoint's own, with which it was distilled. lcm_lora: one is added.

    LCM UNets take the guidance scale as an input. A checkpoint with an LCM-LoRA merged into it comes with LCM's scheduler.
    SD-Turbo and SDXL-Turbo come with Euler schedulers of trailing timesteps. said: by the user, settings.DISTILLED, who knows
    better; but for an LCM UNet, which nothing else can draw with.
    """
    if sizes.guidance_embedding is not None:
        return "lcm"
    if said != "auto":
        return None if said == "none" else said
    if lcm_lora or type(scheduler).__name__ == "LCMScheduler":
        return "lcm-lora"
    turbo = {"EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler-ancestral"}
    name, config = turbo.get(type(scheduler).__name__), scheduler.config
    trailing = config.get("timestep_spacing") == "trailing" and config.get("prediction_type") == "epsilon"
    return f"turbo, {name}" if name and trailing else None


def check_size(width: int, height: int, factor: int) -> None:
    """InputError where a side, in pixels, is no multiple of `factor`."""
    for name, value in (("width", width), ("height", height)):
        if value % factor:
            lower = value // factor * factor
            raise InputError(
                f"{name}: wanted a multiple of {factor} pixels for this UNet, got {value}; "
                f"the nearest are {lower or factor} and {lower + factor}"
            )


def runs_as(placement: Placement, machine: Mapping[str, Any]) -> bool:
    """Whether a run that began on `machine`, a manifest's, goes on here to the same bytes."""
    here = placement.as_dict()
    return all(machine[name] == here[name] for name in ("device", "dtype", "graphs"))


def check_machine(placement: Placement, machine: Mapping[str, Any]) -> None:
    """InputError where a run that began on `machine`, a manifest's, cannot go on as `placement` computes."""
    if runs_as(placement, machine):
        return
    here, graphs = placement.as_dict(), "auto" if machine["graphs"] else "off"
    raise InputError(
        f"this run began on {machine['device']} in {machine['dtype']}, graphs {graphs}, and the model is on "
        f"{here['device']} in {here['dtype']}; give --device {machine['device']} --dtype {machine['dtype']} "
        f"--graphs {graphs}, or --overwrite to begin anew"
    )
