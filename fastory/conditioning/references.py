"""References of iterative mode: groups of pictures, who sees them, and the null block that ends every group.

A picture is a block of T tokens. The K and V of all blocks stand side by side in ref_kv, group after group; the last block
of a group is the null block, the unconditional reference, which unconditional rows see in place of the group's pictures
(algorithms.md, section 1, grouped form). Who counts blocks asks here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fastory.conditioning import biases
from fastory.conditioning.biases import Attention, Biases
from fastory.conditioning.context import Context
from fastory.conditioning.regions import Grid, layer_masks
from fastory.processors.projected import Layer, attend_references


def count_blocks(pictures: Sequence[int]) -> int:
    """Blocks of groups with so many pictures each: the pictures, and a null block a group."""
    return sum(count + 1 for count in pictures)


def everywhere(frame: int) -> None:
    """The mask of a group that reaches the whole picture."""


@dataclass(frozen=True)
class Group:
    """Reference pictures with one weight l_g. tokens[n] is (1, T, C_x), or None for a picture that was left out.

    sees(frame, n): whether `frame` has picture n among its references. mask(frame): (h, w), where in `frame` the group
    reaches, or None for everywhere. weights: a factor of each picture's values; its keys, and with them the share of attention
    that it draws, stay.
    """

    tokens: Sequence[Tensor | None]
    scale: float
    sees: Callable[[int, int], bool]
    mask: Callable[[int], Tensor | None] = everywhere
    weights: Sequence[float] | None = None

    def factors(self) -> list[float]:
        """Of the values of every block; the null block is what it is."""
        return [*(self.weights or [1.0] * len(self.tokens)), 1.0]

    def blocks(self, null: Tensor) -> list[Tensor]:
        """The tokens of every block. null: those of the unconditional reference."""
        return [*(torch.zeros_like(null) if tokens is None else tokens for tokens in self.tokens), null]

    def visible(self, frame: int) -> list[bool]:
        """Which blocks the conditional row of `frame` sees: its references, never the null block."""
        return [tokens is not None and self.sees(frame, n) for n, tokens in enumerate(self.tokens)] + [False]

    def null_visible(self, frame: int) -> list[bool]:
        """Which blocks its unconditional row sees: the null block, where the conditional row sees a reference."""
        return [False] * len(self.tokens) + [any(self.visible(frame))]


@dataclass(frozen=True)
class ReferenceRow:
    """What one row of a UNet call attends to. text_kv (1, Lt, W); ref_visible (1, blocks) bool; ref_ranges (1, G, 4).

    ref_ranges, masks, text_bias, self_bias: as of ReferenceContext, of one row.
    """

    text_kv: Tensor
    ref_visible: Tensor
    ref_ranges: Tensor
    masks: dict[int, Tensor] | None = None
    text_bias: Biases | None = None
    self_bias: Biases | None = None


@dataclass(frozen=True)
class LayerReferences:
    """What one layer reads of a ReferenceContext: the same, K and V of this layer and masks of its query tokens alone."""

    text_kv: Tensor
    ref_kv: Tensor
    scale: Tensor
    ref_visible: Tensor
    ref_offsets: Tensor
    ref_ranges: Tensor | None
    tokens_per_ref: int
    mask: Tensor | None
    text_bias: Tensor | None
    self_bias: Tensor | None

    def self_attention(self, tokens: int) -> Attention | None:
        """As of ReferenceContext: of this layer's own number of tokens."""
        return biases.self_attention(self.self_bias)

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        """query (B, L, H, d) -> (B, L, H, d)."""
        return attend_references(
            layer,
            query,
            text_kv=self.text_kv,
            ref_kv=self.ref_kv,
            scale=self.scale,
            tokens_per_ref=self.tokens_per_ref,
            ref_offsets=self.ref_offsets,
            ref_visible=self.ref_visible,
            mask=self.mask,
            ref_ranges=self.ref_ranges,
            text_bias=self.text_bias,
        )


