"""The multimodal history of causal mode: what a frame sees of the frames before it (algorithms.md, section 2).

context of frame t = [CLIP(c_t) + type_0 ; h_{t-L} + type_1 + time_0 ; ... ; h_{t-1} + type_1 + time_{L-1}]

h_n, the history tokens of frame n, never change when later frames arrive, and to_k and to_v are linear without bias: their K
and V are kept, and the positions, which slide, are added from a table. So a frame costs the same however many came before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastory.checkpoints.history_encoder import HistoryConfig
from fastory.conditioning import biases
from fastory.conditioning.biases import Attention, Biases
from fastory.conditioning.context import Context
from fastory.conditioning.regions import Grid
from fastory.processors.projected import Layer, attend_window


@dataclass(frozen=True)
class HistoryRow:
    """What one row of a UNet call attends to. kv (1, Lt + L_M * S, W); padding (1, Lt + L_M * S) bool.

    bias, self_bias: as of HistoryContext, of one row; None for 0 everywhere.
    """

    kv: Tensor
    padding: Tensor
    bias: Biases | None = None
    self_bias: Biases | None = None


@dataclass(frozen=True)
class LayerHistory:
    """What one layer reads of a HistoryContext: the same, K and V of this layer and biases of its query tokens alone."""

    kv: Tensor
    padding: Tensor
    caption_tokens: int
    frame_tokens: int
    bias: Tensor | None
    self_bias: Tensor | None

    def self_attention(self, tokens: int) -> Attention | None:
        """As of HistoryContext: of this layer's own number of tokens."""
        return biases.self_attention(self.self_bias)

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        """query (B, L, H, d) -> (B, L, H, d)."""
        return attend_window(
            layer,
            query,
            kv=self.kv,
            padding=self.padding,
            caption_tokens=self.caption_tokens,
            frame_tokens=self.frame_tokens,
            bias=self.bias,
        )


@dataclass(frozen=True)
class HistoryContext:
    """A caption and the last L_M frames of a story (Causal-Story; algorithms.md, section 2).

    kv: (B, Lt + L_M * S, W), the caption's tokens, then S tokens a frame, oldest frame first, empty positions last.
    padding: (B, Lt + L_M * S) bool, True for a key that nobody sees. bias: bias[L] is (B, L, Lt + L_M * S), added to the scores
    of a layer of L query tokens, where what is said of characters reaches their own part alone; self_bias[L] (B, L, L), added
    to those of self-attention, where characters do not see each other; None where no frame says where anybody is.
    """

    kv: Tensor
    padding: Tensor
    caption_tokens: int
    frame_tokens: int
    bias: Biases | None = None
    self_bias: Biases | None = None

    def put(self, index: int, row: HistoryRow) -> None:
        """Write a row's caption and history where row `index` of the buffers is: every row has a story of its own."""
        self.kv[index : index + 1] = row.kv
        self.padding[index : index + 1] = row.padding
        biases.put(self.bias, index, row.bias)
        biases.put(self.self_bias, index, row.self_bias)

    def self_attention(self, tokens: int) -> Attention | None:
        """Of a layer of so many tokens: query, keys, values (B, L, H, d) -> (B, L, H, d); None where it is as ever."""
        return biases.self_attention((self.self_bias or {}).get(tokens))

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        """query (B, L, H, d) -> (B, L, H, d)."""
        return self.of_layer(layer, query.shape[1]).attend(layer, query)

    def of_layer(self, layer: Layer, queries: int) -> LayerHistory:
        """What `layer` reads of it where it has `queries` query tokens."""
        return LayerHistory(
            layer.cut(self.kv),
            self.padding,
            self.caption_tokens,
            self.frame_tokens,
            None if self.bias is None else self.bias[queries],
            (self.self_bias or {}).get(queries),
        )

    def last_rows(self, count: int) -> HistoryContext:
        """The last `count` rows, in the same memory."""
        return replace(
            self,
            kv=self.kv[-count:],
            padding=self.padding[-count:],
            bias=biases.last_rows(self.bias, count),
            self_bias=biases.last_rows(self.self_bias, count),
        )

    def without_references(self) -> HistoryContext:
        """A history is no reference."""
        return self

    def never_empty(self) -> HistoryContext:
        """The same: what it holds is never empty."""
        return self

    def inputs(self) -> dict[str, Tensor]:
        """The tensors by the names that the inputs of an exported UNet have."""
        return {"kv": self.kv, "padding": self.padding}


