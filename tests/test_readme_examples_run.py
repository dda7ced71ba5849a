"""What README and guide show runs as it stands there: its Python, with the built-in model as the pipeline, and its commands."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hub_cache import cached
from huggingface_hub import constants
from PIL import Image
from typer.main import get_command

import fastory
from fastory.cli import app

ROOT = Path(__file__).parents[1]
README, GUIDE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "fastory/GUIDE.md"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README + GUIDE, re.DOTALL)


@pytest.fixture
def names(builtin_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the README says a reader has: a loaded pipeline and some pictures; and the hub's adapter in a cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    adapters = cached(tmp_path / "hub", "h94/IP-Adapter") / "models"
    adapters.mkdir(parents=True)
    shutil.copy(
        builtin_folder / "ip_adapter" / "ip_adapter.safetensors", adapters / "ip-adapter_sd15.safetensors"
    )
    shutil.copytree(builtin_folder / "image_encoder", adapters / "image_encoder")
    pipe = StableDiffusionPipeline.from_pretrained(
        builtin_folder, torch_dtype=torch.float32, safety_checker=None
    )
    return {"pipe": pipe, "pictures": [Image.linear_gradient("L").convert("RGB").resize((128, 128))]}


def test_the_python_examples(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """In the README's order, each with the names of those before it."""
    examples = blocks("python")
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)  # noqa: S102
    assert [image.size for image in names["drawn"].images] == [(128, 128), (128, 128)]
    assert isinstance(names["event"], fastory.events.StoryFinished)  # type: ignore[attr-defined]
    assert isinstance(names["image"], Image.Image) and names["image"].getextrema() != ((0, 0),) * 3
    assert Path("story/storybook.html").exists()
    said = capsys.readouterr()
    assert "StoryStarted(" in said.out and "100%" in said.err


def commands() -> list[str]:
    lines = [line.partition(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    found = [line for line in lines if re.match(r"fastory \w", line)]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("line", commands())
def test_the_commands_have_the_options_that_they_are_given(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    given = ["-o" if part == "..." else part for part in arguments]
    given += ["x"] if given[-1:] == ["-o"] else []
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, [*given, *(["-o", "x"] if name == "tune" and "-o" not in given else [])])


def test_what_they_link_to_is_there() -> None:
    for file, text in ((ROOT / "README.md", README), (ROOT / "fastory" / "GUIDE.md", GUIDE)):
        links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
        assert links
        assert [link for link in links if not (file.parent / link).exists()] == []
