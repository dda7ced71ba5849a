"""Risk: a frame is finished too early or never, others are drawn otherwise for it, or a resume comes to other rounds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_rounds import CAPTIONS, PAPERS, Pictures, draw
from PIL import Image
from ranks import run_alone_and_in_two
from run_folders import contents, redraw_one

from fastory import InputError, Story, StoryModel, generate
from fastory.events import FrameDrawn, RoundStarted, StepDone, StoryStarted
from fastory.runs.manifest import picture_name
from fastory.settings import Settings, resolve

SHORT = CAPTIONS[:4]
LAST = 4
# Four animals of one frame each have no references of their own, so that with regions nothing would move.
GIVEN = {
    "iterations": LAST,
    "steps": 2,
    "reference_scale": 0.5,
    "regions": "off",
    "until": "converged",
    **PAPERS,
}
FEWER = {**GIVEN, "iterations": 3}  # for runs in folders
STORY = Story.from_captions(SHORT, title="converged")


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


def moves(model: StoryModel, pictures: Pictures, k: int, frame: int) -> float:
    """The larger cosine distance of round k's picture from those of the two rounds before, in numpy."""
    last, *before = (
        model.encode_reference(pictures[j, frame]).double().flatten().numpy() for j in (k, k - 1, k - 2)
    )
    norms = [np.linalg.norm(last) * np.linalg.norm(old) for old in before]
    return max(1 - float(last @ old) / norm for old, norm in zip(before, norms, strict=True))


@pytest.fixture(scope="module")
def plain(model: StoryModel) -> Settings:
    """The built-in model's settings with few steps, without the rule that is tested."""
    return resolve({**GIVEN, "until": "iterations"}, {}, None, model.defaults)[0]


@pytest.fixture(scope="module")
def tolerance(model: StoryModel, plain: Settings) -> float:
    """One that two of the four frames meet in round 2."""
    pictures = draw(model, SHORT, plain, 2)
    found = sorted(moves(model, pictures, 2, i) for i in range(4))
    assert found[2] > 1.01 * found[1] > 0
    return float(found[1] + found[2]) / 2


def test_frames_stay_from_the_round_on_in_which_the_oracle_says_so(
    model: StoryModel, plain: Settings, tolerance: float
) -> None:
    """The others are drawn from the same references as by the paper's rule, byte by byte."""
    found = draw(model, SHORT, replace(plain, until="converged", tolerance=tolerance), 1)
    assert set(found) == {(k, i) for k in range(LAST + 1) for i in range(4)}
    finished: set[int] = set()
    for k in range(3, LAST + 1):
        finished |= {i for i in range(4) if moves(model, found, k - 1, i) <= tolerance}
        before = {place: image for place, image in found.items() if place[0] < k}
        # Of the rounds after k nothing is asked.
        kept = {**before, **{place: image for place, image in found.items() if place[0] > k}}
        by_the_paper = draw(model, SHORT, plain, 1, kept)
        for i in range(4):
            wanted = found[k - 1, i] if i in finished else by_the_paper[k, i]
            assert found[k, i].tobytes() == wanted.tobytes()
        assert finished and (k > 3 or len(finished) == 2)


def test_finished_frames_take_no_unet_calls_and_say_when(model: StoryModel, tolerance: float) -> None:
    """Those that are left are drawn together: two of four in micro-batches of two are one in place of two."""
    events = list(generate(STORY, model=model, batch_size=2, tolerance=tolerance, **GIVEN))
    ended = {(e.round, e.frame): e.converged for e in events if isinstance(e, FrameDrawn)}
    stayed = {place for place, round in ended.items() if round is not None}
    assert {i for k, i in stayed if k == 3} == {i for i in range(4) if ended[3, i] == 2}
    assert len([1 for k, _ in stayed if k == 3]) == 2
    batches = Counter(e.round for e in events if isinstance(e, StepDone) and e.step == 1)
    assert batches[2] == 2 and batches[3] == 1
    steps = Counter((e.round, i) for e in events if isinstance(e, StepDone) for i in e.frames)
    assert set(steps) == set(ended) - stayed
    assert [e.steps for e in events if isinstance(e, RoundStarted)] == [2] * (LAST + 1)


def test_a_story_ends_when_all_frames_have(model: StoryModel) -> None:
    events = list(generate(STORY, model=model, batch_size=2, tolerance=2.0, **GIVEN))
    assert {e.round for e in events if isinstance(e, StepDone)} == {0, 1, 2}
    assert [e.converged for e in events if isinstance(e, FrameDrawn)] == [None] * 12 + [2] * 8


