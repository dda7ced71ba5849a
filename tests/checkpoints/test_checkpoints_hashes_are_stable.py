"""A stale or machine-bound model hash refuses a good resume or passes a bad one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from fastory.checkpoints import model_hashes, open_checkpoint
from fastory.checkpoints.hashes import TICK


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastory" / "model_hashes.json"


def test_names_are_relative_to_the_model_folder(sd15_folder: Path, sd15_adapter_base: Path) -> None:
    sources = open_checkpoint(str(sd15_folder), ip_adapter=str(sd15_adapter_base)).sources
    hashes = model_hashes(sources)
    assert set(hashes) == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "image_encoder/model.safetensors",
        "sd15_base.safetensors",
    }
    assert hashes["sd15_base.safetensors"] == hashlib.sha256(sd15_adapter_base.read_bytes()).hexdigest()


def test_same_model_elsewhere_and_later_has_the_same_hashes(sd15_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sd15_folder, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert model_hashes(open_checkpoint(str(copy)).sources) == model_hashes(
        open_checkpoint(str(sd15_folder)).sources
    )


def test_changed_file_is_hashed_anew(tmp_path: Path) -> None:
    """Same size and another time of change; and same time of change but another size."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"one")
    os.utime(path, ns=(1, 1))
    first = model_hashes([path])
    path.write_bytes(b"two")
    os.utime(path, ns=(2, 2))
    second = model_hashes([path])
    path.write_bytes(b"three")
    os.utime(path, ns=(2, 2))
    third = model_hashes([path])
    assert len({value["a.safetensors"] for value in (first, second, third)}) == 3


def settled(path: Path, data: bytes) -> Path:
    """A file that has been as it is for a while; what was changed just now is not remembered."""
    path.write_bytes(data)
    time.sleep(2 * TICK / 1e9)
    return path


def test_known_file_is_not_read_again(tmp_path: Path, cache: Path) -> None:
    path = settled(tmp_path / "a.safetensors", b"one")
    model_hashes([path])
    known = json.loads(cache.read_text("utf-8"))
    cache.write_text(json.dumps(dict.fromkeys(known, "0" * 64)), "utf-8")
    assert model_hashes([path]) == {"a.safetensors": "0" * 64}
    cache.unlink()
    assert model_hashes([path]) == {"a.safetensors": hashlib.sha256(b"one").hexdigest()}


@pytest.mark.parametrize("way", ["written", "renamed", "through-a-link"])
def test_changed_bytes_are_noticed_where_size_and_time_are_set_back(tmp_path: Path, way: str) -> None:
    path = settled(tmp_path / "a.safetensors", b"one")
    state = path.stat()
    os.link(path, tmp_path / "same")
    time.sleep(2 * TICK / 1e9)  # a link more changes the inode as well
    assert model_hashes([path]) == {"a.safetensors": hashlib.sha256(b"one").hexdigest()}
    written = {"written": path, "renamed": tmp_path / "new", "through-a-link": tmp_path / "same"}[way]
    written.write_bytes(b"two")
    os.utime(written, ns=(state.st_atime_ns, state.st_mtime_ns))
    if way == "renamed":
        written.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert model_hashes([path]) == {"a.safetensors": hashlib.sha256(b"two").hexdigest()}


def test_a_change_within_one_tick_of_the_clock_is_noticed(tmp_path: Path) -> None:
    """Nothing that was changed just now is remembered: its next change might not show in its times."""
    path = tmp_path / "a.safetensors"
    for number in range(20):
        path.write_bytes(str(number % 10).encode())
        os.utime(path, ns=(1, 1))
        assert model_hashes([path]) == {"a.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("spoilt", [b"", b"{", b"[]", b'{"x": 1}', b"\xff", b"[" * 100_000])
def test_spoilt_cache_is_ignored_and_mended(spoilt: bytes, tmp_path: Path, cache: Path) -> None:
    path = settled(tmp_path / "a.safetensors", b"one")
    cache.parent.mkdir(parents=True)
    cache.write_bytes(spoilt)
    wanted = {"a.safetensors": hashlib.sha256(b"one").hexdigest()}
    assert model_hashes([path]) == wanted
    assert wanted["a.safetensors"] in cache.read_text("utf-8")


def test_unwritable_cache_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"one")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    assert model_hashes([path]) == {"a.safetensors": hashlib.sha256(b"one").hexdigest()}


def test_two_files_of_one_name_both_count(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.safetensors").write_bytes(folder.encode())
    hashes = model_hashes([tmp_path / "a" / "x.safetensors", tmp_path / "b" / "x.safetensors"])
    assert list(hashes) == ["x.safetensors", "x.safetensors#2"] and len(set(hashes.values())) == 2
