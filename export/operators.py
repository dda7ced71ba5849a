"""The two operators as ONNX nodes, and the bodies with which a runtime computes them.

In a graph every call of fastory::grca or fastory::banded_causal_attention is one opaque node. What a runtime makes of
it is a model-local function, bound afterwards in the small graph file alone:

ort       opset-23 Attention, for ONNX Runtime
portable  MatMul and Softmax, for any runtime
trt       TRT_Attention of NVIDIA's parser, for TensorRT

A function cannot loop over a number that is known only at run time: the number of groups is fixed at export and the
body repeated as often. How many references there are, their weights and who sees which stay inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import defs, parser
from onnxscript import values

from fastory import files
from fastory.export.choices import BINDINGS

DOMAIN, VERSION, OPSET = "fastory", 1, 23
GRCA, BANDED = "grca", "banded_causal_attention"
EVERYTHING = 2**40  # frames of a window without limit, and queries of a group that holds them all

GRCA_INPUTS = ("q", "k_text", "v_text", "k_ref", "v_ref", "scale", "ref_offsets", "ref_visible")
MASKED_INPUTS = (*GRCA_INPUTS, "mask")  # of a UNet whose groups reach a part of the picture
BANDED_INPUTS = ("q", "k", "v", "key_padding")
BANDED_ATTRIBUTES = ("group_size", "window", "query_group", "query_group_size", "prefix")
_TYPES = {
    "scale": "tensor(float)",
    "ref_offsets": "tensor(int32)",
    "ref_visible": "tensor(bool)",
    "key_padding": "tensor(bool)",
    "mask": "tensor(float)",
}
_ONNX_TYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


def register_schemas() -> None:
    """Tell onnx the signatures of both operators; the exporter refuses a node that has none."""
    for name, inputs, attributes in (
        (GRCA, MASKED_INPUTS, ("tokens_per_ref",)),
        (BANDED, BANDED_INPUTS, BANDED_ATTRIBUTES),
    ):
        if defs.has(name, DOMAIN):
            continue
        formal, integer = defs.OpSchema.FormalParameter, defs.OpSchema.AttrType.INT
        option = defs.OpSchema.FormalParameterOption
        floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
        schema = defs.OpSchema(
            name,
            DOMAIN,
            VERSION,
            "",
            inputs=[
                formal(
                    name,
                    _TYPES.get(name, "T"),
                    param_option=option.Optional if name == "mask" else option.Single,
                )
                for name in inputs
            ],
            outputs=[formal("out", "T")],
            type_constraints=[("T", floats, "")],
            attributes=[defs.OpSchema.Attribute(name, integer, "", required=True) for name in attributes],
        )
        defs.register_schema(schema)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch operator -> what the exporter calls to make its node (custom_translation_table)."""
    register_schemas()
    opset: Any = values.Opset(DOMAIN, VERSION)

    def grca(
        q, k_text, v_text, k_ref, v_ref, scale, tokens_per_ref, ref_offsets, ref_visible, mask,
        ref_ranges=None, backend=None,
    ):  # fmt: skip  # symbolic tensors; the body of a graph reads the flags
        if ref_offsets is None or ref_visible is None:
            raise ValueError("grca is exported with ref_offsets and ref_visible")
        inputs = (q, k_text, v_text, k_ref, v_ref, scale, ref_offsets, ref_visible)
        where = () if mask is None else (mask,)
        return opset.grca(*inputs, *where, tokens_per_ref=tokens_per_ref)

    def banded(
        q, k, v, group_size, window, query_group, query_group_size, key_padding, prefix, backend=None
    ):  # symbolic tensors
        if key_padding is None:
            raise ValueError("banded_causal_attention is exported with key_padding")
        size = group_size if query_group_size is None else query_group_size
        return opset.banded_causal_attention(
            *(q, k, v, key_padding),
            group_size=group_size,
            window=window or EVERYTHING,
            query_group=query_group,
            query_group_size=size or EVERYTHING,
            prefix=prefix,
        )

    operators = torch.ops.fastory
    return {operators.grca.default: grca, operators.banded_causal_attention.default: banded}


