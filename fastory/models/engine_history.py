"""The history encoder of causal mode, run by the components of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastory.checkpoints.history_encoder import HistoryConfig


class Components(Protocol):
    """Who runs the components. constants: the tensors beside the graphs."""

    @property
    def constants(self) -> Mapping[str, Tensor]: ...

    def run(self, component: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """One call of a component."""


@dataclass(frozen=True)
class ExportedHistory:
    """The history encoder of an export with what prepares its inputs."""

    encoder: EngineHistory
    tokenizer: Any
    image_processor: Any


class EngineHistory:
    """The history encoder: what a ring, and encode_frame, call of HistoryEncoder."""

    def __init__(self, model: Components, config: HistoryConfig) -> None:
        self.model, self.config = model, config
        self.types, self.times = model.constants["history_types"], model.constants["history_times"]
        self.local_attention = EngineLocalAttention(model) if config.local_heads else None
        self.adapter = self._adapt if config.bottleneck else None

    def multimodal(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        """m_n (B, S, C_x) of captions and pictures."""
        return self.model.run("history_encoder", {"ids": ids, "mask": mask, "pixels": pixels})["tokens"]

    def _adapt(self, tokens: Tensor) -> Tensor:
        return self.model.run("history_adapter", {"tokens": tokens})["history"]

    def caption_type(self) -> Tensor:
        """type_0 of the caption's tokens: (C_x,)."""
        return self.types[0]

    def positions(self) -> Tensor:
        """type_1 + time_p for every position p of a window: (P, C_x)."""
        return self.types[1] + self.times


class EngineLocalAttention:
    """The local causal attention of the newest frame among those of its ring."""

    def __init__(self, model: Components) -> None:
        self.model = model

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, S, C_x) -> K and V (B, S, H, d)."""
        out = self.model.run("history_keys_values", {"tokens": tokens})
        return out["keys"], out["values"]

    def __call__(
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
        """(B, S, C_x) of the newest frame; the ring has dropped what stands before the window."""
        inputs = {"tokens": tokens, "keys": keys, "values": values, "padding": padding}
        return self.model.run("history_attention", inputs)["history"]
