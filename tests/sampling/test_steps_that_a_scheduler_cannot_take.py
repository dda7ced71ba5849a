"""A number of steps for which a scheduler has no timesteps ends at the door, not in a library's ValueError mid-run."""

from pathlib import Path

import pytest

from fastory import Story, StoryModel, generate
from fastory.errors import InputError


@pytest.mark.parametrize("given", [{"steps": 3}, {"steps": 6, "inner_steps": 2}])
def test_pndm_begins_with_four(tmp_path: Path, given: dict[str, int]) -> None:
    model, output = StoryModel.open("builtin"), tmp_path / "run"
    story = Story.from_captions(["A fox is jumping.", "A fox is reading."])
    with pytest.raises(InputError, match=r"scheduler pndm cannot draw in [23] steps.*more --steps"):
        list(generate(story, model=model, output=output, scheduler="pndm", iterations=1, **given))
    assert not output.exists()


def test_pndm_draws_in_four(tmp_path: Path) -> None:
    story = Story.from_captions(["A fox is jumping."])
    list(generate(story, output=tmp_path / "run", scheduler="pndm", iterations=0, steps=4))
    assert (tmp_path / "run" / "frames" / "frame-000.png").exists()
