"""Half types export as well: float16 is measured against float64, bfloat16 through the same weights in float32, and says so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from fastory import Story, StoryModel, generate
from fastory.events import FrameDrawn
from fastory.export.onnx import Compared, export_onnx
from fastory.models.engine_model import EngineModel

STORY = Story.from_captions(["A fox is jumping in the forest"])
pytest.importorskip("onnxruntime", reason="exported graphs run on ONNX Runtime")


def exported(dtype: str, folder: Path) -> tuple[list[object], dict]:
    model = StoryModel.open(device="cpu", dtype=dtype, distilled="lcm-lora")
    events = list(export_onnx(model, folder))
    return events, json.loads((folder / "fastory.json").read_text())


def types_of(folder: Path, component: str) -> set[int]:
    """Element types of the floating weights of a graph; the few frequencies of the timestep stay float32, as in torch."""
    graph = onnx.load(folder / f"{component}.onnx", load_external_data=False)
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
    return {one.data_type for one in graph.graph.initializer if math.prod(one.dims) >= 1000} & floats


@pytest.mark.slow
def test_float16_is_measured_and_draws(tmp_path: Path) -> None:
    events, manifest = exported("float16", tmp_path / "half")
    compared = next(one for one in events if isinstance(one, Compared))
    assert compared.worst is not None
    assert compared.worst.good
    assert {one["component"] for one in manifest["parity"]["measured"]} == set(manifest["components"])
    assert types_of(tmp_path / "half", "unet") == {TensorProto.FLOAT16}
    engine = EngineModel.open_engine(tmp_path / "half", device="cpu")
    assert manifest["distilled"] == engine.distilled == "lcm-lora"
    events = generate(STORY, model=engine, steps=3, iterations=1)
    drawn = [one for one in events if isinstance(one, FrameDrawn)]
    assert len(drawn) == 2
    assert all(one.left_out is None for one in drawn)


@pytest.mark.slow
def test_bfloat16_says_that_it_was_not_run(tmp_path: Path) -> None:
    events, manifest = exported("bfloat16", tmp_path / "brain")
    assert next(one for one in events if isinstance(one, Compared)).worst is None
    parity = manifest["parity"]
    assert parity["measured"] == []
    assert parity["not run"] == "no CPU runtime"
    assert {one["component"] for one in parity["float32 twin"]} == set(manifest["components"])
    assert all(one["error"] <= one["allowed"] for one in parity["float32 twin"])
    assert types_of(tmp_path / "brain", "unet") == {TensorProto.BFLOAT16}
