"""Scale, number of references and visibility are inputs of one graph, which is bound anew without touching its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
import torch

from fastory import StoryModel
from fastory.export.choices import Groups
from fastory.export.component import Component
from fastory.export.graphs import components
from fastory.export.onnx import Compared, Finished, Rebound, export_onnx
from fastory.export.operators import BANDED, GRCA, opaque_nodes
from fastory.models.export_folder import ExportFolder
from fastory.models.onnx_session import OrtSession

# Of 7 cross-attention layers and the convolutions between them, in float32; parity measures 4e-6 of values near 4.
CLOSE = 2e-5


@pytest.fixture(scope="module")
def model(causal_builtin_folder: Path) -> StoryModel:
    return StoryModel.open(str(causal_builtin_folder), device="cpu", dtype="float32")


def component(model: StoryModel, name: str) -> Component:
    return next(one for one in components(model, Groups(2)) if one.name == name)


def inputs(
    unet: Component, references: int, scale: float, seen: bool, seed: int = 3
) -> dict[str, torch.Tensor]:
    made = unet.sample({**unet.checks[1], "references": references}, seed)
    made["scale"] = torch.tensor([scale, 0.0])
    made["ref_visible"] = torch.full_like(made["ref_visible"], seen)
    return made


def test_one_session_takes_any_scale_and_number_of_references(model: StoryModel, export_folder: Path) -> None:
    unet, session = component(model, "unet"), OrtSession(export_folder / "unet.onnx")
    outputs = []
    for references, scale in ((1, 0.3), (7, 0.5), (100, 0.5), (7, 0.0), (7, -0.4)):
        given = inputs(unet, references, scale, seen=True)
        with torch.no_grad():
            expected = unet.module(*given.values())
        (got,) = session.run(given).values()
        assert (got - expected).abs().max() <= CLOSE
        outputs.append(got)
    assert (outputs[1] - outputs[3]).abs().max() > 100 * CLOSE  # the scale is not baked in
    assert (outputs[1] - outputs[4]).abs().max() > 100 * CLOSE


def test_what_nobody_sees_does_not_matter(model: StoryModel, export_folder: Path) -> None:
    unet, session = component(model, "unet"), OrtSession(export_folder / "unet.onnx")
    (first,) = session.run(inputs(unet, 5, 0.5, seen=False)).values()
    given = inputs(unet, 5, 0.5, seen=False)
    given["ref_kv"] *= 1000.0
    (second,) = session.run(given).values()
    assert torch.equal(first, second)


def test_every_layer_is_one_node(model: StoryModel, export_folder: Path) -> None:
    layers = len(model.layers.layers)
    for name, operator in (("unet", GRCA), ("unet_causal", BANDED)):
        graph = onnx.load(export_folder / f"{name}.onnx", load_external_data=False)
        assert opaque_nodes(graph) == {operator: layers}
        assert [function.name for function in graph.functions] == [operator]


def test_binding_anew_leaves_the_weights_alone(
    model: StoryModel, export_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "engines"
    shutil.copytree(export_folder, folder)
    weights = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.onnx.data")}
    before = (folder / "unet.onnx").read_bytes()
    events = list(export_onnx(model, folder, groups=2, binding="portable"))
    assert events == [Rebound("portable"), Finished(folder)]
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*.onnx.data")} == weights
    assert (folder / "unet.onnx").read_bytes() != before
    given = inputs(component(model, "unet"), 7, 0.5, seen=True)
    (own,) = OrtSession(export_folder / "unet.onnx").run(given).values()
    (other,) = OrtSession(folder / "unet.onnx").run(given).values()
    assert (own - other).abs().max() <= CLOSE
    assert list(export_onnx(model, folder, groups=2, binding="portable")) == [Finished(folder)]


@pytest.mark.slow
def test_an_export_for_tensorrt_is_compared_before_it_is_bound(tmp_path: Path) -> None:
    """TensorRT's operator does not run here: the comparison must be made with bodies that do."""
    folder = tmp_path / "engines"
    model = StoryModel.open(device="cpu", dtype="float32")
    events = list(export_onnx(model, folder, binding="trt"))
    assert any(isinstance(one, Compared) and one.worst is not None for one in events)
    graph = onnx.load(folder / "unet.onnx", load_external_data=False)
    assert any(node.op_type == "TRT_Attention" for function in graph.functions for node in function.node)
    ExportFolder.open(folder)  # the hashes are those of the graphs as they are now
