"""Every body that a runtime may compute the operators with equals the definition, and gives zero where nothing is seen."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fastory.export.operators import (
    BANDED,
    BANDED_ATTRIBUTES,
    BANDED_INPUTS,
    BINDINGS,
    DOMAIN,
    EVERYTHING,
    GRCA,
    GRCA_INPUTS,
    MASKED_INPUTS,
    OPSET,
    bind,
    register_schemas,
)
from fastory.kernels.banded.reference import banded_causal_attention_reference
from fastory.kernels.grca.reference import grca_reference

runtime = pytest.importorskip("onnxruntime", reason="the bodies run on ONNX Runtime")
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}
ROWS, QUERIES, HEADS, WIDTH = 3, 10, 2, 8
# float32: sums of at most 100 products in another order, values near 1. Twice that for the sum over groups.
TOLERANCE = {torch.float32: 2 * 100 * 2.0**-24, torch.float16: 16 * 2.0**-11}


def one_node(name: str, inputs: dict[str, torch.Tensor], attributes: dict[str, int]) -> onnx.ModelProto:
    """A graph with the operator alone; every axis is dynamic."""
    register_schemas()
    given = [
        helper.make_tensor_value_info(key, TYPES[one.dtype], [f"{key}_{n}" for n in range(one.dim())])
        for key, one in inputs.items()
    ]
    kind = TYPES[inputs["q"].dtype]
    out = helper.make_tensor_value_info("out", kind, [f"out_{n}" for n in range(4)])
    node = helper.make_node(name, list(inputs), ["out"], domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "one", given, [out])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def as_runtime_takes_it(graph: onnx.ModelProto) -> None:
    """TRT_Attention is NVIDIA's; it computes what Attention does without scaling, with a mask that is broadcast."""
    for function in graph.functions:
        nodes = list(function.node)
        del function.node[:]
        for number, node in enumerate(nodes):
            if node.op_type == "TRT_Attention":
                node.op_type = "Attention"
                del node.attribute[:]
                node.attribute.append(helper.make_attribute("scale", 1.0))
                if len(node.input) == 4:
                    function.node.extend(spread(node, f"spread_{number}"))
            function.node.append(node)


def spread(node: onnx.NodeProto, name: str) -> list[onnx.NodeProto]:
    """Nodes that give `node` a mask of all its queries, as ONNX Runtime's CPU kernel wants it."""
    q, k, _, mask = node.input
    node.input[3] = f"{name}_mask"
    return [
        helper.make_node("Shape", [q], [f"{name}_rows"], start=0, end=1),
        helper.make_node("Constant", [], [f"{name}_one"], value_ints=[1]),
        helper.make_node("Shape", [q], [f"{name}_queries"], start=2, end=3),
        helper.make_node("Shape", [k], [f"{name}_keys"], start=2, end=3),
        helper.make_node(
            "Concat", [f"{name}_{part}" for part in ("rows", "one", "queries", "keys")], [name], axis=0
        ),
        helper.make_node("Expand", [mask, name], [f"{name}_mask"]),
    ]


def compute(
    binding: str, name: str, inputs: dict[str, torch.Tensor], attributes: dict[str, int], groups: int = 1
) -> torch.Tensor:
    graph = one_node(name, inputs, attributes)
    bind(graph, binding, groups, inputs["q"].dtype)
    as_runtime_takes_it(graph)
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {key: one.numpy() for key, one in inputs.items()})
    return torch.from_numpy(np.asarray(out))


def references(groups: int, blocks: int, text: int, kind: torch.dtype) -> dict[str, torch.Tensor]:
    """q and K, V of `blocks` references of two tokens; row 0 sees none of them."""
    generator = torch.Generator().manual_seed(groups * 100 + blocks)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(kind)

    visible = torch.rand(ROWS, blocks, generator=generator) < 0.6
    visible[0], visible[1] = False, True
    cuts = torch.linspace(0, blocks, groups + 1).round().int() * 2
    return {
        "q": normal(ROWS, QUERIES, HEADS, WIDTH),
        "k_text": normal(ROWS, text, HEADS, WIDTH),
        "v_text": normal(ROWS, text, HEADS, WIDTH),
        "k_ref": normal(1, 2 * blocks, HEADS, WIDTH),
        "v_ref": normal(1, 2 * blocks, HEADS, WIDTH),
        "scale": torch.linspace(0.3, 0.9, groups),
        "ref_offsets": cuts,
        "ref_visible": visible,
    }


def wide(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: one.double() if one.is_floating_point() else one for key, one in inputs.items()}