@pytest.mark.parametrize(("latest", "end"), [(False, 13), pytest.param(True, 15, marks=pytest.mark.slow)])
def test_a_run_that_ends_anywhere_is_resumed_to_the_same_bytes(
    model: StoryModel, tmp_path: Path, tolerance: float, latest: bool, end: int
) -> None:
    """Of 12 pictures of the rounds before two are finished: ended after one of these in round 3, or after one that is drawn."""
    given = {"model": model, "batch_size": 2, "tolerance": tolerance, **FEWER}
    given |= {"references_from": "latest"} if latest else {}
    events = list(generate(STORY, output=tmp_path / "whole", **given))
    assert any(e.converged is not None for e in events if isinstance(e, FrameDrawn))
    seen = 0
    for event in generate(STORY, output=tmp_path / "cut", **given):
        seen += isinstance(event, FrameDrawn)
        if seen == end:
            break
    list(generate(STORY, output=tmp_path / "cut", **given))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_manifest_picture_and_page_say_when(model: StoryModel, tmp_path: Path, tolerance: float) -> None:
    run = tmp_path / "run"
    events = list(generate(STORY, model=model, output=run, batch_size=2, tolerance=tolerance, **FEWER))
    (started,) = (event for event in events if isinstance(event, StoryStarted))
    assert started.steps_left == 4 * 4 * 2  # at most
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["settings"]["until"], manifest["settings"]["tolerance"]) == ("converged", tolerance)
    stayed = [i for i in range(4) if manifest["pictures"]["3"][str(i)].get("converged") == 2]
    assert len(stayed) == 2
    page = (run / "storybook.html").read_text()
    assert page.count("no change after round 2") == 2 and "at most 3, until it moves by" in page
    with Image.open(run / picture_name(3, stayed[0])) as picture:
        assert json.loads(picture.text["fastory"])["converged"] == 2
        assert picture.tobytes() == Image.open(run / picture_name(2, stayed[0])).tobytes()


def test_a_redrawn_frame_is_finished_by_its_own_pictures_and_the_others_stay(
    model: StoryModel, tmp_path: Path, tolerance: float
) -> None:
    given = {"model": model, "batch_size": 2, "tolerance": tolerance, **FEWER}
    again, changed = redraw_one(STORY, 2, tmp_path / "run", **given)
    assert again == {(k, 2) for k in range(4)}
    assert changed == {2}


def test_the_last_round_is_drawn_in_full_after_inner_rounds_of_few_steps(model: StoryModel) -> None:
    given = {**GIVEN, "steps": 3, "inner_steps": 2, "tolerance": 2.0}
    events = list(generate(STORY, model=model, batch_size=2, **given))
    steps = Counter(e.round for e in events if isinstance(e, StepDone) for _ in e.frames)
    assert steps == {0: 8, 1: 8, 2: 8, 4: 12}
    assert {e.converged for e in events if isinstance(e, FrameDrawn) and e.round == LAST} == {None}


def test_several_processes_finish_the_same_frames(tmp_path: Path, tolerance: float) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FEWER.items()]
    options += [f"--tolerance={tolerance}", "--batch-size=1", "--json"]
    found = []
    for ended, files in run_alone_and_in_two(SHORT, options, tmp_path):
        events = [json.loads(line) for line in ended.out.splitlines()]
        stayed = {(e["round"], e["frame"]) for e in events if e["event"] == "FrameDrawn" and e["converged"]}
        found.append((stayed, files))
    assert found[0] == found[1] and found[0][0]


def test_what_cannot_be_meant_is_refused_and_what_decides_nothing_is_said(
    model: StoryModel, tmp_path: Path
) -> None:
    story = Story.from_captions(SHORT[:1])
    for value in (-0.1, 2.5, float("nan")):
        with pytest.raises(InputError, match=r"tolerance .*wanted 0 to 2, got"):
            generate(story, model=model, until="converged", tolerance=value)
    with pytest.raises(InputError, match="wanted one of iterations, converged"):
        generate(story, model=model, until="good")
    few = {"model": model, "iterations": 0, "steps": 1}
    assert any("`tolerance` is not used" in str(e) for e in generate(story, **few, tolerance=0.1))
    assert any("`until` is not used" in str(e) for e in generate(story, **few, until="converged"))
    list(generate(story, **few, output=tmp_path / "run", tolerance=0.1))
    said = json.loads((tmp_path / "run/manifest.json").read_text())["settings"]
    assert not {"until", "tolerance"} & set(said)  # a run of before is this one