@dataclass(frozen=True)
class ReferenceContext:
    """Text, and references with their own weights (algorithms.md, section 1, grouped form).

    text_kv: (B, Lt, W). ref_kv: (1, Lr, W), every row reads it without a copy; Lr = 0 in a call without references.
    scale: (G,) weight l_g of each group. ref_visible: (B, Lr / tokens_per_ref) bool. ref_offsets: (G + 1,) int32.
    ref_ranges: (B, G, 4) int32, of ref_visible, as fastory.kernels.grca.visible_ranges has it, so that no kernel has to look
    for them; None in a graph that is exported.
    masks: for a layer of L query tokens, masks[L] is (B or 1, G, L) in [0, 1]. text_bias: text_bias[L] is (B, L, Lt), added to
    the scores of the text's tokens, where characters' words reach their own part alone. self_bias: self_bias[L] is (B, L, L),
    added to those of self-attention, where characters do not see each other.
    """

    text_kv: Tensor
    ref_kv: Tensor
    scale: Tensor
    ref_visible: Tensor
    ref_offsets: Tensor
    tokens_per_ref: int
    masks: dict[int, Tensor] | None = None
    text_bias: Biases | None = None
    self_bias: Biases | None = None
    ref_ranges: Tensor | None = None

    def put(self, index: int, row: ReferenceRow) -> None:
        """Write a row's text and which references it sees where row `index` of the buffers is."""
        self.text_kv[index : index + 1] = row.text_kv
        self.ref_visible[index : index + 1] = row.ref_visible
        if self.ref_ranges is not None:
            self.ref_ranges[index : index + 1] = row.ref_ranges
        if self.masks is not None:
            assert row.masks is not None
            for tokens, mask in self.masks.items():
                mask[index : index + 1] = row.masks[tokens]
        biases.put(self.text_bias, index, row.text_bias)
        biases.put(self.self_bias, index, row.self_bias)

    def self_attention(self, tokens: int) -> Attention | None:
        """Of a layer of so many tokens: query, keys, values (B, L, H, d) -> (B, L, H, d); None where it is as ever."""
        return biases.self_attention((self.self_bias or {}).get(tokens))

    def attend(self, layer: Layer, query: Tensor) -> Tensor:
        """query (B, L, H, d) -> (B, L, H, d)."""
        return self.of_layer(layer, query.shape[1]).attend(layer, query)

    def of_layer(self, layer: Layer, queries: int) -> LayerReferences:
        """What `layer` reads of it where it has `queries` query tokens."""
        return LayerReferences(
            layer.cut(self.text_kv),
            layer.cut(self.ref_kv),
            self.scale,
            self.ref_visible,
            self.ref_offsets,
            self.ref_ranges,
            self.tokens_per_ref,
            None if self.masks is None else self.masks[queries],
            None if self.text_bias is None else self.text_bias[queries],
            (self.self_bias or {}).get(queries),
        )

    def last_rows(self, count: int) -> ReferenceContext:
        """The last `count` rows, in the same memory."""
        masks = self.masks and {
            L: mask if len(mask) == 1 else mask[-count:] for L, mask in self.masks.items()
        }
        return replace(
            self,
            text_kv=self.text_kv[-count:],
            ref_visible=self.ref_visible[-count:],
            ref_ranges=None if self.ref_ranges is None else self.ref_ranges[-count:],
            masks=masks,
            text_bias=biases.last_rows(self.text_bias, count),
            self_bias=biases.last_rows(self.self_bias, count),
        )

    def without_references(self) -> ReferenceContext:
        """The same rows, the text in the same memory, and no references."""
        return replace(
            self,
            ref_kv=self.ref_kv[:, :0],
            scale=self.scale.new_zeros(1),
            ref_visible=self.ref_visible[:, :0],
            ref_offsets=self.ref_offsets.new_zeros(2),
            ref_ranges=None
            if self.ref_ranges is None
            else self.ref_ranges.new_zeros(len(self.ref_ranges), 1, 4),
            masks=None,
        )

    def never_empty(self) -> ReferenceContext:
        """The same, with two blocks that nobody sees where there are no references: of one, a graph would be for one."""
        if self.ref_kv.shape[1]:
            return self
        rows, width = self.ref_visible.shape[0], self.ref_kv.shape[2]
        bounds = torch.arange(2, dtype=torch.int32, device=self.ref_kv.device)  # no copy
        return replace(
            self,
            ref_kv=self.ref_kv.new_zeros(1, 2 * self.tokens_per_ref, width),
            ref_visible=self.ref_visible.new_zeros(rows, 2),
            ref_offsets=bounds * 2 * self.tokens_per_ref,
        )

    def inputs(self) -> dict[str, Tensor]:
        """The tensors by the names that the inputs of an exported UNet have."""
        return {
            "text_kv": self.text_kv,
            "ref_kv": self.ref_kv,
            "ref_visible": self.ref_visible,
            "ref_offsets": self.ref_offsets,
            "scale": self.scale,
        }

    def of_groups(self, groups: int) -> ReferenceContext:
        """The same with `groups` groups, the further ones empty; without references one block that nobody sees.

        Graphs are exported for a number of groups and for at least one reference.
        """
        ref_kv, visible = self.ref_kv, self.ref_visible
        if ref_kv.shape[1] == 0:
            ref_kv = ref_kv.new_zeros(1, self.tokens_per_ref, ref_kv.shape[2])
            visible = visible.new_zeros(visible.shape[0], 1)
        missing = groups + 1 - len(self.ref_offsets)
        return replace(
            self,
            ref_kv=ref_kv,
            ref_visible=visible,
            ref_offsets=torch.cat([self.ref_offsets, self.ref_offsets[-1:].expand(missing)]),
            ref_ranges=None,
            scale=torch.cat([self.scale, self.scale.new_zeros(groups - len(self.scale))]),
            masks=self.masks
            and {
                L: functional.pad(mask, (0, 0, 0, groups - mask.shape[1]), value=1.0)
                for L, mask in self.masks.items()
            },
        )


