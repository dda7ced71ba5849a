"""What cannot be tuned is refused at the door: exit code 2, one message, nothing written."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_history import write_causal_folder
from small_stories import write_stories
from typer.testing import CliRunner

from fastory.cli import app
from fastory.tuning.state import Progress


@pytest.fixture
def stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return write_stories(Path("stories"))


def refuse(base: Path, wanted: str, *options: str, stories: str = "stories") -> None:
    """Run `fastory tune`; check the refusal, and that nothing was written."""
    before = sorted(Path().rglob("*"))
    output = [] if "--output" in options else ["--output", "new/adapter.safetensors"]
    command = ["tune", stories, *output, "--model", str(base), "--device", "cpu", *options]
    result = CliRunner().invoke(app, command)
    message = re.sub(r"[\s│]+", " ", result.stderr)
    assert result.exit_code == 2, result.output + str(result.exception)
    assert wanted in message, message
    assert sorted(Path().rglob("*")) == before


def test_stories_that_are_not_whole(stories: Path, sd15_folder: Path) -> None:
    refuse(sd15_folder, "wanted a folder of story folders", stories="nowhere")
    Path("empty").mkdir()
    refuse(sd15_folder, "got none; put each story into a folder of its own", stories="empty")
    refuse(sd15_folder, "got a single story", stories="stories/story-0")
    first = stories / "story-0"
    picture = (first / "frame-001.png").read_bytes()
    (first / "frame-001.png").unlink()
    refuse(sd15_folder, "3 captions, and no picture frame-001.png for frame 1")
    (first / "frame-001.png").write_bytes(picture[:-40])
    refuse(sd15_folder, "frame-001.png: wanted a PNG picture, and it cannot be read")
    Image.new("RGB", (64, 32)).save(first / "frame-001.png")
    refuse(sd15_folder, "has 64 x 32 pixels, and 64 x 64 are trained")
    (first / "frame-001.png").write_bytes(picture)
    shutil.copy(first / "frame-001.png", first / "frame-003.png")
    refuse(sd15_folder, "3 captions, and a picture frame-003.png")
    (first / "frame-003.png").unlink()
    (first / "story.txt").write_text("one caption\n")
    refuse(sd15_folder, "wanted a story of two frames or more, got 1")
    (first / "story.txt").unlink()
    refuse(sd15_folder, "wanted a story file (story.yaml, story.yml, story.json, story.txt), got none")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--output", "adapter.bin"], "--output: wanted a file ADAPTER.safetensors, got adapter.bin"),
        (["--steps", "0"], "--steps: wanted 1 or more, got 0"),
        (["--frames", "1"], "--frames: wanted 2 or more, got 1"),
        (["--window", "0"], "--window: wanted random, all, or a number of frames from 1 on, got 0"),
        (["--window", "some"], "--window: wanted random, all, or a number of frames from 1 on, got 'some'"),
        (["--window", "4", "--positions", "3"], "--window 4 takes 4 frames of history"),
        (["--window", "all", "--positions", "2"], "--window all takes 3 frames of history"),
        (["--dropout", "1"], "--dropout: wanted 0 or more and less than 1"),
        (["--learning-rate", "0"], "--learning-rate: wanted more than 0"),
        (["--rank", "-1"], "--rank: wanted 0"),
        (["--imitate", "-1"], "--imitate: wanted 0 or more, got -1"),
        (["--imitate", "5"], "has no IP-Adapter to imitate; wanted: --ip-adapter FILE.safetensors"),
        (["--imitate-scale", "0"], "--imitate-scale: wanted more than 0 and at most 2, got 0.0"),
        (["--preserve", "-1"], "--preserve: wanted 0 or more, got -1"),
        (["--contrast", "-1"], "--contrast: wanted 0 or more, got -1"),
        (["--contrast", "1"], "--contrast wants stories that share their captions"),
        (["--patches", "0.5"], "--patches wants stories that share their captions"),
        (["--contrast", "1", "--batch-size", "3"], "wanted an even number, got 3"),
        (["--freeze-encoder"], "--freeze-encoder: the history encoder would be new and stay as it is"),
        (["--first-frames", "1"], "--first-frames: wanted 0 or more and less than 1"),
        (["--width", "60"], "--width: wanted a multiple of 32 pixels"),
        (["--history-size", "huge"], "--history-size: wanted one of small, medium, base, got 'huge'"),
        (["--local-heads", "3"], "local_heads: wanted heads whose width is a multiple of 8, got 3 for 32"),
        (["--validation", "3"], "--validation: wanted 0 to 2 of the 3 stories, got 3"),
        (["--adapter", "missing.safetensors"], "missing.safetensors"),
        (["--adapter", "stories/story-0/story.txt", "--history-size", "small"], "give one of the two"),
    ],
)
def test_option_that_cannot_be_used(
    stories: Path, sd15_folder: Path, options: list[str], wanted: str
) -> None:
    refuse(sd15_folder, wanted, *options)


def test_models_that_cannot_be_tuned(
    stories: Path, sd15_folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    refuse(sdxl_folder, "is an SDXL model; wanted a UNet of Stable Diffusion 1.5")
    own = write_causal_folder(sd15_folder, tmp_path / "own")
    refuse(
        own, "has a history encoder of its own, which an adapter cannot replace", "--history-size", "small"
    )
    refuse(own, "--positions: the base's history encoder has 6, got 3", "--positions", "3")
    file = own / "history" / "model.safetensors"
    refuse(sd15_folder, "is not an adapter of causal mode", "--adapter", str(file))


def test_files_that_are_in_the_way(stories: Path, sd15_folder: Path) -> None:
    asked = ("--output", "adapter.safetensors")
    Path("adapter.safetensors").write_bytes(b"mine")
    refuse(sd15_folder, "exists and no tuning beside it made it", *asked)
    refuse(sd15_folder, "adapter.safetensors is no adapter of a tuning", *asked, "--overwrite")
    Path("adapter.safetensors").unlink()
    folder = Path("adapter.tuning")
    for name in ("tensorboard/notes.md", "tables-of-mine/a.csv", "state-of-the-art.pdf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    for more in ((), ("--overwrite",)):
        refuse(sd15_folder, "and no state.json of a tuning", *asked, *more)
    (folder / "state.json").write_text('{"schema": 99}')
    refuse(sd15_folder, "has schema 99", *asked, "--overwrite")
    other = {"schema": 1, "identity": {"seed": 9}, "step": 2, "file": "../state-00000002.safetensors"}
    (folder / "state.json").write_text(json.dumps(other))
    refuse(sd15_folder, "state.json is damaged (file:", *asked, "--overwrite")
    (folder / "state.json").write_text(json.dumps({**other, "file": "state-00000002.safetensors"}))
    refuse(sd15_folder, "holds another tuning", *asked)


def test_overwrite_removes_what_a_tuning_left_and_nothing_else(tmp_path: Path) -> None:
    progress = Progress(tmp_path, {"seed": 1})
    progress.begin(anew=False)
    mine = ["notes.md", "state-of-the-art.pdf", "tables-of-mine/a.csv", "tensorboard/notes.md", ".x.partial"]
    left = ["state-00000002.safetensors", "tables-0123456789abcdef/a.npy", ".tables-0123456789abcdef.partial/a.npy",
            ".state-00000002.safetensors.partial", "tensorboard/events.out.tfevents.1.host.2.0"]  # fmt: skip
    for name in mine + left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    progress.begin(anew=True)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*mine, "state.json"}


def test_without_tensorboard(stories: Path, sd15_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refuse(sd15_folder, "pip install 'fastory[tune]'")
