"""Risk: a kernel that is told which keys to read is told others than those that the flags show."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import Interpreter, assert_within, grca_oracle, start_interpreter
from torch import Tensor

from fastory.conditioning.references import Group, References
from fastory.kernels.grca import grca, visible_ranges

TOKENS = 4
# Groups of none, of one and of more pictures, which a frame sees all, none, some or all but one of.
SEEN = [[], [True], [False], [True, False, True, True], [False, True, False], [True] * 5]


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpreter]:
    yield from start_interpreter()


def by_definition(visible: Tensor, offsets: Tensor) -> Tensor:
    """Key by key."""
    found = []
    for row in visible.repeat_interleave(TOKENS, 1).tolist():
        for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            keys = [key for key in range(first, last) if row[key]]
            start, end = (keys[0], keys[-1] + 1) if keys else (0, 0)
            holes = [key for key in range(start, end) if not row[key]]
            found.append([start, end, *((holes[0], holes[-1] + 1) if holes else (0, 0))])
    return torch.tensor(found, dtype=torch.int32).view(len(visible), -1, 4)


def references(groups: list[list[bool]]) -> References:
    """Groups of which frame 0 sees these pictures."""
    made = [
        Group([torch.zeros(1, TOKENS, 8) for _ in seen], 0.5, lambda frame, n, seen=seen: seen[n])
        for seen in groups
    ]
    return References.of(
        made,
        lambda: torch.zeros(1, TOKENS, 8),
        lambda tokens: tokens,
        tokens_per_ref=TOKENS,
        like=torch.zeros(1, 7, 8),
    )


def test_ranges_are_where_the_flags_are() -> None:
    torch.manual_seed(0)
    for offsets in ([0, 40], [0, 0, 12, 12, 40], [0, 6, 9, 40]):  # a group may begin within a picture
        bounds = torch.tensor(offsets, dtype=torch.int32)
        visible = torch.rand(20, 10) > torch.rand(20, 1)
        found = visible_ranges(visible, bounds, TOKENS)
        assert found.dtype == torch.int32 and torch.equal(found, by_definition(visible, bounds))
    assert torch.equal(visible_ranges(visible, None, TOKENS), by_definition(visible, torch.tensor([0, 40])))
    assert not visible_ranges(visible[:, :0], None, TOKENS).any()


@pytest.mark.parametrize("groups", [[], [[True, True]], SEEN], ids=["none", "one", "several"])
def test_a_round_gives_the_ranges_of_its_rows(groups: list[list[bool]]) -> None:
    """Made of lists on the host, row by row, and written into the context as the flags are."""
    shared = references(groups)
    context = shared.context(2)
    context.put(0, shared.null_row(0, context.text_kv[:1]))
    context.put(1, shared.row(0, context.text_kv[:1]))
    assert context.ref_ranges is not None
    assert torch.equal(context.ref_ranges, visible_ranges(context.ref_visible, context.ref_offsets, TOKENS))
    last = context.last_rows(1)
    assert last.ref_ranges is not None and torch.equal(last.ref_ranges, context.ref_ranges[1:])
    for alone in (context.without_references(), context.without_references().never_empty()):
        assert alone.ref_ranges is not None and not alone.ref_ranges.any()
        assert len(alone.ref_ranges) == 2 and alone.ref_ranges.shape[1] == len(alone.scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_kernel_reads_the_ranges_that_it_is_given(dtype: torch.dtype, interpret: Interpreter) -> None:
    """Those of the flags, and with others other keys: nothing is looked for beside them."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, 8, 80, 160])
    tensors = [torch.randn(2, n, 1, 40) for n in (20, 7, 7)] + [torch.randn(1, 160, 1, 40) for _ in "kv"]
    tensors = [*(x.to(dtype) for x in tensors), torch.tensor([0.5, -0.3, 1.0])]
    visible = torch.rand(2, 40) > 0.4
    options = {"tokens_per_ref": TOKENS, "ref_offsets": offsets, "ref_visible": visible}
    ranges = visible_ranges(visible, offsets, TOKENS)
    given = interpret("grca", tensors, options | {"ref_ranges": ranges})
    assert torch.equal(given, interpret("grca", tensors, options))
    assert_within(given, *grca_oracle(tensors, options))
    # To read less is to see less: the flags of all that lies outside are off.
    ranges[:, 1, 1] = ranges[:, 1, 0] + 16
    fewer, block = visible.clone(), torch.arange(40)
    for row in range(2):
        fewer[row, (block >= int(ranges[row, 1, 1]) // TOKENS) & (block < 20)] = False
    less = interpret("grca", tensors, options | {"ref_ranges": ranges})
    assert_within(less, *grca_oracle(tensors, options | {"ref_visible": fewer}))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (torch.zeros(2, 2, 4, dtype=torch.int32), r"ref_ranges: wanted \(2, 1, 4\)"),
        (torch.zeros(2, 1, 4), "ref_ranges.dtype: wanted torch.int32"),
        (torch.zeros(2, 1, 4, dtype=torch.int32, device="meta"), "ref_ranges.device"),
    ],
    ids=["shape", "type", "device"],
)
def test_ranges_are_refused_by_name(ranges: Tensor, message: str) -> None:
    tensors = [torch.zeros(2, 4, 1, 8) for _ in range(5)]
    with pytest.raises(ValueError, match=message):
        grca(*tensors, torch.tensor(1.0), ref_visible=torch.ones(2, 1, dtype=torch.bool), ref_ranges=ranges)
    with pytest.raises(ValueError, match="ref_visible: wanted the flags"):
        grca(*tensors, torch.tensor(1.0), ref_ranges=torch.zeros(2, 1, 4, dtype=torch.int32))
