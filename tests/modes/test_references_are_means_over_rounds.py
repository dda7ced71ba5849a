"""Risk: a mean over rounds mixes other pictures, rounds or weights than it says, or is another one after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drawn_rounds import CAPTIONS, Kept, draw, noise, settings
from PIL import Image
from ranks import run_alone_and_in_two
from run_folders import contents, end_and_resume, is_picture, redraw_one

from fastory import InputError, Story, StoryModel, generate
from fastory.modes.drawn_rounds import DrawnRounds
from fastory.modes.iterative import prepare_round
from fastory.modes.mode import StoryPlan

SHORT = CAPTIONS[:3]
STORY = Story.from_captions(SHORT, title="momentum")
GIVEN = {"iterations": 3, "steps": 2, "reference_momentum": 0.6, "batch_size": 2}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_reference_is_the_moving_average_of_its_pictures_tokens(
    model: StoryModel, one_by_one: bool
) -> None:
    """Held against the closed form in float64; as asked for round by round, and at once, as after a resume."""
    pictures, momentum = noise(4), 0.6
    rounds = DrawnRounds(model, settings(iterations=4, reference_momentum=momentum), Kept(pictures), None)
    for k in range(4) if one_by_one else ():
        rounds.begin(k)
        for i in range(3 if k else 0):
            rounds.as_reference(k - 1, i)
    rounds.begin(4)
    tokens = [model.encode_reference(pictures[k, 1]).double() for k in range(4)]
    weights = [momentum**3, *(momentum ** (3 - k) * (1 - momentum) for k in (1, 2, 3))]
    wanted = sum(weight * token for weight, token in zip(weights, tokens, strict=True))
    found = rounds.as_reference(3, 1).whole
    assert found is not None and sum(weights) == pytest.approx(1)
    # float32: three times a product and a sum of numbers of the tokens' size
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_the_mean_is_what_attention_reads_and_none_is_the_last_picture(model: StoryModel) -> None:
    pictures = noise(2)

    def keys_values(momentum: float) -> torch.Tensor:
        chosen = settings(iterations=2, steps=1, reference_momentum=momentum)
        sampler, _ = prepare_round(model, StoryPlan(STORY, chosen, finished=Kept(pictures)), 2, 1)
        return sampler.context.ref_kv  # type: ignore[union-attr]

    per_ref = model.tokens_per_ref
    plain, mean = keys_values(0.0)[:, :per_ref].clone(), keys_values(0.25)[:, :per_ref]
    old, new = (
        model.layers.project_references(model.encode_reference(pictures[k, 0]).clone()) for k in (0, 1)
    )
    torch.testing.assert_close(plain, new, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        mean, 0.25 * old + 0.75 * new, rtol=1e-4, atol=1e-4
    )  # the projection is linear
    assert (mean - plain).abs().max() > 1e-2


def test_a_picture_that_is_left_out_is_no_reference_and_the_mean_begins_anew(model: StoryModel) -> None:
    pictures = noise(3)

    class LeftOut(Kept):
        def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
            return super().load(round, frame)[0], "holds non-finite values" if round == 1 else None

    rounds = DrawnRounds(model, settings(iterations=3, reference_momentum=0.5), LeftOut(pictures), None)
    rounds.begin(3)
    assert rounds.as_reference(1, 0).whole is None
    found = rounds.as_reference(2, 0).whole
    assert found is not None and (found == model.encode_reference(pictures[2, 0])).all()


@pytest.mark.parametrize("latest", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_is_resumed_to_the_same_bytes(model: StoryModel, tmp_path: Path, latest: bool) -> None:
    given = {"model": model, **GIVEN} | ({"references_from": "latest"} if latest else {})
    list(generate(STORY, output=tmp_path / "whole", **given))
    end_and_resume(STORY, tmp_path / "cut", is_picture(3, 1), **given)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_redrawn_frame_leaves_the_others_alone(model: StoryModel, tmp_path: Path) -> None:
    again, changed = redraw_one(STORY, 1, tmp_path / "run", model=model, **{**GIVEN, "iterations": 2})
    assert again == {(k, 1) for k in range(3)}
    assert changed == {1}


@pytest.mark.slow
def test_several_processes_read_the_same_means(tmp_path: Path) -> None:
    options = ["--iterations=3", "--steps=1", "--reference-momentum=0.6", "--batch-size=1", "--quiet"]
    alone, together = (files for _, files in run_alone_and_in_two(SHORT, options, tmp_path))
    assert alone == together


def test_the_paper_has_none_and_what_it_takes_is_said(model: StoryModel) -> None:
    assert "reference_momentum" not in settings().identity()
    with pytest.raises(InputError, match=r"reference_momentum .*wanted 0 to 0.99, got 1"):
        generate(STORY, model=model, reference_momentum=1)
    once = {"iterations": 1, "steps": 1, "references_from": "last"}
    events = generate(STORY, model=model, reference_momentum=0.5, **once)  # type: ignore[arg-type]
    assert any("`reference_momentum` is not used" in str(event) for event in events)


def test_drawn_from_means_no_picture_is_the_same(model: StoryModel) -> None:
    plain = draw(model, SHORT, settings(iterations=2, steps=2), 3)
    found = draw(model, SHORT, settings(iterations=2, steps=2, reference_momentum=0.5), 3)
    same = {place for place in plain if plain[place].tobytes() == found[place].tobytes()}
    assert same == {(k, i) for k in (0, 1) for i in range(3)}  # round 1 sees one picture of each