@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize(("groups", "blocks", "text"), [(1, 1, 5), (1, 9, 7), (3, 7, 1), (4, 2, 5)])
def test_a_body_of_grca_equals_the_definition(
    binding: str, groups: int, blocks: int, text: int, kind: torch.dtype
) -> None:
    inputs = references(groups, blocks, text, kind)
    assert tuple(inputs) == GRCA_INPUTS
    exact = wide(inputs)
    expected = grca_reference(
        *(exact[name] for name in GRCA_INPUTS[:6]),
        tokens_per_ref=2,
        ref_offsets=exact["ref_offsets"],
        ref_visible=exact["ref_visible"],
    )
    got = compute(binding, GRCA, inputs, {"tokens_per_ref": 2}, groups)
    assert got.dtype == kind
    assert (got.double() - expected).abs().max() <= TOLERANCE[kind]


@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("binding", BINDINGS)
def test_a_masked_body_of_grca_equals_the_definition(binding: str, kind: torch.dtype) -> None:
    """Fractions, a group that reaches nothing, one without a reference, and masks of ones that change nothing."""
    inputs = references(4, 7, 5, kind)
    inputs["ref_offsets"][3] = inputs["ref_offsets"][4]  # the last group is empty
    mask = torch.rand(ROWS, 4, QUERIES, generator=torch.Generator().manual_seed(5))
    mask[1, 0], mask[2, 1] = 0, 1
    masked = {**inputs, "mask": mask}
    assert tuple(masked) == MASKED_INPUTS
    exact = wide(masked)
    expected = grca_reference(
        *(exact[name] for name in GRCA_INPUTS[:6]),
        tokens_per_ref=2,
        ref_offsets=exact["ref_offsets"],
        ref_visible=exact["ref_visible"],
        mask=exact["mask"],
    )
    got = compute(binding, GRCA, masked, {"tokens_per_ref": 2}, 4)
    assert got.dtype == kind
    assert (got.double() - expected).abs().max() <= TOLERANCE[kind]
    ones = compute(binding, GRCA, {**inputs, "mask": torch.ones_like(mask)}, {"tokens_per_ref": 2}, 4)
    assert torch.equal(ones, compute(binding, GRCA, inputs, {"tokens_per_ref": 2}, 4))


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_row_that_sees_no_reference_is_its_text_alone(binding: str) -> None:
    """Exactly: the references' K and V may hold anything, infinities included, and their sum is zero."""
    inputs = references(2, 6, 5, torch.float32)
    inputs["ref_visible"][:] = False
    spoiled = dict(inputs, v_ref=torch.full_like(inputs["v_ref"], 1e30))
    first, second = (compute(binding, GRCA, one, {"tokens_per_ref": 2}, 2) for one in (inputs, spoiled))
    assert torch.equal(first, second)


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize(
    "band",
    [
        {"group_size": 4, "window": 2, "query_group": 0, "query_group_size": 4, "prefix": 0},
        {"group_size": 4, "window": EVERYTHING, "query_group": 1, "query_group_size": 5, "prefix": 3},
        {"group_size": 3, "window": 1, "query_group": 4, "query_group_size": EVERYTHING, "prefix": 2},
        {"group_size": 1, "window": EVERYTHING, "query_group": 2**30, "query_group_size": 1, "prefix": 0},
    ],
    ids=["band", "prefix", "one-group", "all-past"],
)
def test_a_body_of_the_band_equals_the_definition(binding: str, band: dict[str, int]) -> None:
    assert tuple(band) == BANDED_ATTRIBUTES
    generator = torch.Generator().manual_seed(7)
    keys = band["prefix"] + 20
    padding = torch.rand(ROWS, keys, generator=generator) < 0.3
    padding[0] = True
    shapes = {"q": QUERIES, "k": keys, "v": keys}
    inputs = {name: torch.randn(ROWS, n, HEADS, WIDTH, generator=generator) for name, n in shapes.items()}
    inputs["key_padding"] = padding
    assert tuple(inputs) == BANDED_INPUTS
    exact = wide(inputs)
    meant = dict(band, window=0 if band["window"] == EVERYTHING else band["window"])
    if band["query_group_size"] == EVERYTHING:
        meant["query_group_size"] = 0
    expected = banded_causal_attention_reference(
        exact["q"], exact["k"], exact["v"], **meant, key_padding=padding
    )
    got = compute(binding, BANDED, inputs, band)
    assert (got.double() - expected).abs().max() <= TOLERANCE[torch.float32]
    assert torch.equal(got[0], torch.zeros_like(got[0]))
