"""An exported folder with one small UNet-like component, written by hand in a second: one grca node between two products."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="an export is ONNX graphs")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

HEADS, WIDTH, TOKENS = 4, 8, 4
CHANNELS = HEADS * WIDTH


def write_export(folder: Path, dtype: str = "float16", groups: int = 1, masked: bool = False) -> Path:
    """unet.onnx with unet.onnx.data and fastory.json. sample (batch, 32, 4*height, 4*width), text_kv (batch, text, 64),
    ref_kv (1, 4*references, 64), ref_visible, ref_offsets, scale, where `masked` mask_1 (batch, groups, 4*height, 4*width)
    -> prediction (batch, pixels, 4, 8)."""
    from fastory.export.operators import bind_file

    folder.mkdir(parents=True)
    graph = folder / "unet.onnx"
    onnx.save_model(
        _graph(dtype, groups, masked),
        graph,
        save_as_external_data=True,
        location="unet.onnx.data",
        size_threshold=0,
    )
    bind_file(graph, graph, "ort", groups, getattr(torch, dtype))
    files = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("unet.onnx", "unet.onnx.data")
    }
    manifest = {
        "schema": 1,
        "dtype": dtype,
        "groups": groups,
        "binding": "ort",
        "size_factor": 32,
        "vae_factor": 8,
        "files": files,
        "components": {"unet": _described(dtype, groups, masked)},
    }
    (folder / "fastory.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def _described(dtype: str, groups: int, masked: bool) -> dict[str, Any]:
    shapes = _shapes(groups, masked)
    types = {"ref_visible": "bool", "ref_offsets": "int32", "scale": "float32", "mask_1": "float32"}
    return {
        "file": "unet.onnx",
        "data": "unet.onnx.data",
        "inputs": {name: {"dtype": types.get(name, dtype), "shape": shape} for name, shape in shapes.items()},
        "outputs": {"prediction": {"dtype": dtype, "shape": ["batch", "pixels", HEADS, WIDTH]}},
        "ranges": {
            "batch": [1, 63],
            "height": [1, 64],
            "width": [1, 64],
            "text": [1, 1024],
            "references": [1, 4096],
        },
        "hot": {"batch": 8, "height": 4, "width": 4, "text": 40, "references": 9},
    }


def _shapes(groups: int, masked: bool) -> dict[str, list[int | str]]:
    shapes: dict[str, list[int | str]] = {
        "sample": ["batch", CHANNELS, "4*height", "4*width"],
        "text_kv": ["batch", "text", 2 * CHANNELS],
        "ref_kv": [1, f"{TOKENS}*references", 2 * CHANNELS],
        "ref_visible": ["batch", "references"],
        "ref_offsets": [groups + 1],
        "scale": [groups],
    }
    return shapes | ({"mask_1": ["batch", groups, "4*height", "4*width"]} if masked else {})


def _graph(dtype: str, groups: int, masked: bool) -> Any:
    kind = getattr(TensorProto, {"float32": "FLOAT", "float16": "FLOAT16"}[dtype])
    types = {"ref_visible": TensorProto.BOOL, "ref_offsets": TensorProto.INT32}
    types |= dict.fromkeys(("scale", "mask_1"), TensorProto.FLOAT)
    inputs = [
        helper.make_tensor_value_info(name, types.get(name, kind), shape)
        for name, shape in _shapes(groups, masked).items()
    ]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((CHANNELS, CHANNELS), generator=generator).to(getattr(torch, dtype))
    constants = {
        "weight": weight.numpy(),
        "rows": torch.tensor([0, CHANNELS, -1]).numpy(),
        "heads": torch.tensor([0, -1, HEADS, WIDTH]).numpy(),
        "flat_mask": torch.tensor([0, 0, -1]).numpy(),
        "halves": torch.tensor([CHANNELS, CHANNELS]).numpy(),
    }
    make = helper.make_node
    nodes = [
        make("Reshape", ["sample", "rows"], ["flat"]),
        make("Transpose", ["flat"], ["pixels"], perm=[0, 2, 1]),
        make("MatMul", ["pixels", "weight"], ["query"]),
        make("Reshape", ["query", "heads"], ["q"]),
    ]
    for kv in ("text", "ref"):
        nodes.append(make("Split", [f"{kv}_kv", "halves"], [f"{kv}_k", f"{kv}_v"], axis=-1))
        nodes += [make("Reshape", [f"{kv}_{one}", "heads"], [f"{one}_{kv}"]) for one in ("k", "v")]
    called = ["q", "k_text", "v_text", "k_ref", "v_ref", "scale", "ref_offsets", "ref_visible"]
    if masked:
        nodes.append(make("Reshape", ["mask_1", "flat_mask"], ["mask"]))
        called.append("mask")
    nodes.append(make("grca", called, ["prediction"], domain="fastory", tokens_per_ref=TOKENS))
    output = helper.make_tensor_value_info("prediction", kind, ["batch", "length", HEADS, WIDTH])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "unet", inputs, [output], tensors)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("fastory", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
