"""The modes that papers compare with, as runs: broken off and taken up again, frames redrawn, their pages written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from run_folders import contents, drawn

from fastory import InputError, Story, StoryModel, generate
from fastory.events import FrameDrawn

CAPTIONS = ["a fox in the snow", "a fox is jumping", "a fox on the beach", "a fox in the city"]
STORY = Story.from_captions(CAPTIONS)
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "reference": {"bank": 2},
    "consistent": {"bank": 2, "batch_size": 3},
}
SEEING = [mode for mode in MODES if "bank" in MODES[mode]]


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def options(mode: str, **more: Any) -> dict[str, Any]:
    return {"mode": mode, "steps": 2, "batch_size": 2, "noise": "per-frame", **MODES[mode], **more}


@pytest.fixture(scope="module")
def whole(model: StoryModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of every mode. Read only."""
    folders = {mode: tmp_path_factory.mktemp(mode) / "run" for mode in MODES}
    for mode, folder in folders.items():
        list(generate(STORY, model=model, output=folder, **options(mode)))
    return folders


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("finished", [1, 3])
def test_a_run_that_is_broken_off_goes_on_to_the_same_bytes(
    mode: str, finished: int, model: StoryModel, whole: dict[str, Path], tmp_path: Path
) -> None:
    events = generate(STORY, model=model, output=tmp_path / "run", **options(mode))
    for _ in range(finished):
        while not isinstance(next(events), FrameDrawn):
            pass
    events.close()  # type: ignore[attr-defined]
    rest = list(generate(STORY, model=model, output=tmp_path / "run", **options(mode)))
    # A micro-batch of two is written as a whole: the second may be there before it is announced, and no further one.
    assert (
        {(0, i) for i in range(finished + 1, len(CAPTIONS))}
        <= drawn(rest)
        <= {(0, i) for i in range(finished - finished % 2, len(CAPTIONS))}
    )
    assert contents(tmp_path / "run") == contents(whole[mode])


@pytest.mark.parametrize("mode", SEEING)
def test_a_lost_picture_of_the_bank_is_drawn_again_as_it_was(
    mode: str, model: StoryModel, whole: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(whole[mode], tmp_path / "run")
    (tmp_path / "run" / "iteration-00" / "frame-001.png").unlink()
    again = list(generate(STORY, model=model, output=tmp_path / "run", **options(mode)))
    assert drawn(again) == {(0, 1)}
    assert contents(tmp_path / "run") == contents(whole[mode])


@pytest.mark.parametrize("mode", MODES)
def test_a_frame_is_redrawn_and_the_others_stay(
    mode: str, model: StoryModel, whole: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(whole[mode], tmp_path / "run")
    seed: dict[str, Any] = {"frames": [3], "redraw_seed": 9}
    again = list(generate(STORY, model=model, output=tmp_path / "run", **options(mode), **seed))
    assert drawn(again) == {(0, 3)}
    before, after = contents(whole[mode]), contents(tmp_path / "run")
    changed = {name for name in before if name.startswith("frames/") and before[name] != after[name]}
    assert changed == {"frames/frame-003.png"}


@pytest.mark.parametrize("mode", SEEING)
def test_the_bank_is_redrawn_with_all_that_saw_it_or_not_at_all(
    mode: str, model: StoryModel, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[mode], folder)
    before = contents(folder)
    with pytest.raises(InputError, match=r"frame 1 among them; wanted frames from 2 on alone, or all"):
        generate(STORY, model=model, output=folder, **options(mode), frames=[1, 3], redraw_seed=9)
    assert contents(folder) == before
    again = list(
        generate(STORY, model=model, output=folder, **options(mode), frames=slice(0, None), redraw_seed=9)
    )
    assert drawn(again) == {(0, i) for i in range(len(CAPTIONS))}
    # the same as a story drawn anew with that seed: no old picture was seen
    list(generate(STORY, model=model, output=tmp_path / "anew", **options(mode, seed=9)))
    for i in range(len(CAPTIONS)):
        name = f"frames/frame-{i:03d}.png"
        pixels = [Image.open(run / name).tobytes() for run in (folder, tmp_path / "anew")]
        assert pixels[0] == pixels[1], name


@pytest.mark.parametrize("mode", MODES)
def test_pictures_and_page_say_how_they_were_drawn(mode: str, whole: dict[str, Path]) -> None:
    with Image.open(whole[mode] / "frames" / "frame-003.png") as picture:
        said = json.loads(picture.text["fastory"])  # type: ignore[attr-defined]
    assert (said["mode"], said["round"], said["rounds"]) == (mode, 0, 0)
    assert said.get("bank") == MODES[mode].get("bank")
    page = (whole[mode] / "storybook.html").read_text(encoding="utf-8")
    assert mode in page and ("2 first frames" in page) == ("bank" in MODES[mode])
    manifest = json.loads((whole[mode] / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"].get("bank") == MODES[mode].get("bank")
    assert "iterations" not in manifest["settings"]
