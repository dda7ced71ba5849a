"""kill -9 before every change of the disk of a short run; the same command then ends with the bytes of a whole run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed import check_every_operation
from PIL import Image
from run_folders import contents

from fastory import Story, StoryModel, generate

SOME = 9  # of some 60 to 110 operations, evenly spread; the slow test takes all
ONE = {"steps": 1, "batch_size": 2}
FOX = Story.from_captions(["a fox is sleeping in the snow", "a fox is jumping in the forest"], title="Fox")
EDITED = Story.from_captions(["a fox is sleeping in the snow", "a fox is reading a book"], title="Fox")
BEAR = Story.from_captions(["a bear is sleeping in the snow"], title="Bear")


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


@pytest.fixture(scope="module")
def finished(model: StoryModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    list(generate(FOX, model=model, output=folder, iterations=1, **ONE))
    return folder


def no_half_file(folder: Path) -> None:
    """What a kill leaves under a final name can be opened."""
    for path in folder.rglob("*.png"):
        if not path.name.startswith("."):
            with Image.open(path) as image:
                image.load()


def check(
    place: Path,
    model: StoryModel,
    finished: Path | None,
    stories: Story | list[Story],
    most: int | None,
    **options: Any,
) -> None:
    def prepare(folder: Path) -> None:
        if finished is not None:
            shutil.copytree(finished, folder / "run")

    def command(folder: Path) -> None:
        list(generate(stories, model=model, output=folder / "run", **{**ONE, **options}))

    check_every_operation(place, prepare, command, most=most, look=contents, after_kill=no_half_file)


Case = Callable[[Path, StoryModel, Path, int | None], None]
CASES: dict[str, Case] = {
    "iterative": lambda place, model, finished, most: check(place, model, None, FOX, most, iterations=1),
    "iterative, overwriting": lambda place, model, finished, most: check(
        place, model, finished, BEAR, most, iterations=1, overwrite=True
    ),
    "causal, side by side, with drafts": lambda place, model, finished, most: check(
        place, model, None, [FOX, BEAR], most, mode="causal", drafts=1
    ),
    "causal, overwriting": lambda place, model, finished, most: check(
        place, model, finished, FOX, most, mode="causal", drafts=1, overwrite=True
    ),
    "redraw": lambda place, model, finished, most: check(
        place, model, finished, EDITED, most, iterations=1, frames=[1]
    ),
    "redraw with another seed": lambda place, model, finished, most: check(
        place, model, finished, FOX, most, iterations=1, frames=[0], redraw_seed=3
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_at_some_operations(case: str, model: StoryModel, finished: Path, tmp_path: Path) -> None:
    CASES[case](tmp_path, model, finished, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_operation(case: str, model: StoryModel, finished: Path, tmp_path: Path) -> None:
    CASES[case](tmp_path, model, finished, None)
