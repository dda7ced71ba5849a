"""Small real checkpoints, written once a test session; see small_checkpoints.py for their sizes."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from fastory.threads import allowed_cores, wait_passively

# Before anything loads PyTorch. Tests compare bytes, which depend on the number of threads, and that on what else runs.
wait_passively()
os.environ.setdefault("OMP_NUM_THREADS", str(len(allowed_cores())))
if workers := os.environ.get(
    "PYTEST_XDIST_WORKER_COUNT"
):  # each inherits the number of the process that starts them
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(allowed_cores()) // int(workers)))

import pytest

pytest.register_assert_rewrite(
    "kernel_cases", "refused_commands", "killed", "ranks", "run_folders", "hostile_files"
)

from small_checkpoints import write_adapter, write_sd15, write_sdxl
from small_history import write_causal_folder

import fastory


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker runs a file, whose tests share fixtures; one runs all files that take the export, which costs a minute.

    By the names of tests alone: groups by xdist's own mark are silently none with pytest 9.2.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def takes_the_export(file: str) -> bool:
        return "export_folder" in (config.rootpath / file).read_text(encoding="utf-8")

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "the export" if takes_the_export(file) else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def builtin_folder() -> Path:
    """The built-in model's diffusers folder, as installed."""
    return Path(fastory.__file__).parent / "builtin" / "weights"


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd15(tmp_path_factory.mktemp("checkpoints") / "sd15")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("checkpoints") / "sdxl")


@pytest.fixture(scope="session")
def sd15_adapter_base(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(sd15_folder, "base", tmp_path_factory.mktemp("adapters") / "sd15_base.safetensors")


@pytest.fixture(scope="session")
def sd15_adapter_plus(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(sd15_folder, "plus", tmp_path_factory.mktemp("adapters") / "sd15_plus.safetensors")


@pytest.fixture(scope="session")
def sdxl_adapter_base(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(sdxl_folder, "base", tmp_path_factory.mktemp("adapters") / "sdxl_base.safetensors")


@pytest.fixture(scope="session")
def sdxl_adapter_plus(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(sdxl_folder, "plus", tmp_path_factory.mktemp("adapters") / "sdxl_plus.safetensors")


@pytest.fixture(scope="session")
def causal_builtin_folder(builtin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model beside a small history encoder: both modes, with every part that can be exported."""
    return write_causal_folder(builtin_folder, tmp_path_factory.mktemp("causal") / "builtin")


@pytest.fixture(scope="session")
def export_folder(causal_builtin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model as ONNX graphs for two groups of references. Read only: tests that change it take a copy."""
    from fastory import StoryModel
    from fastory.export.onnx import export_onnx

    pytest.importorskip("onnxruntime", reason="exported graphs run on ONNX Runtime")
    folder = tmp_path_factory.mktemp("engines") / "both"
    model = StoryModel.open(str(causal_builtin_folder), device="cpu", dtype="float32")
    list(export_onnx(model, folder, groups=2))
    return folder


@pytest.fixture(scope="session")
def masked_export_folder(
    export_folder: Path, causal_builtin_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same for the appearances of two characters as well, with masks and boxes."""
    from masked_export import with_masks

    from fastory import StoryModel
    from fastory.export.choices import Groups

    model = StoryModel.open(str(causal_builtin_folder), device="cpu", dtype="float32")
    return with_masks(
        export_folder, model, Groups(2, 2, boxes=True), tmp_path_factory.mktemp("engines") / "masked"
    )