def bind(graph: onnx.ModelProto, binding: str, groups: int, dtype: torch.dtype) -> None:
    """Give the opaque nodes of `graph` their bodies, in place of what is bound. groups: G of the grca nodes."""
    if binding not in BINDINGS:
        raise ValueError(f"binding: wanted one of {', '.join(BINDINGS)}, got {binding!r}")
    del graph.functions[:]
    _mark_decomposable(graph, binding == "trt")
    nodes = [node for node in graph.graph.node if node.domain == DOMAIN]
    used = {node.op_type for node in nodes}
    if GRCA in used:
        calls = [node for node in nodes if node.op_type == GRCA]
        (tokens_per_ref,) = {attribute.i for node in calls for attribute in node.attribute}
        (inputs,) = {len(node.input) for node in calls}
        masked = inputs == len(MASKED_INPUTS)
        graph.functions.append(_parsed(grca_body(binding, groups, tokens_per_ref, dtype, masked)))
    if BANDED in used:
        graph.functions.append(_parsed(banded_body(binding, dtype)))


def _mark_decomposable(graph: onnx.ModelProto, decomposable: bool) -> None:
    """Let NVIDIA's builder take the Attention nodes apart, as it must in float32; nobody else knows the attribute."""
    name = "TRT_decomposable"
    for node in graph.graph.node:
        if node.op_type != "Attention" or node.domain:
            continue
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if decomposable:
            node.attribute.append(onnx.helper.make_attribute(name, 1))


def bind_file(path: Path, target: Path, binding: str, groups: int, dtype: torch.dtype) -> None:
    """`bind` from one graph file to another, or the same; the weights beside it are neither read nor written."""
    files.write(target, bound_bytes(path, binding, groups, dtype))


def bound_bytes(path: Path, binding: str, groups: int, dtype: torch.dtype) -> bytes:
    """A graph file as it is with other bodies."""
    graph = onnx.load(path, load_external_data=False)
    bind(graph, binding, groups, dtype)
    return bytes(graph.SerializeToString())


def bound(graph: onnx.ModelProto) -> set[str]:
    """Operators of a graph that have a body."""
    return {function.name for function in graph.functions if function.domain == DOMAIN}


def _parsed(text: str) -> onnx.FunctionProto:
    return parser.parse_function(text)


def grca_body(
    binding: str, groups: int, tokens_per_ref: int, dtype: torch.dtype, masked: bool = False
) -> str:
    """O = softmax(Q Kt' / sqrt d) Vt + sum_g scale_g mask_g softmax(Q Kg' / sqrt d) Vg (Story-Adapter, GRCA, grouped).

    q (B, L, H, d); k_text, v_text (B, Lt, H, d); k_ref, v_ref (1, Lr, H, d); scale (G,); ref_offsets (G + 1,);
    ref_visible (B, Lr / T); mask (B, G, L) where `masked`, else none. A group of which a row sees nothing adds exactly zero,
    whatever a runtime's softmax says.
    """
    kind = _ONNX_TYPES[dtype]
    lines = [
        *_heads("q", "k_text", "v_text", "k_ref", "v_ref"),
        *_attend(binding, "text", "q_h", "k_text_h", "v_text_h", None, dtype),
        "batch = Shape <start = 0, end = 1> (q)",
        "ones = Constant <value_ints = [1, 1, 1]> ()",
        "spread = Concat <axis = 0> (batch, ones)",
        "k_all = Expand (k_ref_h, spread)",
        "v_all = Expand (v_ref_h, spread)",
        "two = Constant <value_ints = [2]> ()",
        "blocks = Unsqueeze (ref_visible, two)",
        f"each = Constant <value_ints = [1, 1, {tokens_per_ref}]> ()",
        "repeated = Expand (blocks, each)",
        "flat = Constant <value_ints = [0, -1]> ()",
        "seen = Reshape (repeated, flat)",
        "count = Shape <start = 1, end = 2> (k_ref)",
        *_range("key", "count"),
        "bounds = Cast <to = 7> (ref_offsets)",
        f"weights = Cast <to = {onnx.TensorProto.DataType.Value(kind)}> (scale)",
        "zero = CastLike (zero_float, q)",
    ]
    lines.insert(0, "zero_float = Constant <value_float = 0.0> ()")
    total = "text"
    for g in range(groups):
        lines += [
            f"at_{g} = Constant <value_int = {g}> ()",
            f"after_{g} = Constant <value_int = {g + 1}> ()",
            f"low_{g} = Gather (bounds, at_{g})",
            f"high_{g} = Gather (bounds, after_{g})",
            f"from_{g} = GreaterOrEqual (key, low_{g})",
            f"until_{g} = Less (key, high_{g})",
            f"in_{g} = And (from_{g}, until_{g})",
            f"row_{g} = And (in_{g}, seen)",
            f"middle_{g} = Constant <value_ints = [1, 2]> ()",
            f"visible_{g} = Unsqueeze (row_{g}, middle_{g})",
            *_any(f"some_{g}", f"visible_{g}"),
            *_attend(
                *(binding, f"group_{g}", "q_h", "k_all", "v_all", f"visible_{g}", dtype),
                share=0.5 * g / (g + 1),  # all different, and none is the text's
            ),
            f"shown_{g} = Where (some_{g}, group_{g}, zero)",
            *_weight(g, masked),
            f"weighted_{g} = Mul (shown_{g}, weight_{g})",
            f"total_{g} = Add ({total}, weighted_{g})",
        ]
        total = f"total_{g}"
    lines.append(f"out = Transpose <perm = [0, 2, 1, 3]> ({total})")
    return _function(GRCA, ("tokens_per_ref",), MASKED_INPUTS if masked else GRCA_INPUTS, lines)


