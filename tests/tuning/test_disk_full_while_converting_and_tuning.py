"""A full disk is one line and exit code 1, never a signal; with more room the same command goes on to the same bytes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killed import contents, run_apart
from small_stories import write_stories
from typer.testing import CliRunner

from fastory.cli import app

SMALL = (
    "--steps=2 --batch-size=1 --frames=2 --warmup=1 --rank=2 --save-every=1 --validate-every=0 --positions=3 "
    "--local-heads=4 --bottleneck=8 --frame-tokens=12 --device=cpu --offline --quiet"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 16 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def grow(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def refused(*command: str) -> None:
    """Run fastory, in a child that a signal may end, where the disk is full: one line, exit code 1."""

    def run(folder: Path) -> None:
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, SystemExit), result.exception
        said = result.stderr.strip()
        assert result.exit_code == 1 and said.startswith("error: the disk is full:"), result.output
        assert "The same command goes on" in said and "\n" not in said, said

    ended = run_apart(run, Path())
    assert ended.status == 0, f"{ended.status}: {ended.said}"


def done(*command: str) -> None:
    def run(folder: Path) -> None:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output

    ended = run_apart(run, Path())
    assert ended.status == 0, ended.said


def test_convert_an_adapter(disk: Path, tmp_path: Path) -> None:
    torch.save({"image_proj": {"proj": torch.randn(100, 100)}}, tmp_path / "a.bin")
    refused("convert", str(tmp_path / "a.bin"), str(disk / "a.safetensors"))
    assert list(disk.iterdir()) == []
    grow(disk, "1m")
    done("convert", str(tmp_path / "a.bin"), str(disk / "a.safetensors"))
    done("convert", str(tmp_path / "a.bin"), str(tmp_path / "whole.safetensors"))
    assert (disk / "a.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert [path.name for path in disk.iterdir()] == ["a.safetensors"]


def test_tune_at_every_stage(disk: Path, sd15_folder: Path, tmp_path: Path) -> None:
    """Room for nothing but the state's first file, for some tables, for all tables, for one of two checkpoints."""
    stories = str(write_stories(tmp_path / "stories"))
    asked = ("tune", stories, f"--model={sd15_folder}", *SMALL.split())
    stages = set()
    for size in ("16k", "200k", "700k", "1100k"):
        grow(disk, size)
        refused(*asked, f"--output={disk / 'a.safetensors'}")
        stages.add(tuple(sorted(contents(disk, skip=(".lock", "tensorboard")))))
        assert not (disk / "a.safetensors").exists()
    assert len(stages) > 1, "the disk was always full at the same moment"
    grow(disk, "64m")
    done(*asked, f"--output={disk / 'a.safetensors'}")
    (tmp_path / "whole").mkdir()
    done(*asked, f"--output={tmp_path / 'whole' / 'a.safetensors'}")
    skip = (".lock", "tensorboard")
    assert contents(disk, skip=skip) == contents(tmp_path / "whole", skip=skip)
