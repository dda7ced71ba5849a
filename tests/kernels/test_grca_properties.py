"""Properties of grca that hold for any input, for the composition and for the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import Interpreter, assert_within, grca_oracle, start_interpreter
from torch import Tensor

from fastory.kernels import attend
from fastory.kernels.grca.composed import grca_composed

TOKENS, HEADS, WIDTH = 4, 2, 24


def _compose(operator: str, tensors: list[Tensor], options: dict[str, Any]) -> Tensor:
    everything = {"ref_offsets": None, "ref_visible": None, "mask": None} | options
    return grca_composed(*tensors, **everything, attend=attend.sdpa)


@pytest.fixture(scope="module", params=["composition", "kernel"])
def run(request: pytest.FixtureRequest) -> Iterator[Interpreter]:
    yield from (iter([_compose]) if request.param == "composition" else start_interpreter())


def draw(seed: int, rows: int, queries: int, text: int, blocks: int, kept: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    q = torch.randn(rows, queries, HEADS, WIDTH)
    k_text, v_text = (torch.randn(1, text, HEADS, WIDTH) for _ in "kv")
    k_ref, v_ref = (torch.randn(kept, blocks * TOKENS, HEADS, WIDTH) for _ in "kv")
    return [q, k_text, v_text, k_ref, v_ref, torch.tensor(0.4)]


def blocks_of(x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, TOKENS))


quickly = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 2**20)
# Text and references in one tile and in several.
sizes = st.sampled_from([(7, 3), (77, 5), (77, 13), (130, 40)])


@quickly
@given(seed=seeds, size=sizes)
def test_order_of_references_does_not_matter(run: Interpreter, seed: int, size: tuple[int, int]) -> None:
    tensors = draw(seed, 2, 20, *size)
    order = torch.randperm(size[1])
    shuffled = [*tensors[:3], *(blocks_of(x)[:, order].flatten(1, 2) for x in tensors[3:5]), tensors[5]]
    options = {"tokens_per_ref": TOKENS}
    assert_within(run("grca", shuffled, options), *grca_oracle(tensors, options))


@quickly
@given(seed=seeds, size=sizes, data=st.data())
def test_order_of_groups_does_not_matter(
    run: Interpreter, seed: int, size: tuple[int, int], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, size[1])) * TOKENS
    keys = size[1] * TOKENS
    tensors = draw(seed, 2, 20, *size)
    tensors[5] = torch.tensor([0.3, -0.8])
    mask = torch.rand(1, 2, 20)
    options = {"tokens_per_ref": TOKENS, "ref_offsets": torch.tensor([0, cut, keys]), "mask": mask}
    swapped = [
        *tensors[:3],
        *(torch.cat((x[:, cut:], x[:, :cut]), 1) for x in tensors[3:5]),
        tensors[5].flip(0),
    ]
    other = options | {"ref_offsets": torch.tensor([0, keys - cut, keys]), "mask": mask.flip(1)}
    assert_within(run("grca", swapped, other), *grca_oracle(tensors, options))


@quickly
@given(seed=seeds, copies=st.integers(2, 30))
def test_copies_of_a_reference_equal_one(run: Interpreter, seed: int, copies: int) -> None:
    """Why the unconditional half needs one block of keys and not N (algorithms.md, section 1)."""
    tensors = draw(seed, 2, 20, 77, 1)
    copied = [*tensors[:3], *(x.repeat(1, copies, 1, 1) for x in tensors[3:5]), tensors[5]]
    options = {"tokens_per_ref": TOKENS}
    assert_within(run("grca", copied, options), *grca_oracle(tensors, options))


@quickly
@given(seed=seeds, size=sizes)
def test_scale_zero_is_the_text_alone(run: Interpreter, seed: int, size: tuple[int, int]) -> None:
    tensors = draw(seed, 2, 20, *size)
    tensors[5] = torch.tensor(0.0)
    alone = [*tensors[:3], *(x[:, :0] for x in tensors[3:5]), tensors[5]]
    options = {"tokens_per_ref": TOKENS}
    assert_within(run("grca", tensors, options), *grca_oracle(alone, options))


@quickly
@given(seed=seeds, size=sizes)
def test_unseen_references_are_exactly_absent(run: Interpreter, seed: int, size: tuple[int, int]) -> None:
    """A row that sees nothing gives the bytes of the text alone, whatever the scale."""
    tensors = draw(seed, 2, 20, *size)
    seen = torch.zeros(2, size[1], dtype=torch.bool)
    seen[1] = True
    options = {"tokens_per_ref": TOKENS, "ref_visible": seen}
    none_seen = {"tokens_per_ref": TOKENS, "ref_visible": torch.zeros_like(seen)}
    zero = [*tensors[:5], torch.tensor(0.0)]
    assert torch.equal(run("grca", tensors, options)[0], run("grca", zero, none_seen)[0])


@quickly
@given(seed=seeds, size=sizes, place=st.integers(0, 3))
def test_row_has_the_same_bytes_in_any_place(
    run: Interpreter, seed: int, size: tuple[int, int], place: int
) -> None:
    """A row twice in a batch, and among other neighbours: equal bytes."""
    tensors = draw(seed, 4, 20, *size, kept=4)
    seen = torch.rand(4, size[1]) > 0.4
    out = run("grca", tensors, {"tokens_per_ref": TOKENS, "ref_visible": seen})
    order = torch.tensor([place, 0, place, 1])
    moved = [tensors[0][order], *tensors[1:3], *(x[order] for x in tensors[3:5]), tensors[5]]
    again = run("grca", moved, {"tokens_per_ref": TOKENS, "ref_visible": seen[order]})
    assert torch.equal(again, out[order])