def _weight(g: int, masked: bool) -> list[str]:
    """The weight of group g: one number, or one of every query, (B, 1, L, 1)."""
    if not masked:
        return [f"weight_{g} = Gather (weights, at_{g})"]
    return [
        f"number_{g} = Gather (weights, at_{g})",
        f"part_{g} = Gather <axis = 1> (mask, at_{g})",
        f"around_{g} = Constant <value_ints = [1, 3]> ()",
        f"reached_{g} = Unsqueeze (part_{g}, around_{g})",
        f"place_{g} = CastLike (reached_{g}, q)",
        f"weight_{g} = Mul (place_{g}, number_{g})",
    ]


def banded_body(binding: str, dtype: torch.dtype) -> str:
    """O = softmax(Q K' / sqrt d + M) V, M 0 for group(i) - window < group(j) <= group(i) (Causal-Story, eq. 3), else -inf.

    q (B, Lq, H, d); k, v (B, Lk, H, d); key_padding (B, Lk). A query that sees nothing gives exactly zero.
    """
    numbers = [f"{name} = Constant <value_int : int = @{name}> ()" for name in BANDED_ATTRIBUTES]
    lines = [
        *_heads("q", "k", "v"),
        *numbers,
        "queries = Shape <start = 1, end = 2> (q)",
        *_range("query", "queries"),
        "behind = Div (query, query_group_size)",
        "group_flat = Add (query_group, behind)",
        "last = Constant <value_ints = [1]> ()",
        "group = Unsqueeze (group_flat, last)",
        "count = Shape <start = 1, end = 2> (k)",
        *_range("key", "count"),
        "after_prefix = Sub (key, prefix)",
        "key_group = Div (after_prefix, group_size)",
        "past = LessOrEqual (key_group, group)",
        "before = Sub (group, window)",
        "recent = Greater (key_group, before)",
        "band = And (past, recent)",
        "leading = Less (key, prefix)",
        "allowed = Or (band, leading)",
        "word = Not (key_padding)",
        "middle = Constant <value_ints = [1, 2]> ()",
        "words = Unsqueeze (word, middle)",
        "visible = And (words, allowed)",
        *_any("some", "visible"),
        *_attend(binding, "seen", "q_h", "k_h", "v_h", "visible", dtype),
        "zero_float = Constant <value_float = 0.0> ()",
        "zero = CastLike (zero_float, q)",
        "shown = Where (some, seen, zero)",
        "out = Transpose <perm = [0, 2, 1, 3]> (shown)",
    ]
    return _function(BANDED, BANDED_ATTRIBUTES, BANDED_INPUTS, lines)


def _heads(*names: str) -> list[str]:
    """(B, L, H, d) -> (B, H, L, d)."""
    return [f"{name}_h = Transpose <perm = [0, 2, 1, 3]> ({name})" for name in names]


def _range(name: str, count: str) -> list[str]:
    """0, 1, .. below `count`, an int64 tensor (1,)."""
    return [
        f"{name}_axis = Constant <value_ints = [0]> ()",
        f"{name}_end = Squeeze ({count}, {name}_axis)",
        f"{name}_start = Constant <value_int = 0> ()",
        f"{name}_step = Constant <value_int = 1> ()",
        f"{name} = Range ({name}_start, {name}_end, {name}_step)",
    ]


def _any(name: str, visible: str) -> list[str]:
    """Whether a query sees a key at all: (.., keys) -> (.., 1)."""
    return [
        f"{name}_number = Cast <to = 1> ({visible})",
        f"{name}_axis = Constant <value_ints = [-1]> ()",
        f"{name}_most = ReduceMax <keepdims = 1> ({name}_number, {name}_axis)",
        f"{name} = Cast <to = 9> ({name}_most)",
    ]


