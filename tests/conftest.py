"""Small real checkpoints, written once a test session; see small_checkpoints.py for their sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import write_adapter, write_sd15, write_sdxl

import fastory


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
