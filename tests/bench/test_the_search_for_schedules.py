"""A search for cheaper schedules that searches on what it reports, or loses rows, tells a story of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schedules
from schedules import PAPER, Candidate, Rows, Search, candidates, changed, main, merit, pareto, rule, schedule

from fastory.builtin.evaluation.classifier import load_classifier
from fastory.builtin.evaluation.iterative import HeldOutStory
from fastory.builtin.world.drawing import Character, Role, Scene, Tale, draw
from fastory.models.torch_model import StoryModel
from fastory.settings import Settings, resolve


def row(candidate: Candidate, story: int, calls: float, colour: float) -> dict[str, Any]:
    scores = {"colour": colour, "hat": 1.0, "scarf": 1.0, "species": 1.0}
    return {
        "name": candidate.name,
        "key": candidate.key,
        "seed": 7,
        "story": story,
        "calls": calls,
        "scores": scores,
    }


def test_a_story_is_drawn_once_and_its_unet_calls_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedules, "CALIBRATED", 1)
    file, few = tmp_path / "rows.jsonl", schedule(2, 2, "latest", size=2)
    monkeypatch.setattr(schedules, "candidates", lambda: [few])
    command = ["--out", str(file), "--stories", "1", "--seed", "7", "--only", few.name]
    main(command)
    (line,) = file.read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    assert found["calls"] == 2 + 2 + 15  # two rounds of 2 steps, the last of 15
    assert {"colour", "hat", "scarf", "species", "edge energy"} <= set(found["scores"])
    main(command)
    assert file.read_text(encoding="utf-8").splitlines() == [line]
    assert f"| 19 * | {few.name} | 1 |" in capsys.readouterr().out


def test_what_is_reported_on_is_not_searched_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--out", "rows.jsonl", "--seed", "1"])
    assert ended.value.code == 2 and "reported on" in capsys.readouterr().err


def test_an_unknown_candidate_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--out", "rows.jsonl", "--only", "the best"])
    assert ended.value.code == 2 and PAPER in capsys.readouterr().err


def test_the_better_half_of_every_price_goes_on(tmp_path: Path) -> None:
    cheap, dear = [schedule(n, 2, "last") for n in (1, 2, 3)], [schedule(n, 9, "last") for n in (4, 5)]
    rows = Rows(tmp_path / "rows.jsonl", "weights")
    for calls, several in ((18.0, cheap), (60.0, dear)):
        for n, candidate in enumerate(several):
            rows.add(row(candidate, 0, calls, 0.5 + 0.1 * n))
    search = Search(None, None, (), 7, 0.0, rows, math.inf)  # type: ignore[arg-type]
    assert search.better_half([*cheap, *dear], 1) == [cheap[2], cheap[1], dear[1]]


def test_rows_of_other_weights_are_left_alone(tmp_path: Path) -> None:
    (candidate, *_) = candidates()
    Rows(tmp_path / "rows.jsonl", "older").add(row(candidate, 0, 18.0, 1.0))
    assert Rows(tmp_path / "rows.jsonl", "newer").of(candidate, 7) == {}
    assert set(Rows(tmp_path / "rows.jsonl", "older").of(candidate, 7)) == {0}


def test_what_another_beats_in_price_and_merit_has_no_star() -> None:
    assert pareto([18, 27, 27, 165], [2.0, 1.9, 2.5, 2.5]) == [True, False, True, False]


def test_a_story_without_two_characters_counts_in_what_it_has() -> None:
    candidate = schedule(1, 2, "last")
    alone, two = row(candidate, 0, 18, 0.5), row(candidate, 1, 18, 0.7)
    two["scores"]["distinct"] = 0.4
    assert merit([alone, two]) == pytest.approx((0.6 + 1 + 1) / 3 + 1.0 + 0.4)


def test_a_colour_that_turns_late_is_counted_and_one_that_turns_early_is_not() -> None:
    scenes = tuple(Scene(place, (Role(0, "ball"),)) for place in ("snow", "city", "forest"))

    def shown(colour: str) -> np.ndarray:
        cast = (Character("fox", colour, "none", "none"),)
        return np.stack([np.asarray(draw(cast, scene, np.random.default_rng(0))) for scene in scenes])

    story = HeldOutStory(Tale((Character("fox", "red", "none", "none"),), scenes), ("",) * 3, 0)
    red, blue, classifier = shown("red"), shown("blue"), load_classifier()
    assert not changed(classifier, story, [red, blue, blue, blue, blue, blue])
    assert changed(classifier, story, [red, red, red, red, blue])
    assert changed(classifier, story, [red, red, red, red, blue, red])


def test_a_candidate_stands_beside_the_papers_rule_whatever_the_model_ships() -> None:
    model = StoryModel.open("builtin")
    told = resolve(rule(model), {}, None, model.defaults)[0]
    paper = Settings(steps=15)
    assert all(getattr(told, name) == getattr(paper, name) for name in rule(model) if name != "noise")
    # What is not about the schedule is the model's own, and the noise that of its first round in all.
    assert told.noise == model.defaults["noise"] == "per-frame" != model.defaults["iterative"]["noise"]
    assert told.guidance_scale == model.defaults["guidance_scale"] != paper.guidance_scale
