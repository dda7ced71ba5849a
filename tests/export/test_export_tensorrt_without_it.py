"""Risk: without TensorRT or a GPU nothing says what is missing, a half-written engine stays, or a crash is silent."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_export import write_export

from fastory.errors import FastoryError, InputError
from fastory.export import build_engines
from fastory.export.tensorrt import NotBuiltError, build, build_rtx
from fastory.files import unfinished
from fastory.models.tensorrt_packages import MissingError, load

needs_absence = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None and torch.cuda.is_available(),
    reason="TensorRT and a GPU are here",
)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write_export(tmp_path / "small")


@needs_absence
def test_graphs_and_script_are_written_and_the_exit_code_says_so(export: Path) -> None:
    before = {file.name for file in export.iterdir()}
    with pytest.raises(NotBuiltError, match="no engine was built") as raised:
        list(build(export, sizes={"references": (1, 100)}, refit=True))
    assert raised.value.exit_code == 3
    assert "pip install 'tensorrt>=11'" in str(raised.value) and "build_engines.py" in str(raised.value)
    new = {file.name for file in export.iterdir()} - before
    assert new == {"unet.trt.onnx", "build_engines.py", "build_engines.json", "tensorrt_packages.py"}
    (job,) = json.loads((export / "build_engines.json").read_text())["jobs"]
    assert job["profile"]["ref_kv"][2] == [1, 400, 64] and job["flags"] == ["refit"]


@needs_absence
def test_the_script_needs_nothing_of_this_package(export: Path, tmp_path: Path) -> None:
    with pytest.raises(NotBuiltError):
        list(build(export))
    elsewhere = Path(shutil.copytree(export, tmp_path / "elsewhere"))
    # -S: without any installed package.
    command = [sys.executable, "-S", str(elsewhere / "build_engines.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 3 and "pip install 'tensorrt>=11'" in done.stderr


@needs_absence
def test_the_script_refuses_a_component_that_is_not_planned(export: Path) -> None:
    with pytest.raises(NotBuiltError):
        list(build(export))
    done = subprocess.run(
        [sys.executable, str(export / "build_engines.py"), "unte"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "wanted some of unet" in done.stderr


@pytest.mark.parametrize("status", ["os.kill(os.getpid(), 11)", "os._exit(70)"])
def test_a_crash_of_the_builder_is_a_message(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    crashing = tmp_path / "crashing.py"
    crashing.write_text(
        f"import os, pathlib\npathlib.Path({str(export)!r}, '.unet.rtx-sm89.engine.partial').touch()\n{status}\n"
    )
    monkeypatch.setattr(build_engines, "__file__", str(crashing))
    with pytest.raises(FastoryError, match=r"builder crashed \((SIGSEGV|exit status 70)\) on unet.trt.onnx"):
        list(build_rtx(export, "sm89"))
    assert not list(export.glob("*.engine")) and not list(export.glob(".*partial"))


@pytest.mark.parametrize("target", ["sm90", "sm100", "ada"])
def test_other_targets_are_refused_by_name(export: Path, target: str) -> None:
    with pytest.raises(InputError, match="builds for sm75, sm80, sm86, sm89, sm120, sm121"):
        build_rtx(export, target)


def test_a_folder_that_another_process_exports_into_gets_no_engine(export: Path) -> None:
    """Its graphs may be replaced at any moment."""
    before = sorted(export.iterdir())
    for events in (build(export), build_rtx(export, "sm89")):
        with (
            unfinished(export, "exports into", "wait"),
            pytest.raises(FastoryError, match=f"another process exports into {export}"),
        ):
            next(events)
    assert sorted(export.iterdir()) == before


def test_bad_sizes_are_refused_before_anything_is_written(export: Path) -> None:
    before = sorted(export.iterdir())
    with pytest.raises(InputError, match="multiples of 32"):
        build(export, sizes={"width": (60, 60)})
    assert sorted(export.iterdir()) == before


def test_a_changed_folder_is_refused(export: Path) -> None:
    data = export / "unet.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="not the file of this export"):
        build(export)


def test_a_graph_that_changed_after_the_plan_is_not_built(export: Path) -> None:
    job = {
        "graph": "unet.onnx",
        "data": "unet.onnx.data",
        "sha256": {"unet.onnx": "0", "unet.onnx.data": "0"},
    }
    with pytest.raises(build_engines.BuildError, match="not the file that this build was planned for"):
        build_engines.refuse_changed(export, job)
    (export / "unet.onnx").unlink()
    with pytest.raises(build_engines.BuildError, match="missing"):
        build_engines.refuse_changed(export, job)


def test_a_full_disk_leaves_the_old_engine_and_nothing_half_written(tmp_path: Path) -> None:
    engine = tmp_path / "unet.engine"
    engine.write_bytes(b"old")
    # A limit on the size of a file fails a write as a full disk does.
    limited = (
        "import pathlib, resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "script = runpy.run_path(sys.argv[1])\n"
        "script['write'](pathlib.Path(sys.argv[2]), bytes(8192))\n"
    )
    command = [sys.executable, "-c", limited, build_engines.__file__, str(engine)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "OSError" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["unet.engine"] and engine.read_bytes() == b"old"


def test_a_record_joins_the_others_and_a_damaged_file_starts_anew(tmp_path: Path) -> None:
    build_engines.note(tmp_path, "a.engine", {"component": "a"})
    build_engines.note(tmp_path, "b.engine", {"component": "b"})
    known = json.loads((tmp_path / "engines.json").read_text())
    assert known["schema"] == 1 and list(known["engines"]) == ["a.engine", "b.engine"]
    (tmp_path / "engines.json").write_text("{")
    build_engines.note(tmp_path, "c.engine", {"component": "c"})
    assert list(json.loads((tmp_path / "engines.json").read_text())["engines"]) == ["c.engine"]


def test_the_timing_cache_is_named_by_gpu_capability_and_version() -> None:
    made = {"name": "NVIDIA GeForce RTX 4090", "capability": "8.9", "version": "11.1.0.25"}
    assert build_engines.timing_cache(made) == "timing-nvidia-geforce-rtx-4090-sm89-11.1.0.25.cache"


def test_an_old_or_empty_tensorrt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_rtx_libs.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for source, said in (
        ("", "without its libraries"),
        ("__version__ = '10.9.0'\nclass Builder: ...", "wanted tensorrt 11 or newer, found 10.9.0"),
        ("raise OSError('libnvinfer.so.11: cannot open')", "libnvinfer.so.11"),
    ):
        (tmp_path / "tensorrt.py").write_text(source)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        with pytest.raises(MissingError, match=said):
            load("tensorrt")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
