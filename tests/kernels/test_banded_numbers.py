"""banded_causal_attention computes its definition: every implementation against float64, errors derived."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    BANDED,
    BANDED_CASES,
    Case,
    Interpreter,
    assert_within,
    banded_inputs,
    banded_oracle,
    name_of,
    start_interpreter,
)

from fastory.kernels import attend
from fastory.kernels.banded import banded_causal_attention
from fastory.kernels.banded.composed import banded_composed
from fastory.kernels.banded.reference import band


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpreter]:
    yield from start_interpreter()


def large_matrix(count: int) -> list[Case]:
    """Every group size with every window, number of keys and way of grouping the queries, the rest drawn."""
    draw = random.Random(0)
    names = ("group_size", "window", "keys", "query_group_size")
    return [
        {name: draw.choice(values) for name, values in BANDED.items()} | dict(zip(names, chosen, strict=True))
        for chosen in itertools.product(*(BANDED[name] for name in names))
        for _ in range(count)
    ]


@pytest.mark.parametrize("case", BANDED_CASES, ids=name_of)
def test_kernel_equals_its_definition(case: Case, interpret: Interpreter) -> None:
    tensors, options = banded_inputs(case)
    assert_within(interpret("banded", tensors, options), *banded_oracle(tensors, options))


@pytest.mark.slow
@pytest.mark.parametrize("case", large_matrix(2), ids=name_of)
def test_kernel_equals_its_definition_on_the_large_matrix(case: Case, interpret: Interpreter) -> None:
    tensors, options = banded_inputs(case)
    assert_within(interpret("banded", tensors, options), *banded_oracle(tensors, options))


@pytest.mark.parametrize("case", [*BANDED_CASES, *large_matrix(1)], ids=name_of)
def test_composition_equals_the_definition(case: Case) -> None:
    tensors, options = banded_inputs(case)
    out = banded_composed(*tensors, **options, attend=attend.sdpa)
    assert_within(out, *banded_oracle(tensors, options))
    assert out.is_contiguous()


def test_band_is_the_paper_s_mask_by_hand() -> None:
    """Window 2, two tokens a frame, one caption token: written out."""
    allowed = band(6, 7, 2, 2, 0, None, 1, torch.device("cpu"))
    picture = ["1110000", "1110000", "1111100", "1111100", "1001111", "1001111"]
    assert ["".join(str(int(x)) for x in row) for row in allowed] == picture


def test_unet_call_sees_the_last_frames_and_the_caption_only() -> None:
    """The UNet's call for frame 3 with a window of 2 sees frames 1 and 2: changing frame 0 changes nothing."""
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 3 + 12, 2, 8), torch.randn(1, 3 + 12, 2, 8)
    band_of = {"group_size": 4, "window": 2, "query_group": 2, "query_group_size": 0, "prefix": 3}
    before = banded_causal_attention(q, k, v, **band_of)
    for changed, same in (
        (slice(3, 7), True),
        (slice(7, 8), False),
        (slice(14, 15), False),
        (slice(0, 1), False),
    ):
        other = v.clone()
        other[:, changed] += 1.0
        assert torch.equal(banded_causal_attention(q, k, other, **band_of), before) == same


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the kernel runs in the interpreter here"
)
@pytest.mark.parametrize("case", [*BANDED_CASES, *large_matrix(1)], ids=name_of)
def test_kernel_on_the_gpu_is_as_exact_as_its_best_peer(case: Case) -> None:
    """Within the derived error, and within twice the error of the composition in the same type plus a rounding."""
    tensors, options = banded_inputs(case, "cuda")
    oracle, allowed = banded_oracle(tensors, options)
    out = banded_causal_attention(*tensors, **options)
    assert_within(out, oracle, allowed)
    peer = (banded_composed(*tensors, **options, attend=attend.sdpa).double() - oracle).abs().max()
    rounding = torch.finfo(out.dtype).eps * oracle.abs().max()
    assert (out.double() - oracle).abs().max() <= 2 * peer + rounding
