"""Properties of banded causal attention that hold for any input, for the composition and for the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import Interpreter, assert_within, banded_oracle, start_interpreter
from torch import Tensor

from fastory.kernels import attend
from fastory.kernels.banded.composed import banded_composed

DEFAULTS = {"query_group": 0, "query_group_size": None, "key_padding": None, "prefix": 0}


def _compose(operator: str, tensors: list[Tensor], options: dict[str, Any]) -> Tensor:
    return banded_composed(*tensors, **(DEFAULTS | options), attend=attend.sdpa)


@pytest.fixture(scope="module", params=["composition", "kernel"])
def run(request: pytest.FixtureRequest) -> Iterator[Interpreter]:
    yield from (iter([_compose]) if request.param == "composition" else start_interpreter())


def draw(seed: int, tokens: int, rows: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(rows, tokens, 2, 24) for _ in "qkv"]


quickly = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 2**20)
group_sizes = st.sampled_from([1, 3, 20])


@quickly
@given(seed=seeds, group_size=group_sizes, groups=st.integers(1, 6), extra=st.integers(0, 2))
def test_window_of_all_groups_is_plain_causal(
    run: Interpreter, seed: int, group_size: int, groups: int, extra: int
) -> None:
    tensors = draw(seed, group_size * groups)
    windowed = {"group_size": group_size, "window": groups + extra}
    unlimited = {"group_size": group_size, "window": 0}
    assert_within(run("banded", tensors, windowed), *banded_oracle(tensors, unlimited))


@quickly
@given(seed=seeds, group_size=group_sizes, groups=st.integers(2, 5), window=st.integers(0, 3))
def test_calls_frame_by_frame_equal_one_full_call(
    run: Interpreter, seed: int, group_size: int, groups: int, window: int
) -> None:
    """Frame t alone, over the history so far, with query_group = t: what makes the work per frame constant."""
    q, k, v = draw(seed, group_size * groups)
    parts = []
    for t in range(groups):
        now, past = slice(t * group_size, (t + 1) * group_size), slice(0, (t + 1) * group_size)
        options = {"group_size": group_size, "window": window, "query_group": t}
        parts.append(run("banded", [q[:, now], k[:, past], v[:, past]], options))
    full = {"group_size": group_size, "window": window}
    assert_within(torch.cat(parts, 1), *banded_oracle([q, k, v], full))


@quickly
@given(seed=seeds, group_size=group_sizes, window=st.integers(1, 3))
def test_window_cuts_what_lies_behind_it(run: Interpreter, seed: int, group_size: int, window: int) -> None:
    """Calls over the last `window` groups alone equal calls over the whole history: the ring may forget."""
    groups = window + 3
    q, k, v = draw(seed, group_size * groups)
    kept = slice((groups - window) * group_size, None)
    newest = {"group_size": group_size, "window": window, "query_group": groups - 1, "query_group_size": 0}
    out = run("banded", [q, k[:, kept], v[:, kept]], newest | {"query_group": window - 1})
    assert_within(out, *banded_oracle([q, k, v], newest))


@quickly
@given(seed=seeds, group_size=group_sizes, prefix=st.sampled_from([0, 5, 70]))
def test_row_without_visible_keys_is_zero(run: Interpreter, seed: int, group_size: int, prefix: int) -> None:
    q, k, v = draw(seed, prefix + 4 * group_size, rows=2)
    padding = torch.zeros(2, k.shape[1], dtype=torch.bool)
    padding[0] = True
    options = {"group_size": group_size, "window": 2, "key_padding": padding, "prefix": prefix}
    out = run("banded", [q, k, v], options)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert_within(out, *banded_oracle([q, k, v], options))


@quickly
@given(seed=seeds, group_size=group_sizes)
def test_row_has_the_same_bytes_in_any_place(run: Interpreter, seed: int, group_size: int) -> None:
    q, k, v = draw(seed, 4 * group_size, rows=3)
    options = {"group_size": group_size, "window": 2}
    order = torch.tensor([2, 0, 2])
    moved = run("banded", [q[order], k[order], v[order]], options)
    assert torch.equal(moved, run("banded", [q, k, v], options)[order])