@dataclass(frozen=True)
class References:
    """The references that all frames of a round share, made by `of`; contexts of any number of rows read them.

    ref_kv (1, Lr, W); scale (G,); offsets (G + 1,) int32, in tokens. text_tokens: Lt of the captions beside them. grid: of
    the latents, where groups have masks; words: where rows have a text_bias and a self_bias.
    """

    groups: tuple[Group, ...]
    ref_kv: Tensor
    scale: Tensor
    offsets: Tensor
    tokens_per_ref: int
    text_tokens: int
    grid: Grid | None = None
    words: Grid | None = None

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        null: Callable[[], Tensor],
        project: Callable[[Tensor], Tensor],
        *,
        tokens_per_ref: int,
        like: Tensor,
        grid: Grid | None = None,
        words: Grid | None = None,
        value_columns: Tensor | None = None,
    ) -> References:
        """The only constructor: K and V of all blocks, each group ending with its null block.

        null: gives the tokens (1, T, C_x) of the unconditional reference; asked where there are groups. project: reference
        tokens (1, Lr, C_x) -> (1, Lr, W). like: text K/V (1, Lt, W), which gives text_tokens, W, device and type.
        grid: of the latents; without it the groups' masks are not read. words: of the latents; without it no row has a
        text_bias or a self_bias. value_columns: (W,) bool, which of `project`'s are values; read where groups have weights.
        """
        bounds = [0]
        for group in groups:
            bounds.append(bounds[-1] + count_blocks([len(group.tokens)]) * tokens_per_ref)
        if groups:
            tokens = null()
            ref_kv = project(torch.cat([block for group in groups for block in group.blocks(tokens)], dim=1))
            if any(group.weights for group in groups):
                assert value_columns is not None
                factors = ref_kv.new_tensor([factor for group in groups for factor in group.factors()])
                each = factors.repeat_interleave(tokens_per_ref)[None, :, None]
                ref_kv = torch.where(value_columns.to(ref_kv.device), ref_kv * each, ref_kv)
        else:
            ref_kv = like.new_zeros(1, 0, like.shape[2])
        scale = [group.scale for group in groups] or [0.0]
        return cls(
            tuple(groups),
            ref_kv,
            torch.tensor(scale, dtype=torch.float32, device=like.device),
            torch.tensor(bounds if groups else [0, 0], dtype=torch.int32, device=like.device),
            tokens_per_ref,
            like.shape[1],
            grid if groups else None,
            words,
        )

    def row(
        self,
        frame: int,
        text_kv: Tensor,
        text_bias: Biases | None = None,
        self_bias: Biases | None = None,
    ) -> ReferenceRow:
        """What the conditional row of `frame` attends to."""
        seen = self._seen([group.visible(frame) for group in self.groups])
        return ReferenceRow(text_kv, *seen, self.masks(frame), text_bias, self_bias)

    def null_row(self, frame: int, text_kv: Tensor, self_bias: Biases | None = None) -> ReferenceRow:
        """What its unconditional row attends to."""
        seen = self._seen([group.null_visible(frame) for group in self.groups])
        return ReferenceRow(text_kv, *seen, self.masks(frame), self_bias=self_bias)

    def _seen(self, groups: list[list[bool]]) -> tuple[Tensor, Tensor]:
        """ref_visible and ref_ranges of a row that sees these blocks of each group."""
        flags = torch.tensor([[seen for group in groups for seen in group]], dtype=torch.bool)
        blocks = torch.tensor([_ranges(groups or [[]])], dtype=torch.int32)
        return flags, blocks * self.tokens_per_ref

    def masks(self, frame: int) -> dict[int, Tensor] | None:
        """Where in `frame` each group reaches, (1, G, L) for every layer of L query tokens; None where all reach all."""
        if self.grid is None:
            return None
        masks = (group.mask(frame) for group in self.groups)
        ones = torch.ones(self.grid.height, self.grid.width)
        return layer_masks([ones if mask is None else mask for mask in masks], self.grid)

    def context(self, rows: int, beside: Context | None = None) -> ReferenceContext:
        """Room for the captions of `rows` rows beside these references; their K and V lie where `beside` has its own."""
        width, blocks = self.ref_kv.shape[2], self.ref_kv.shape[1] // self.tokens_per_ref
        text = (rows, self.text_tokens, width)
        there = beside.text_kv if isinstance(beside, ReferenceContext) else None
        return ReferenceContext(
            text_kv=self.ref_kv.new_zeros(text) if there is None or there.shape != text else there,
            ref_kv=self.ref_kv,
            scale=self.scale.clone(),  # it may be written at every step
            ref_visible=torch.zeros(rows, blocks, dtype=torch.bool, device=self.ref_kv.device),
            ref_offsets=self.offsets,
            ref_ranges=self.offsets.new_zeros(rows, len(self.scale), 4),
            tokens_per_ref=self.tokens_per_ref,
            masks=None if self.grid is None else self._room_for_masks(rows, self.grid),
            text_bias=None if self.words is None else self._room_for_bias(rows, self.words),
            self_bias=None if self.words is None else self._room_between(rows, self.words),
        )

    def _room_for_masks(self, rows: int, grid: Grid) -> dict[int, Tensor]:
        groups, device = len(self.groups), self.ref_kv.device
        return {tokens: torch.ones(rows, groups, tokens, device=device) for tokens in grid.layers()}

    def _room_for_bias(self, rows: int, grid: Grid) -> dict[int, Tensor]:
        device = self.ref_kv.device
        return {L: torch.zeros(rows, L, self.text_tokens, device=device) for L in grid.layers()}

    def _room_between(self, rows: int, grid: Grid) -> dict[int, Tensor]:
        device = self.ref_kv.device
        return {L: torch.zeros(rows, L, L, device=device) for L in grid.bounded_layers()}

    def refill(self, context: Context) -> bool:
        """Other references of the same number, in the same buffers."""
        if (
            not isinstance(context, ReferenceContext)
            or context.ref_kv.shape != self.ref_kv.shape
            or context.scale.shape != self.scale.shape
            or context.text_kv.shape[1] != self.text_tokens
            or (context.masks is None) != (self.grid is None)
            or (context.text_bias is None) != (self.words is None)
        ):
            return False
        context.ref_kv.copy_(self.ref_kv)
        context.scale.copy_(self.scale)
        context.ref_offsets.copy_(self.offsets)
        return True


def _ranges(groups: Sequence[list[bool]]) -> list[tuple[int, int, int, int]]:
    """Of each group: [from, to) around the blocks that are seen, and around those between them that are not."""
    found, start = [], 0
    for group in groups:
        first, last = _extent([start + n for n, seen in enumerate(group) if seen])
        found.append((first, last, *_extent([n for n in range(first, last) if not group[n - start]])))
        start += len(group)
    return found


def _extent(ascending: Sequence[int]) -> tuple[int, int]:
    return (ascending[0], ascending[-1] + 1) if ascending else (0, 0)
