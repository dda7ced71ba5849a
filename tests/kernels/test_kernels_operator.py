"""Both operators are one node to torch.compile and torch.export, recompile for no value, and refuse by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastory.kernels.banded import banded_causal_attention, banded_causal_attention_reference
from fastory.kernels.grca import grca, grca_reference


def grca_call(
    rows: int = 4, queries: int = 6, text: int = 7, kept: int = 2, blocks: int = 4, groups: int = 2
) -> tuple[list[Tensor], dict[str, Any]]:
    q = torch.randn(rows, queries, 2, 8)
    keys = [torch.randn(n, tokens, 2, 8) for n, tokens in ((rows, text), (kept, 4 * blocks)) for _ in "kv"]
    return [q, *keys, torch.rand(groups)], {
        "ref_offsets": torch.tensor([0, *([4] * (groups - 1)), 4 * blocks]),
        "ref_visible": torch.rand(rows, blocks) > 0.3,
        "mask": torch.rand(1, groups, queries),
    }


def banded_call(rows: int = 2, queries: int = 6, keys: int = 9) -> tuple[list[Tensor], dict[str, Any]]:
    tensors = [torch.randn(rows, n, 2, 8) for n in (queries, keys, keys)]
    return tensors, {"group_size": 2, "window": 2, "key_padding": torch.rand(rows, keys) > 0.7, "prefix": 3}


CALLS = {"grca": (grca, grca_reference, grca_call)} | {
    "banded": (banded_causal_attention, banded_causal_attention_reference, banded_call)
}
both = pytest.mark.parametrize(("operator", "reference", "call"), CALLS.values(), ids=CALLS)


@both
def test_registration_passes_opcheck(operator: Callable, reference: Callable, call: Callable) -> None:
    """Schema, fake implementation, autograd and AOT dispatch with dynamic shapes."""
    tensors, options = call()
    tensors = [x.requires_grad_() for x in tensors]
    positional = {"grca": ("ref_offsets", "ref_visible", "mask")}
    if operator is grca:
        arguments = (*tensors, 4, *(options[name] for name in positional["grca"]))
    else:
        arguments = (*tensors, 2, 2, 0, None, options["key_padding"], 3)
    torch.library.opcheck(getattr(torch.ops.fastory, operator.__name__).default, arguments)


@both
def test_gradients_are_those_of_the_definition(
    operator: Callable, reference: Callable, call: Callable
) -> None:
    tensors, options = call()
    tensors = [x.double().requires_grad_() for x in tensors]
    options = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()
    }
    ours = torch.autograd.grad(operator(*tensors, **options).square().sum(), tensors)
    theirs = torch.autograd.grad(reference(*tensors, **options).square().sum(), tensors)
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_one, theirs_one, rtol=1e-10, atol=1e-11)


def test_gradient_is_finite_where_a_row_sees_nothing() -> None:
    tensors, options = grca_call()
    options["ref_visible"][0] = False
    tensors = [x.requires_grad_() for x in tensors]
    assert all(g.isfinite().all() for g in torch.autograd.grad(grca(*tensors, **options).sum(), tensors))
    tensors, options = banded_call()
    options["key_padding"][0] = True
    tensors = [x.requires_grad_() for x in tensors]
    out = banded_causal_attention(*tensors, **options)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), tensors))


@both
def test_export_holds_one_operator(operator: Callable, reference: Callable, call: Callable) -> None:
    class Layer(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return operator(*tensors, **options)

    tensors, options = call()
    exported = torch.export.export(Layer(), tuple(tensors))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == [f"fastory.{operator.__name__}.default"]
    torch.testing.assert_close(exported.module()(*tensors), operator(*tensors, **options))


class Graphs:
    """A backend that runs the graphs as they are and keeps what each computes on tensors; one entry a compilation."""

    def __init__(self) -> None:
        self.tensor_operators: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        self.tensor_operators.append([target for target in targets if target.startswith(("fastory", "aten"))])
        return graph.forward


def _sweep(call: Callable, changes: list[dict[str, int]]) -> list:
    return [call(**change) for change in changes]


def _mark(tensors: list[Tensor], options: dict[str, Any]) -> None:
    """Marks what varies between calls as dynamic, as the runtime does before it compiles the UNet."""
    for x in [*tensors, *options.values()]:
        if isinstance(x, Tensor):
            for dim, size in enumerate(x.shape[:2]):
                if size > 1:
                    torch._dynamo.maybe_mark_dynamic(x, dim)


def test_grca_compiles_once_over_scales_batches_and_references() -> None:
    """Scale, batch >= 2, text and reference keys, rows of references, visibility, mask: one graph."""
    graphs = Graphs()
    compiled = torch.compile(lambda t, o: grca(*t, **o), backend=graphs, fullgraph=True, dynamic=True)
    changes = [
        {},
        {"rows": 6, "kept": 3},
        {"blocks": 9},
        {"text": 12},
        {"queries": 10},
        {"rows": 8, "kept": 4},
    ]
    for tensors, options in _sweep(grca_call, changes):
        _mark(tensors, options)
        torch.testing.assert_close(compiled(tensors, options), grca(*tensors, **options))
    assert graphs.tensor_operators == [["fastory.grca.default"]]


def test_banded_compiles_once_over_windows_groups_and_batches() -> None:
    """Window, group size, query group, prefix, batch >= 2, keys: one graph."""
    graphs = Graphs()

    def layer(
        tensors: list[Tensor], padding: Tensor, window: int, size: int, group: int, prefix: int
    ) -> Tensor:
        return banded_causal_attention(
            *tensors, group_size=size, window=window, query_group=group, prefix=prefix, key_padding=padding
        )

    compiled = torch.compile(layer, backend=graphs, fullgraph=True, dynamic=True)
    for rows, keys, band in (
        (2, 9, (2, 3, 2, 3)),
        (3, 9, (5, 2, 3, 4)),
        (4, 12, (3, 4, 4, 2)),
        (2, 30, (4, 2, 5, 6)),
    ):
        tensors, options = banded_call(rows, 6, keys)
        _mark(tensors, options)
        torch.testing.assert_close(
            compiled(tensors, options["key_padding"], *band), layer(tensors, options["key_padding"], *band)
        )
    assert graphs.tensor_operators == [["fastory.banded_causal_attention.default"]]


@both
def test_compiled_training_step_has_the_same_gradients(
    operator: Callable, reference: Callable, call: Callable
) -> None:
    tensors, options = call()
    tensors = [x.requires_grad_() for x in tensors]
    compiled = torch.compile(lambda *t: operator(*t, **options), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        torch.autograd.grad(compiled(*tensors).sum(), tensors),
        torch.autograd.grad(operator(*tensors, **options).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)


def test_no_value_reaches_the_host() -> None:
    """On the meta device there are no values: whatever read one would raise."""
    for operator, _, call in CALLS.values():
        tensors, options = call()
        tensors = [x.to("meta") for x in tensors]
        options = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in options.items()}
        assert operator(*tensors, **options).shape == tensors[0].shape


def test_composition_reads_no_value_on_the_host() -> None:
    from fastory.kernels import attend
    from fastory.kernels.grca.composed import grca_composed

    tensors, options = grca_call()
    tensors = [x.to("meta") for x in tensors]
    options = {n: x.to("meta") for n, x in options.items()}
    out = grca_composed(*tensors, tokens_per_ref=4, **options, attend=attend.sdpa)
    assert out.shape == tensors[0].shape


def test_row_of_a_batch_has_the_bytes_it_has_elsewhere() -> None:
    """Frames of a micro-batch: any order, other neighbours, K and V as views of one wide tensor: equal bytes."""
    torch.manual_seed(0)
    for queries, heads, width, text, blocks in ((64, 2, 32, 24, 8), (16, 4, 32, 24, 8), (256, 1, 48, 77, 20)):
        channels = heads * width
        q = torch.randn(8, queries, heads, width)
        wide = torch.randn(8, text, 2 * channels + 24)
        refs = torch.randn(1, 4 * blocks, 2 * channels)
        seen = torch.rand(8, blocks) > 0.4
        k_ref, v_ref = (x.unflatten(-1, (heads, width)) for x in refs.chunk(2, -1))

        def run(q: Tensor, wide: Tensor, seen: Tensor, k_ref=k_ref, v_ref=v_ref) -> Tensor:
            channels, heads = q.shape[2] * q.shape[3], q.shape[2:]
            k = wide[..., 8 : 8 + channels].unflatten(-1, heads)
            v = wide[..., 8 + channels : 8 + 2 * channels].unflatten(-1, heads)
            return grca(q, k, v, k_ref, v_ref, torch.tensor(0.4), ref_visible=seen)

        out = run(q, wide, seen)
        for _ in range(5):
            order = torch.randint(0, 8, (8,))
            assert torch.equal(run(q[order], wide[order], seen[order]), out[order])


REFUSALS = [
    ({"q": torch.zeros(4, 6, 16)}, "q: wanted"),
    ({"q": torch.zeros(4, 6, 2, 8).half()}, "k_text.dtype: wanted torch.float16"),
    (
        {"k_text": torch.zeros(3, 7, 2, 8), "v_text": torch.zeros(3, 7, 2, 8)},
        "k_text rows: wanted 1 or 4, got 3",
    ),
    ({"v_text": torch.zeros(4, 8, 2, 8)}, "v_text: wanted"),
    ({"k_text": torch.zeros(4, 0, 2, 8), "v_text": torch.zeros(4, 0, 2, 8)}, "k_text: wanted at least one"),
    (
        {"k_ref": torch.zeros(3, 16, 2, 8), "v_ref": torch.zeros(3, 16, 2, 8)},
        "k_ref rows: wanted a divisor of 4",
    ),
    ({"k_ref": torch.zeros(2, 16, 1, 8)}, "k_ref: wanted"),
    ({"k_ref": torch.zeros(2, 16, 8, 2).mT}, r"k_ref.stride\(-1\): wanted 1"),
    ({"scale": torch.zeros(3)}, r"scale: wanted \(\), \(2,\) or \(4, 2\), got \(3,\)"),
    ({"scale": torch.zeros(2, dtype=torch.int64)}, "scale.dtype"),
    ({"ref_offsets": torch.zeros(3)}, "ref_offsets.dtype: wanted int32 or int64"),
    ({"ref_visible": torch.zeros(4, 3, dtype=torch.bool)}, r"ref_visible: wanted \(4, 4\), got \(4, 3\)"),
    ({"ref_visible": torch.zeros(4, 4)}, "ref_visible.dtype: wanted torch.bool"),
    ({"tokens_per_ref": 3}, "k_ref: wanted a multiple of tokens_per_ref=3"),
    ({"tokens_per_ref": 0}, "tokens_per_ref: wanted 1 or more, got 0"),
    ({"mask": torch.zeros(1, 1, 6)}, r"mask: wanted \(1 or 4, 2, 6\), got \(1, 1, 6\)"),
    ({"mask": torch.zeros(1, 2, 6, device="meta")}, "mask.device: wanted cpu"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[message for _, message in REFUSALS])
def test_grca_refuses_by_name(change: dict[str, Any], message: str) -> None:
    tensors, options = grca_call()
    names = ("q", "k_text", "v_text", "k_ref", "v_ref", "scale")
    with pytest.raises(ValueError, match=message):
        grca(**(dict(zip(names, tensors, strict=True)) | options | change))


BANDED_REFUSALS = [
    ({"q": torch.zeros(2, 6, 16)}, "q: wanted"),
    ({"k": torch.zeros(3, 9, 2, 8), "v": torch.zeros(3, 9, 2, 8)}, "k rows: wanted 1 or 2, got 3"),
    ({"v": torch.zeros(2, 8, 2, 8)}, "v: wanted"),
    ({"group_size": 0}, "group_size: wanted 1 or more"),
    ({"window": -1}, "window: wanted 0"),
    ({"query_group": -1}, "query_group: wanted 0 or more"),
    ({"query_group_size": -2}, "query_group_size: wanted None, 0 or"),
    ({"prefix": 10}, "prefix: wanted 0 .. 9"),
    ({"key_padding": torch.zeros(2, 8, dtype=torch.bool)}, r"key_padding: wanted \(2, 9\), got \(2, 8\)"),
    ({"key_padding": torch.zeros(2, 9)}, "key_padding.dtype: wanted torch.bool"),
]


@pytest.mark.parametrize(
    ("change", "message"), BANDED_REFUSALS, ids=[message for _, message in BANDED_REFUSALS]
)
def test_banded_refuses_by_name(change: dict[str, Any], message: str) -> None:
    tensors, options = banded_call()
    with pytest.raises(ValueError, match=message):
        banded_causal_attention(**(dict(zip("qkv", tensors, strict=True)) | options | change))
