"""What is shared by all frames of a round, and the contexts that UNet calls read."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fastory.processors.projected import Layer


class Context(Protocol):
    """What the cross-attention layers of one UNet call attend to, in buffers that are filled row by row."""

    def put(self, index: int, row: Any) -> None:
        """Write what one row of the UNet call attends to where the context holds row `index`."""

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        """query (B, L, H, d) -> (B, L, H, d)."""

    def of_layer(self, layer: Layer, queries: int) -> Any:
        """What `layer` alone reads in a call with `queries` query tokens, in the same memory; it has `attend`, too."""

    def last_rows(self, count: int) -> Context:
        """The last `count` rows, in the same memory."""

    def without_references(self) -> Context:
        """The same rows, the text in the same memory, and no references."""

    def never_empty(self) -> Context:
        """The same for a graph that serves any number of references: none become some that nobody sees."""

    def inputs(self) -> dict[str, Tensor]:
        """The tensors by the names that the inputs of an exported UNet have."""


class Shared(Protocol):
    """What all frames of a round share of a context: makes contexts of any number of rows, and refills one."""

    def context(self, rows: int, beside: Context | None = None) -> Context:
        """A context of `rows` rows. beside: another one of as many rows, which is never read while this one is.

        What rows alone fill may lie in the memory of `beside`.
        """

    def refill(self, context: Context) -> bool:
        """Write the shared part where `context` holds it. False, and nothing written, where the shapes differ."""
