"""An export whose bytes changed is refused, whatever its size and times say; remembered hashes are for those who ask."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hostile_files import linked_copy
from small_export import write_export
from typer.testing import CliRunner

from fastory.checkpoints import hashes
from fastory.cli import app
from fastory.errors import InputError
from fastory.models.export_folder import ExportFolder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def change(file: Path) -> None:
    """Other bytes in the same file, of the same size and time of modification."""
    state = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    with file.open("rb+") as opened:
        opened.write(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("trust", [False, True])
def test_weights_changed_with_their_time_set_back_are_refused(tmp_path: Path, trust: bool) -> None:
    folder = write_export(tmp_path / "engines")
    ExportFolder.open(folder, trust_cache=trust)
    change(folder / "unet.onnx.data")
    with pytest.raises(InputError, match=r"unet.onnx.data is not the file of this export"):
        ExportFolder.open(folder, trust_cache=trust)


def test_every_file_is_read_at_every_open_unless_the_cache_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that says what the manifest wants, though the file has other bytes: as where a disk went bad."""
    folder = write_export(tmp_path / "engines")
    wanted = ExportFolder.open(folder).manifest["files"]["unet.onnx.data"]
    change(folder / "unet.onnx.data")
    hashes._write({hashes._key(folder / "unet.onnx.data"): wanted})
    ExportFolder.open(folder, trust_cache=True)
    with pytest.raises(InputError, match=r"unet.onnx.data is not the file of this export"):
        ExportFolder.open(folder)


@pytest.mark.parametrize("name", ["unet.onnx.data", "unet.onnx"])
def test_a_file_may_not_be_a_link_that_leads_out(tmp_path: Path, name: str) -> None:
    """Its bytes are right today; whoever owns the place it leads to can change them after the check."""
    folder = write_export(tmp_path / "engines")
    other = linked_copy(folder, tmp_path / "elsewhere")
    (folder / name).unlink()
    (folder / name).symlink_to(other / name)
    with pytest.raises(InputError, match="leads out of the folder"):
        ExportFolder.open(folder)


def test_the_option_is_for_engines(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["generate", "--trust-cache", "-o", str(tmp_path / "run")])
    assert result.exit_code == 2 and "--trust-cache is for --engine" in result.stderr
