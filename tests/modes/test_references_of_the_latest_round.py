"""Risk: a frame sees other pictures than those of the micro-batches before it, or other ones after a resume or a redraw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drawn_rounds import CAPTIONS, Kept, Pictures, draw, settings
from PIL import Image
from run_folders import contents, drawn

from fastory import InputError, Story, StoryModel, generate
from fastory.events import FrameDrawn
from fastory.modes.drawn_rounds import DrawnRounds
from fastory.modes.iterative import iterative
from fastory.modes.mode import StoryPlan
from fastory.settings import Settings

GIVEN = {"steps": 2, "iterations": 1, "references_from": "latest"}
SHORT = Story.from_captions(CAPTIONS, title="latest")


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


class Given(Kept):
    """The paper's rule, shown the pictures that a micro-batch is to see; those not drawn yet are left out."""

    def __init__(self, seen: Pictures, drawn_now: range) -> None:
        super().__init__(seen)
        self.drawn_now = drawn_now

    def has(self, round: int, frame: int) -> bool:
        return round == 0 or frame not in self.drawn_now

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        if (0, frame) not in self.pictures:
            return Image.new("RGB", (128, 128)), "not drawn yet"
        return self.pictures[0, frame], None


def by_the_papers_rule(model: StoryModel, chosen: Settings, seen: Pictures, members: range) -> Pictures:
    """Frames of round 1 drawn from round 0's pictures as given."""
    plan = StoryPlan(Story.from_captions(CAPTIONS), chosen, finished=Given(seen, members))
    events = iterative(model, plan, batch_sizes=[2])
    return {(e.round, e.frame): e.image for e in events if isinstance(e, FrameDrawn)}


@pytest.mark.parametrize("rule", ["all", "others"])
def test_a_micro_batch_sees_those_before_it_and_the_last_round_of_the_rest(
    model: StoryModel, rule: str
) -> None:
    """Held against the paper's rule on the same references, micro-batch by micro-batch, byte by byte."""
    chosen = settings(steps=2, iterations=1, reference_scale=(0.4, 0.5), references=rule)
    found = draw(model, CAPTIONS, settings(**GIVEN, reference_scale=(0.4, 0.5), references=rule), 2)
    assert len(found) == 10
    alone = draw(model, CAPTIONS, settings(steps=2, iterations=0), 2)
    assert all(
        found[0, i].tobytes() == alone[0, i].tobytes() for i in (0, 1)
    )  # the anchors see captions alone
    for k in (0, 1):
        for members in (range(2), range(2, 4), range(4, 5)):
            seen = {
                (0, j): found[k if j < members.start else k - 1, j]
                for j in range(5)
                if k or j < members.start
            }
            if not seen:
                continue
            again = by_the_papers_rule(model, chosen, seen, members)
            assert {i for _, i in again} == set(members)
            assert all(again[1, i].tobytes() == found[k, i].tobytes() for i in members)


def test_without_iterations_later_micro_batches_see_the_first(model: StoryModel) -> None:
    first = draw(model, CAPTIONS, settings(**GIVEN), 2)
    only = draw(model, CAPTIONS, settings(**{**GIVEN, "iterations": 0}), 2)
    assert {key: image.tobytes() for key, image in only.items()} == {
        key: image.tobytes() for key, image in first.items() if key[0] == 0
    }


@pytest.mark.parametrize("end", [(0, 2), (1, 2)])
def test_a_run_that_ends_within_a_round_is_resumed_to_the_same_bytes(
    model: StoryModel, tmp_path: Path, end: tuple[int, int]
) -> None:
    given = {"model": model, "batch_size": 2, **GIVEN}
    list(generate(SHORT, output=tmp_path / "whole", **given))
    for event in generate(SHORT, output=tmp_path / "cut", **given):
        if isinstance(event, FrameDrawn) and (event.round, event.frame) == end:
            break
    # The micro-batches of a run are its own: what a resume asks for does not count.
    list(generate(SHORT, output=tmp_path / "cut", **{**given, "batch_size": 5}))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_characters_of_their_own_are_resumed_to_the_same_bytes(model: StoryModel) -> None:
    captions = [
        "Ann, a fox, is jumping",
        "Bob, a bear, is standing",
        "Ann and Bob are sleeping",
        "Ann is running",
    ]
    chosen = settings(**GIVEN, references="others", regions="on")
    whole = draw(model, captions, chosen, 2)
    kept = {key: image for key, image in whole.items() if key <= (1, 2)}
    rest = draw(model, captions, chosen, 2, kept)
    assert {key: image.tobytes() for key, image in rest.items()} == {(1, 3): whole[1, 3].tobytes()}


def test_a_redrawn_frame_sees_the_others_as_they_are_and_they_stay(model: StoryModel, tmp_path: Path) -> None:
    given = {"model": model, "batch_size": 2, "output": tmp_path / "run", **GIVEN, "noise": "per-frame"}
    list(generate(SHORT, **given))
    names = [f"iteration-{k:02d}/frame-{i:03d}.png" for k in (0, 1) for i in range(5)]
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    events = list(generate(SHORT, **given, frames=[2], redraw_seed=7))
    assert drawn(events) == {(0, 2), (1, 2)}
    changed = {name for name in names if (tmp_path / "run" / name).read_bytes() != before[name]}
    assert changed == {"iteration-00/frame-002.png", "iteration-01/frame-002.png"}
    # Round 0's frame 4 saw the old frame 2: what is lost of it cannot come back.
    (tmp_path / "run/iteration-00/frame-004.png").unlink()
    with pytest.raises(InputError, match="cannot be drawn again as it was"):
        list(generate(SHORT, **given))


def test_a_round_that_begins_again_forgets_what_it_drew(model: StoryModel) -> None:
    """As when memory runs out: the pictures of larger micro-batches count no more."""
    old, new = Image.new("RGB", (128, 128), "red"), Image.new("RGB", (128, 128), "blue")
    rounds = DrawnRounds(model, settings(**GIVEN), Kept({(0, 0): old, (1, 0): new}), None)
    rounds.add(0, 0, old, None)
    rounds.add(1, 0, old, None)
    rounds.begin(1)
    seen = [rounds.seen(k, 0).whole for k in (0, 1)]
    wanted = [model.encode_reference(image) for image in (old, new)]
    assert all((a == b).all() for a, b in zip(seen, wanted, strict=True))  # type: ignore[union-attr]


def test_the_papers_rule_is_the_run_that_it_was_and_the_other_says_so(
    model: StoryModel, tmp_path: Path
) -> None:
    given = {"model": model, "steps": 1, "iterations": 1, "reference_scale": (0.3, 0.5)}
    story = Story.from_captions(CAPTIONS[:2])
    list(generate(story, output=tmp_path / "last", **given, references_from="last"))
    manifest = json.loads((tmp_path / "last/manifest.json").read_text())
    assert "references_from" not in manifest["settings"]
    with Image.open(tmp_path / "last/iteration-01/frame-000.png") as picture:
        assert "references_from" not in json.loads(picture.text["fastory"])
    with pytest.raises(InputError, match="references_from: None there, 'latest' here"):
        list(generate(story, output=tmp_path / "last", **given, references_from="latest"))
    list(generate(story, output=tmp_path / "latest", **given, references_from="latest", batch_size=1))
    with Image.open(tmp_path / "latest/iteration-00/frame-001.png") as picture:
        said = json.loads(picture.text["fastory"])
    assert (said["references_from"], said["reference_scale"]) == ("latest", 0.3)
    with pytest.raises(InputError, match=r"references_from .*wanted one of last, latest"):
        list(generate(story, **given, references_from="first"))
