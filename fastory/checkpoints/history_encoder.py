"""The history encoder's network: a frame's caption and picture in, its history tokens out.

m_n = BLIP(caption_n, picture_n)              S tokens of width C_x (AR-LDM, WACV 2024, section 3.2)
h_n = adapter(CA(m_{n-L+1} .. m_n))           local causal attention (Causal-Story, ICASSP 2024, eq. 3) and its adapter
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from fastory.errors import InputError
from fastory.kernels.banded import banded_causal_attention
from fastory.wording import shown

SCHEMA = 1


@dataclass(frozen=True)
class HistoryConfig:
    """Sizes of a history encoder, as history/config.json has them.

    vision, text: the configurations of the Blip classes; text.hidden_size is C_x. frame_tokens: S. positions: most
    frames in a window, one time embedding each. local_heads: heads of the local causal attention, 0 without one.
    bottleneck: width of the adapter behind it, 0 without one.
    """

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    frame_tokens: int
    positions: int
    local_heads: int = 0
    bottleneck: int = 0

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> HistoryConfig:
        """The sizes of a config.json. Raises InputError for a newer schema, and for names or values that do not fit."""
        schema = values.get("schema")
        if type(schema) is not int or not 1 <= schema <= SCHEMA:
            raise InputError(
                f"{where}: wanted schema {SCHEMA}, got {shown(schema)}; a newer fastory may read it"
            )
        names = ("vision", "text", "frame_tokens", "positions", "local_heads", "bottleneck")
        if missing := [name for name in names if name not in values]:
            raise InputError(f"{where}: {missing[0]!r} is missing; wanted {', '.join(names)}")
        config_values = {name: values[name] for name in names}
        least = {"frame_tokens": 1, "positions": 1, "local_heads": 0, "bottleneck": 0}
        for name, smallest in least.items():
            if type(config_values[name]) is not int or config_values[name] < smallest:
                raise InputError(
                    f"{where}: {name}: wanted {smallest} or more, got {shown(config_values[name])}"
                )
        for name, size in (("vision", "image_size"), ("text", "hidden_size")):
            if not isinstance(config_values[name], dict) or type(config_values[name].get(size)) is not int:
                raise InputError(
                    f"{where}: {name}: wanted the configuration of a Blip class, got {shown(config_values[name])}"
                )
        config = cls(**config_values)
        heads = config.local_heads
        if heads and config.width % (8 * heads):
            raise InputError(
                f"{where}: local_heads: wanted heads whose width is a multiple of 8, got {heads} for {config.width}"
            )
        return config

    def as_dict(self) -> dict[str, Any]:
        """The contents of config.json."""
        return {
            "schema": SCHEMA,
            "vision": dict(self.vision),
            "text": dict(self.text),
            "frame_tokens": self.frame_tokens,
            "positions": self.positions,
            "local_heads": self.local_heads,
            "bottleneck": self.bottleneck,
        }

    @property
    def width(self) -> int:
        """C_x: width of the tokens."""
        return int(self.text["hidden_size"])


class LocalCausalAttention(nn.Module):
    """Self-attention of history tokens within a band of frames, with a residual (Causal-Story, eq. 3)."""

    def __init__(self, width: int, heads: int) -> None:
        """width: C_x. The last layer begins at zero, so that an untrained module changes nothing."""
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, n, C_x) -> K and V (B, n, H, d)."""
        normed = self.norm(tokens)
        return self._split(self.to_k(normed)), self._split(self.to_v(normed))

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, -1))

    def forward(
        self,
        tokens: Tensor,
        keys: Tensor,
        values: Tensor,
        padding: Tensor,
        *,
        frame_tokens: int,
        window: int,
        first_frame: int = 0,
    ) -> Tensor:
        """tokens (B, n * S, C_x) of frames first_frame .., among the keys (B, Lk * S, H, d); padding (B, Lk * S).

        window: frames a token sees, its own among them; 0 is all up to its own.
        """
        seen = banded_causal_attention(
            self._split(self.to_q(self.norm(tokens))),
            keys,
            values,
            group_size=frame_tokens,
            window=window,
            query_group=first_frame,
            key_padding=padding,
        )
        return tokens + self.to_out(seen.flatten(2))


class BottleneckAdapter(nn.Module):
    """Down-projection, non-linearity, up-projection, residual (Causal-Story, section 2.3)."""

    def __init__(self, width: int, bottleneck: int) -> None:
        """The up-projection begins at zero: an untrained adapter changes nothing."""
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C_x) -> (..., C_x)."""
        return tokens + self.up(nn.functional.gelu(self.down(tokens)))


class HistoryEncoder(nn.Module):
    """(caption, picture) of a frame -> its history tokens; type and time embeddings beside them."""

    def __init__(self, config: HistoryConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.vision = BlipVisionModel(BlipVisionConfig(**config.vision))
        # Only as a decoder has it cross-attention to the picture; multimodal() calls it without the causal mask.
        text = BlipTextConfig(**{**config.text, "is_decoder": True})
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.type_embeddings = nn.Embedding(2, width)
        self.time_embeddings = nn.Embedding(config.positions, width)
        self.local_attention = LocalCausalAttention(width, config.local_heads) if config.local_heads else None
        self.adapter = BottleneckAdapter(width, config.bottleneck) if config.bottleneck else None

    def multimodal(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        """m_n: captions' ids and mask (B, S), 1 for a word, and their pictures (B, 3, h, w) -> (B, S, C_x)."""
        picture = self.vision(pixel_values=pixels).last_hidden_state
        tokens: Tensor = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=picture, is_decoder=False
        ).last_hidden_state
        return tokens

    def forward(self, tokens: Tensor, padding: Tensor, window: int) -> Tensor:
        """All of a story at once: m (B, N * S, C_x), padding (B, N * S) -> h (B, N * S, C_x). window 0 is all."""
        if self.local_attention is not None:
            tokens = self.local_attention(
                tokens,
                *self.local_attention.keys_values(tokens),
                padding,
                frame_tokens=self.config.frame_tokens,
                window=window,
            )
        return tokens if self.adapter is None else self.adapter(tokens)

    def caption_type(self) -> Tensor:
        """type_0, which marks the tokens of the caption beside the history: (C_x,)."""
        return self.type_embeddings.weight[0]

    def positions(self) -> Tensor:
        """type_1 + time_p for every position p of a window: (P, C_x)."""
        return self.type_embeddings.weight[1] + self.time_embeddings.weight