@dataclass(frozen=True)
class Window:
    """The sizes of a history window: Lt tokens of the caption, `frames` (L_M) of S tokens each; `like` gives W.

    grid: of the latents, where a frame says where its characters are.
    """

    caption_tokens: int
    frame_tokens: int
    frames: int
    like: Tensor
    grid: Grid | None = None

    @property
    def keys(self) -> int:
        """Lt + L_M * S."""
        return self.caption_tokens + self.frames * self.frame_tokens

    def context(self, rows: int, beside: Context | None = None) -> HistoryContext:
        """An empty window for `rows` rows, in memory of its own."""
        kv, device = self.like.new_zeros(rows, self.keys, self.like.shape[-1]), self.like.device
        padding = torch.ones(rows, self.keys, dtype=torch.bool, device=device)
        bias = self_bias = None
        if self.grid is not None:
            bias = {L: torch.zeros(rows, L, self.keys, device=device) for L in self.grid.layers()}
            self_bias = {L: torch.zeros(rows, L, L, device=device) for L in self.grid.bounded_layers()}
        return HistoryContext(kv, padding, self.caption_tokens, self.frame_tokens, bias, self_bias)

    def refill(self, context: Context) -> bool:
        """Nothing is shared: a context of these sizes is good as it is."""
        return (
            isinstance(context, HistoryContext)
            and context.kv.shape[1] == self.keys
            and context.caption_tokens == self.caption_tokens
            and (context.bias is None) == (self.grid is None)
        )


class FrameEncoder(Protocol):
    """A history encoder as the ring calls it: HistoryEncoder, or an export's components.

    local_attention: has keys_values(tokens) and is called as LocalCausalAttention; None without one. adapter: tokens
    (B, S, C_x) -> the same; None without one.
    """

    config: HistoryConfig
    local_attention: Any
    adapter: Any


@dataclass(frozen=True)
class EncodedFrame:
    """A frame as the history takes it. tokens: m_n (1, S, C_x); padding (1, S) bool, True where the caption has ended."""

    tokens: Tensor
    padding: Tensor


class Ring:
    """The last L_M frames of one story, oldest first: what the local causal attention and the UNet need of them.

    Its size does not depend on how many frames came before. `project` turns tokens (1, S, C_x) into the UNet's K and V
    (1, S, W); `table` (P, W) are those of the positions.
    """

    def __init__(
        self, encoder: FrameEncoder, project: Callable[[Tensor], Tensor], table: Tensor, window: int
    ) -> None:
        """window: L_M, in frames, at least 1."""
        self.encoder, self.project, self.table, self.window = encoder, project, table, window
        self.kv = deque[Tensor](maxlen=window)
        self.padding = deque[Tensor](maxlen=window)
        self.local = deque[tuple[Tensor, Tensor]](maxlen=window)

    def append(self, frame: EncodedFrame) -> None:
        """Take in the newest frame; the oldest one leaves a full ring."""
        encoder, tokens = self.encoder, frame.tokens
        self.padding.append(frame.padding)
        if encoder.local_attention is not None:
            self.local.append(encoder.local_attention.keys_values(tokens))
            keys, values = (torch.cat(parts, dim=1) for parts in zip(*self.local, strict=True))
            tokens = encoder.local_attention(
                tokens,
                keys,
                values,
                torch.cat(list(self.padding), dim=1),
                frame_tokens=encoder.config.frame_tokens,
                window=self.window,
                first_frame=len(self.local) - 1,
            )
        self.kv.append(self.project(tokens if encoder.adapter is None else encoder.adapter(tokens)))

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """K and V (1, L_M * S, W) with their positions, and padding (1, L_M * S) bool."""
        return arrange(self.kv, self.padding, self.table, self.window, self.encoder.config.frame_tokens)

    def null_keys_values(self, kv: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the unconditional row: the null frame, kv (1, S, W), in every position that is taken."""
        taken, size = len(self.kv), self.encoder.config.frame_tokens
        return arrange([kv] * taken, [padding] * taken, self.table, self.window, size)

    @property
    def bytes(self) -> int:
        """Bytes held."""
        held = [*self.kv, *self.padding, *(tensor for pair in self.local for tensor in pair)]
        return sum(tensor.nbytes for tensor in held)


def arrange(
    kv: Sequence[Tensor], padding: Sequence[Tensor], table: Tensor, window: int, size: int
) -> tuple[Tensor, Tensor]:
    """Frames' K and V (1, S, W), oldest first, with the table's positions (P, W) added; empty, padded positions behind.

    size: S. Returns (1, window * S, W) and padding (1, window * S).
    """
    out = table.new_zeros(1, window * size, table.shape[-1])
    hidden = torch.ones(1, window * size, dtype=torch.bool, device=table.device)
    for position, (frame, mask) in enumerate(zip(kv, padding, strict=True)):
        out[:, position * size : (position + 1) * size] = frame + table[position]
        hidden[:, position * size : (position + 1) * size] = mask
    return out, hidden