def _attend(
    binding: str,
    out: str,
    q: str,
    k: str,
    v: str,
    visible: str | None,
    dtype: torch.dtype,
    share: float = 0.5,
) -> list[str]:
    """softmax(q k' / sqrt d) v over (B, H, L, d); visible (B, 1, L or 1, keys) bool, None for all. share: see _trt."""
    if binding == "portable":
        return _composed(out, q, k, v, visible, dtype)
    if binding == "trt":
        return _trt(out, q, k, v, visible, share)
    if visible is None:
        return [f"{out} = Attention ({q}, {k}, {v})"]
    return [
        # ONNX Runtime's CPU kernel reads a mask of all queries, without broadcasting.
        f"{out}_rows = Shape <start = 0, end = 1> ({q})",
        f"{out}_one = Constant <value_ints = [1]> ()",
        f"{out}_queries = Shape <start = 2, end = 3> ({q})",
        f"{out}_keys = Shape <start = 2, end = 3> ({k})",
        f"{out}_shape = Concat <axis = 0> ({out}_rows, {out}_one, {out}_queries, {out}_keys)",
        f"{out}_mask = Expand ({visible}, {out}_shape)",
        f"{out} = Attention ({q}, {k}, {v}, {out}_mask)",
    ]


def _scaled(out: str, q: str) -> list[str]:
    """q / sqrt d."""
    return [
        f"{out}_width = Shape <start = 3, end = 4> ({q})",
        f"{out}_like = CastLike ({out}_width, {q})",
        f"{out}_root = Sqrt ({out}_like)",
        f"{out}_q = Div ({q}, {out}_root)",
    ]


def _composed(out: str, q: str, k: str, v: str, visible: str | None, dtype: torch.dtype) -> list[str]:
    lines = [
        *_scaled(out, q),
        f"{out}_k = Transpose <perm = [0, 1, 3, 2]> ({k})",
        f"{out}_scores = MatMul ({out}_q, {out}_k)",
    ]
    scores = f"{out}_scores"
    if visible is not None:
        # Finite, so that a row that sees nothing is a number; the caller puts a zero there.
        lowest = -3.0e38 if dtype != torch.float16 else -65504.0
        lines += [
            f"{out}_hidden_float = Constant <value_float = {lowest}> ()",
            f"{out}_hidden = CastLike ({out}_hidden_float, {q})",
            f"{out}_masked = Where ({visible}, {out}_scores, {out}_hidden)",
        ]
        scores = f"{out}_masked"
    return [
        *lines,
        f"{out}_share = Softmax <axis = -1> ({scores})",
        f"{out} = MatMul ({out}_share, {v})",
    ]


def _trt(out: str, q: str, k: str, v: str, visible: str | None, share: float) -> list[str]:
    """NVIDIA's own operator: it does not scale, and its mask (True: sees) is broadcast over heads and queries.

    share: q is multiplied by d^-share and k by the rest of 1 / sqrt d. Attentions of one q have different shares: NVIDIA's
    builder (RTX 1.7) crashes where two of them read that q times the same constant. Decomposable: float32 has no fused
    kernel. A product, softmax and product in its place build as well, but in float16 and bfloat16 this is the fused kernel.
    """
    mask = "" if visible is None else f", {visible}"
    return [
        f"{out}_width = Shape <start = 3, end = 4> ({q})",
        f"{out}_size = Cast <to = 1> ({out}_width)",
        *_power(f"{out}_q", q, f"{out}_size", -share),
        *_power(f"{out}_k", k, f"{out}_size", share - 0.5),
        f"{out} = TRT_Attention <TRT_decomposable = 1> ({out}_q, {out}_k, {v}{mask})",
    ]


def _power(out: str, of: str, size: str, exponent: float) -> list[str]:
    """of * size ^ exponent; the power in float32."""
    return [
        f"{out}_exponent = Constant <value_float = {exponent}> ()",
        f"{out}_power = Pow ({size}, {out}_exponent)",
        f"{out}_factor = CastLike ({out}_power, {of})",
        f"{out} = Mul ({of}, {out}_factor)",
    ]


def _function(name: str, attributes: tuple[str, ...], inputs: tuple[str, ...], lines: list[str]) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">\n'
        f"{name} <{', '.join(attributes)}> ({', '.join(inputs)}) => (out) {{\n{body}\n}}"
    )


def opaque_nodes(graph: onnx.ModelProto) -> Mapping[str, int]:
    """How many nodes of each operator a graph has."""
    counts: dict[str, int] = {}
    for node in graph.graph.node:
        if node.domain == DOMAIN:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
