"""NVIDIA's parser takes the graphs and NVIDIA's builder makes engines of them, on a machine without a GPU.

TensorRT for RTX cannot run them there: what is checked is that they build, for which sizes, and what is written.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from small_export import write_export

from fastory.errors import FastoryError
from fastory.export.choices import RTX_TARGETS
from fastory.export.tensorrt import Built, build_rtx, graph_name
from fastory.models.export_folder import MANIFEST, ExportFolder, hashes_of, write_manifest

pytestmark = [
    pytest.mark.rtx,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx_bindings") is None,
        reason="TensorRT for RTX is not installed (pip install 'fastory[rtx]')",
    ),
]
onnx = pytest.importorskip("onnx", reason="an export is ONNX graphs")
HUNDRED = {"references": (1, 100)}


@pytest.fixture
def engines(export_folder: Path, tmp_path: Path) -> Path:
    """The built-in model's export, both modes, float32, two groups; weights are linked, not copied."""
    return Path(shutil.copytree(export_folder, tmp_path / "engines", copy_function=os.link))


def test_the_builtin_unet_builds_for_one_to_a_hundred_references(engines: Path) -> None:
    (built,) = build_rtx(engines, "sm89", components=["unet"], sizes={**HUNDRED, "batch": (1, 16)})
    assert built.engine == engines / "unet.rtx-sm89.engine"
    assert built.bytes == built.engine.stat().st_size > 1e6 and built.seconds > 0
    record = json.loads((engines / "engines.json").read_text())["engines"][built.engine.name]
    least, _, most = record["profile"]["ref_visible"]
    assert (least, most) == ([1, 1], [16, 100])
    assert record["capability"] == "8.9" and record["builder"] == "tensorrt_rtx" and record["name"] is None
    ExportFolder.open(engines)  # is whole still


@pytest.mark.slow
def test_the_builtin_unet_builds_with_masks_and_boxes(masked_export_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(masked_export_folder, tmp_path / "masked", copy_function=os.link))
    built = list(build_rtx(folder, "sm89", components=["unet", "vae_encoder"], sizes={"batch": (1, 16)}))
    assert [one.component for one in built] == ["unet", "vae_encoder"]
    profile = json.loads((folder / "engines.json").read_text())["engines"][built[0].engine.name]["profile"]
    assert profile["mask_2"][2] == [16, 4, 12, 12] and profile["self_bias_2"][2] == [16, 12, 12, 12, 12]


@pytest.mark.slow
def test_every_other_component_builds(engines: Path) -> None:
    names = [name for name in ExportFolder.open(engines).components if name != "unet"]
    assert {"text_encoder", "image_encoder", "vae_decoder", "unet_causal", "history_attention"} <= set(names)
    built: list[Built] = list(build_rtx(engines, "sm89", components=names))
    assert [one.component for one in built] == names


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("groups", "masked"), [(1, False), (3, False), (3, True)], ids=str)
def test_groups_and_types_build(tmp_path: Path, dtype: str, groups: int, masked: bool) -> None:
    folder = write_export(tmp_path / "small", dtype, groups, masked)
    (built,) = build_rtx(folder, "sm89", sizes=HUNDRED)
    assert built.bytes > 0
    profile = json.loads((folder / "engines.json").read_text())["engines"][built.engine.name]["profile"]
    assert ("mask_1" in profile) == masked
    assert not masked or profile["mask_1"][2] == [32, groups, 24, 24]


@pytest.mark.parametrize("target", [name for name in RTX_TARGETS if name != "sm89"])
def test_every_target_builds(tmp_path: Path, target: str) -> None:
    (built,) = build_rtx(write_export(tmp_path / "small"), target)
    assert built.engine.name == f"unet.rtx-{target}.engine"


def test_a_graph_that_the_parser_refuses_is_a_message(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "small")
    graph = onnx.load(folder / "unet.onnx", load_external_data=False)
    graph.graph.node[0].op_type = "Unheard"
    (folder / "unet.onnx").write_bytes(graph.SerializeToString())
    manifest = json.loads((folder / MANIFEST).read_text())
    write_manifest(folder, {**manifest, "files": hashes_of(folder)})
    with pytest.raises(FastoryError, match=r"parser refuses unet\.trt\.onnx: .*Unheard"):
        list(build_rtx(folder, "sm89"))
    assert not list(folder.glob("*.engine")) and not (folder / "engines.json").exists()


def test_a_size_that_the_builder_cannot_take_is_a_message(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "small")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["components"]["unet"]["inputs"]["text_kv"]["shape"] = ["batch", "text", 63]
    write_manifest(folder, manifest)
    with pytest.raises(FastoryError, match=r"unet\.rtx-sm89\.engine was not built: "):
        list(build_rtx(folder, "sm89"))


def test_the_graph_for_nvidia_leaves_the_export_as_it_was(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "small")
    before = hashes_of(folder)
    list(build_rtx(folder, "sm89"))
    after = hashes_of(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {graph_name("unet"), "unet.rtx-sm89.engine", "engines.json"}
