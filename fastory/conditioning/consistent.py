"""Frames that see each other while they are denoised: which tokens each sees, at every call, and the context of the call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastory.conditioning.context import Context
from fastory.conditioning.references import ReferenceContext, ReferenceRow, References
from fastory.processors.consistent import Samples, consistent_self_attention
from fastory.processors.projected import Layer


@dataclass(frozen=True)
class ConsistentContext:
    """The text of a UNet call's rows, and whose tokens their self-attention reads beside their own.

    samples: for a layer of L tokens, of this call; they are written before it.
    """

    text: ReferenceContext
    samples: dict[int, Samples]

    def put(self, index: int, row: ReferenceRow) -> None:
        """Write a row's text where row `index` of the buffers is."""
        self.text.put(index, row)

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        """query (B, L, H, d) -> (B, L, H, d), of the text."""
        return self.text.attend(layer, query)

    def of_layer(self, layer: Layer, queries: int) -> ConsistentContext:
        """The same: what its self-attention reads goes by the number of query tokens, too."""
        return self

    def self_attention(self, tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Of a layer of so many tokens: query, keys, values (B, L, H, d) -> (B, L, H, d)."""
        return partial(consistent_self_attention, samples=self.samples[tokens])

    def last_rows(self, count: int) -> ConsistentContext:
        """The last `count` rows, in the same memory: the frames' conditional rows."""
        return replace(self, text=self.text.last_rows(count))

    def without_references(self) -> ConsistentContext:
        """The same: there are none."""
        return self

    def never_empty(self) -> ConsistentContext:
        """The same with the text's."""
        return replace(self, text=self.text.never_empty())

    def inputs(self) -> dict[str, Tensor]:
        """Those of the text."""
        return self.text.inputs()

    def write(self, samples: dict[int, Samples]) -> None:
        """The tokens of the next call, in the same memory."""
        for tokens, held in self.samples.items():
            held.bank.copy_(samples[tokens].bank)
            held.later.copy_(samples[tokens].later)


@dataclass(frozen=True)
class FrameSamples:
    """The tokens that the frames of one micro-batch see, at every call of the UNet.

    text: what the rows attend to beside them, without references. calls: by the call's number, samples by a layer's tokens.
    """

    text: References
    calls: Sequence[dict[int, Samples]]

    @classmethod
    def of(
        cls,
        text: References,
        frames: Sequence[tuple[int, int]],
        bank: int,
        *,
        tokens: Sequence[int],
        rate: float,
        calls: int,
        device: torch.device,
    ) -> FrameSamples:
        """Drawn from generators of their own, so that a frame sees the same tokens whatever is denoised beside it.

        frames: number and seed of the noise of every frame of the call, the bank's first. tokens: L of the layers. rate: of
        the other frames' tokens, how many are seen.
        """
        numbers = range(len(frames))
        drawn = []
        for call in range(calls):
            by_layer = {}
            for count in tokens:
                rows = [sample(frames[n], n if n < bank else None, bank, count, rate, call) for n in numbers]
                parts = (rows[:bank], rows[bank:])
                stacked = (
                    torch.stack(part) if part else torch.zeros(0, 0, dtype=torch.int64) for part in parts
                )
                by_layer[count] = Samples(*(part.to(device) for part in stacked))
            drawn.append(by_layer)
        return cls(text, drawn)

    def context(self, rows: int, beside: Context | None = None) -> ConsistentContext:
        """Room for the captions of `rows` rows and the samples of one call."""
        held = {
            tokens: Samples(torch.zeros_like(samples.bank), torch.zeros_like(samples.later))
            for tokens, samples in self.calls[0].items()
        }
        return ConsistentContext(self.text.context(rows), held)

    def refill(self, context: Context) -> bool:
        """Another micro-batch of as many frames, in the same buffers."""
        if not isinstance(context, ConsistentContext) or context.samples.keys() != self.calls[0].keys():
            return False
        for tokens, held in context.samples.items():
            other = self.calls[0][tokens]
            if held.bank.shape != other.bank.shape or held.later.shape != other.later.shape:
                return False
        return self.text.refill(context.text)


def sample(
    frame: tuple[int, int], place_in_bank: int | None, bank: int, tokens: int, rate: float, call: int
) -> Tensor:
    """RandSample of eq. 2 for one frame in one layer: indices (n,) into the bank's `bank` * `tokens` tokens, none twice.

    place_in_bank: of a frame of the bank, whose own tokens are left out.
    """
    number, seed = frame
    name = hashlib.sha256(f"{seed}:{number}:{call}:{tokens}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(name, "big"))
    others = bank * tokens if place_in_bank is None else (bank - 1) * tokens
    chosen = torch.randperm(others, generator=generator)[: round(rate * others)]
    return chosen if place_in_bank is None else chosen + tokens * (chosen >= place_in_bank * tokens)
