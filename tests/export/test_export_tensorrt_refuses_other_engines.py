"""Risk: an engine of another GPU, another TensorRT, another export or other weights is opened and draws nonsense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastory.errors import InputError
from fastory.export import build_engines
from fastory.models.tensorrt_session import engine_record, refuse_changed, refuse_elsewhere

ADA = ("NVIDIA GeForce RTX 4090", "8.9", "11.1.0")


def built(**differs: Any) -> Mapping[str, Any]:
    name, capability, version = ADA
    here = {"builder": "tensorrt", "name": name, "capability": capability, "version": version, "flags": []}
    return {**here, **differs}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("unet.engine", "unet.trt.onnx", "unet.onnx.data"):
        (tmp_path / name).write_bytes(name.encode())
    files = ("unet.engine", "unet.trt.onnx", "unet.onnx.data")
    digests = {name: build_engines.sha256(tmp_path / name) for name in files}
    build_engines.note(tmp_path, "unet.engine", {**built(), "sha256": digests})
    return tmp_path


def test_an_engine_as_it_was_built_is_accepted(folder: Path) -> None:
    refuse_changed(folder, engine_record(folder, "unet.engine"))


@pytest.mark.parametrize("name", ["unet.engine", "unet.trt.onnx", "unet.onnx.data"])
def test_a_changed_or_missing_file_is_refused(folder: Path, name: str) -> None:
    record = engine_record(folder, "unet.engine")
    (folder / name).write_bytes(b"of another export")
    with pytest.raises(
        InputError, match=rf"{name} was changed since the engine was built.*fastory export --trt"
    ):
        refuse_changed(folder, record)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        refuse_changed(folder, record)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "holds no engines"),
        ("{", "is damaged"),
        ('{"schema": 1}', "is damaged"),
        ('{"schema": 2, "engines": {}}', "schema 2"),
        (
            '{"schema": 1, "engines": {"vae_decoder.engine": {}}}',
            "holds no unet.engine; it has vae_decoder.engine",
        ),
    ],
)
def test_a_folder_without_a_record_of_the_engine_is_refused(
    folder: Path, text: str | None, said: str
) -> None:
    (folder / "engines.json").unlink()
    if text is not None:
        (folder / "engines.json").write_text(text)
    with pytest.raises(InputError, match=said):
        engine_record(folder, "unet.engine")


@pytest.mark.parametrize(
    ("record", "here", "said"),
    [
        ({}, ("NVIDIA GeForce RTX 4090", "8.9", "11.2.0"), "built with tensorrt 11.1.0, and 11.2.0 is here"),
        ({}, ("NVIDIA L40S", "8.9", "11.1.0"), "built for NVIDIA GeForce RTX 4090, and this is NVIDIA L40S"),
        ({}, ("NVIDIA H100", "9.0", "11.1.0"), "compute capability 8.9, and NVIDIA H100 has 9.0"),
        ({"flags": ["version-compatible"]}, (*ADA[:2], "12.0.0"), "built with tensorrt 11.1.0"),
        ({"flags": ["version-compatible"]}, (*ADA[:2], "11.0.9"), "built with tensorrt 11.1.0"),
        ({"flags": ["hardware-compatible"]}, ("NVIDIA T4", "7.5", "11.1.0"), "compute capability"),
        ({"name": None, "builder": "tensorrt_rtx"}, ("NVIDIA A10", "8.6", "11.1.0"), "compute capability"),
    ],
)
def test_an_engine_for_elsewhere_is_refused(record: dict, here: tuple[str, str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        refuse_elsewhere("unet.engine", built(**record), *here)


@pytest.mark.parametrize(
    ("record", "here"),
    [
        ({}, ADA),
        ({"flags": ["version-compatible"]}, (*ADA[:2], "11.10.0")),
        ({"flags": ["hardware-compatible"]}, ("NVIDIA H100", "9.0", "11.1.0")),
        ({"name": None, "builder": "tensorrt_rtx"}, ("NVIDIA L4", "8.9", "11.1.0")),
    ],
)
def test_an_engine_that_runs_here_is_accepted(record: dict, here: tuple[str, str, str]) -> None:
    refuse_elsewhere("unet.engine", built(**record), *here)


def test_the_record_is_plain_json(folder: Path) -> None:
    assert json.loads((folder / "engines.json").read_text())["engines"]["unet.engine"]["version"] == "11.1.0"
