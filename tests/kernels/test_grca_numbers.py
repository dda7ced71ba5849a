"""grca computes its definition: every implementation against float64, with an allowed error that is derived."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    GRCA,
    GRCA_CASES,
    Case,
    Interpreter,
    assert_within,
    grca_inputs,
    grca_oracle,
    name_of,
    start_interpreter,
)

from fastory.kernels import attend
from fastory.kernels.grca import grca, grca_reference
from fastory.kernels.grca.composed import grca_composed


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpreter]:
    yield from start_interpreter()


def large_matrix(count: int) -> list[Case]:
    """Every head width with every number of reference keys, queries and groups, the rest drawn."""
    draw = random.Random(0)
    chosen = [
        {name: draw.choice(values) for name, values in GRCA.items()}
        | dict(zip(("d", "refs"), pair, strict=True))
        for pair in itertools.product(GRCA["d"], GRCA["refs"])
        for _ in range(count)
    ]
    return [short(case) for case in chosen]


def short(case: Case) -> Case:
    """With 100 query tokens, two tiles of which one is not full, in place of 1024: half a minute in the interpreter."""
    return case | {"L": 100 if case["L"] == 1024 else case["L"]}


LONG = [
    pytest.param(case, marks=pytest.mark.slow, id=name_of(case)) for case in GRCA_CASES if case["L"] == 1024
]


@pytest.mark.parametrize("case", [*map(short, GRCA_CASES), *LONG], ids=name_of)
def test_kernel_equals_its_definition(case: Case, interpret: Interpreter) -> None:
    tensors, options = grca_inputs(case)
    assert_within(interpret("grca", tensors, options), *grca_oracle(tensors, options))


@pytest.mark.slow
@pytest.mark.parametrize("case", large_matrix(5), ids=name_of)
def test_kernel_equals_its_definition_on_the_large_matrix(case: Case, interpret: Interpreter) -> None:
    tensors, options = grca_inputs(case)
    assert_within(interpret("grca", tensors, options), *grca_oracle(tensors, options))


GROUPS = [
    pytest.param([2] * 20, "all", id="20 groups of two references"),
    pytest.param([1, 2, 0, 2, 1], "all", id="a tile's slots not all taken, one group empty"),
    pytest.param([2, 2, 30, 2, 1, 2, 2, 2, 2, 40, 2], "all", id="long groups among short ones"),
    pytest.param([2, 2, 30, 2, 1, 2, 2, 2, 2, 40, 2], "random", id="holes"),
    pytest.param([50, 50, 50], "one", id="long groups of which a row sees one reference"),
    pytest.param([100], "hole", id="a frame does not see itself"),
    pytest.param([2] * 9, "none", id="nothing seen"),
]


def groups_inputs(
    sizes: list[int], seen: str, dtype: torch.dtype, width: int
) -> tuple[list[torch.Tensor], dict]:
    """A call with groups of these numbers of references, 4 keys each, and `seen` of them visible to the first row."""
    torch.manual_seed(0)
    blocks, groups, rows, queries = sum(sizes), len(sizes), 2, 70
    visible = torch.rand(rows, blocks) > 0.5
    visible[0] = {"all": True, "none": False, "one": False, "hole": True, "random": visible[0]}[seen]
    if seen in ("one", "hole"):
        visible[0, blocks // 2] = seen == "one"
    keys = [torch.randn(n, tokens, 2, width) for n, tokens in ((rows, 77), (1, 4 * blocks)) for _ in "kv"]
    tensors = [x.to(dtype) for x in (4 * torch.randn(rows, queries, 2, width), *keys)]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)]) * 4
    mask = torch.rand(1, groups, queries).to(dtype)
    options = {"tokens_per_ref": 4, "ref_offsets": offsets, "ref_visible": visible, "mask": mask}
    return [*tensors, torch.linspace(-1, 1, groups)], options


@pytest.mark.parametrize(("sizes", "seen"), GROUPS)
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float16, 64), (torch.bfloat16, 40), (torch.float32, 64)], ids=str
)
def test_short_groups_share_a_tile_and_long_ones_do_not(
    sizes: list[int], seen: str, dtype: torch.dtype, width: int, interpret: Interpreter
) -> None:
    """Which keys stand in which column of a shared tile, and where a tile is masked, depends on all of these."""
    tensors, options = groups_inputs(sizes, seen, dtype, width)
    assert_within(interpret("grca", tensors, options), *grca_oracle(tensors, options))


@pytest.mark.parametrize("case", GRCA_CASES, ids=name_of)
def test_composition_equals_the_definition(case: Case) -> None:
    tensors, options = grca_inputs(case)
    out = grca_composed(*tensors, **options, attend=attend.sdpa)
    assert_within(out, *grca_oracle(tensors, options))
    assert out.is_contiguous()


def test_reference_is_two_softmaxes_and_not_one() -> None:
    """The oracle itself, against the formula written out for one query, one head and one group."""
    q, kt, vt, kr, vr = (torch.randn(1, n, 1, 8, dtype=torch.float64) for n in (1, 5, 5, 4, 4))

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = [float(q[0, 0, 0] @ key) / 8**0.5 for key in k[0, :, 0]]
        exps = torch.tensor(scores, dtype=torch.float64).exp()
        return (exps[:, None] * v[0, :, 0]).sum(0) / exps.sum()

    out = grca_reference(q, kt, vt, kr, vr, torch.tensor(0.4, dtype=torch.float64))
    torch.testing.assert_close(
        out[0, 0, 0], attention(kt, vt) + 0.4 * attention(kr, vr), rtol=1e-13, atol=1e-13
    )


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the kernel runs in the interpreter here"
)
@pytest.mark.parametrize("case", [*GRCA_CASES, *large_matrix(2)], ids=name_of)
def test_kernel_on_the_gpu_is_as_exact_as_its_best_peer(case: Case) -> None:
    """Within the derived error, and within twice the error of the composition in the same type plus a rounding."""
    tensors, options = grca_inputs(case, "cuda")
    oracle, allowed = grca_oracle(tensors, options)
    out = grca(*tensors, **options)
    assert_within(out, oracle, allowed)
    peer = (grca_composed(*tensors, **options, attend=attend.sdpa).double() - oracle).abs().max()
    rounding = torch.finfo(out.dtype).eps * oracle.abs().max()
    assert (out.double() - oracle).abs().max() <= 2 * peer + rounding
