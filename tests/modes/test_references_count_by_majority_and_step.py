"""Risk: a reference's weight reaches keys or the null block, the wrong frames count less, or a step reads another's weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_rounds import CAPTIONS, Kept, draw, settings
from PIL import Image
from ranks import run_alone_and_in_two
from run_folders import contents, end_and_resume, is_picture, redraw_one

from fastory import InputError, Story, StoryModel, generate
from fastory.events import StepDone
from fastory.modes.iterative import iterative, prepare_round
from fastory.modes.mode import StoryPlan
from fastory.modes.weighting import majority_weights, ramp
from fastory.sampling.sampler import Sampler

SHORT = CAPTIONS[:4]
STORY = Story.from_captions(SHORT, title="weights")
GIVEN = {
    "iterations": 2,
    "steps": 2,
    "reference_weighting": "majority",
    "reference_ramp": "0.5:1",
    "batch_size": 2,
}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


def first_pictures() -> dict[tuple[int, int], Image.Image]:
    """Three of one colour with some noise, and one of another."""
    rng = np.random.default_rng(2)
    colours = [(200, 60, 40)] * 3 + [(30, 60, 220)]
    noise = [rng.integers(0, 40, (128, 128, 3)) for _ in colours]
    return {
        (0, i): Image.fromarray(np.clip(n + np.array(c), 0, 255).astype(np.uint8))
        for i, (c, n) in enumerate(zip(colours, noise, strict=True))
    }


@pytest.mark.parametrize("count", [3, 4, 7])
def test_weights_are_those_of_the_medians(count: int) -> None:
    """Held against numpy, pair by pair; a frame of another kind counts least."""
    rng = np.random.default_rng(count)
    common = rng.normal(size=(1, 2, 8))
    tokens = [common + 0.2 * rng.normal(size=(1, 2, 8)) for _ in range(count - 1)]
    tokens.append(rng.normal(size=(1, 2, 8)))
    found = majority_weights([torch.tensor(t, dtype=torch.float32) for t in tokens])

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a.astype(np.float32).ravel().astype(float), b.astype(np.float32).ravel().astype(float)
        return 1 - float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))

    apart = [
        float(np.median([distance(tokens[i], tokens[j]) for j in range(count) if j != i]))
        for i in range(count)
    ]
    wanted = [min(1.0, float(np.median(apart)) / d) for d in apart]
    assert found == pytest.approx(wanted, rel=1e-9)
    assert found[-1] == min(found) < 0.9
    assert sum(weight == 1 for weight in found) >= count / 2


def test_without_a_majority_all_count_alike() -> None:
    one, other = torch.eye(2)[0].reshape(1, 1, 2), torch.eye(2)[1].reshape(1, 1, 2)
    assert majority_weights([one, other]) == [1, 1]
    assert majority_weights([one, None, other, None]) == [1, 1, 1, 1]
    assert majority_weights([one, one, one, other]) == [1, 1, 1, 0]  # the others are one picture
    assert majority_weights([]) == []


def test_values_alone_are_weighted_and_the_null_block_is_not(model: StoryModel) -> None:
    pictures = first_pictures()

    def of(weighting: str) -> torch.Tensor:
        chosen = settings(iterations=1, steps=1, references="all", reference_weighting=weighting)
        sampler, _ = prepare_round(model, StoryPlan(STORY, chosen, finished=Kept(pictures)), 1, 1)
        return sampler.context.ref_kv.clone()  # type: ignore[union-attr]

    plain, weighted = of("equal"), of("majority")
    weights = majority_weights([model.encode_reference(pictures[0, i]) for i in range(4)])
    assert min(weights) == weights[3] < 0.9
    each = torch.tensor([*weights, 1.0]).repeat_interleave(model.tokens_per_ref)[None, :, None, None]
    for layer in model.layers.layers:
        (keys, values), (own_keys, own_values) = layer.keys_values(plain), layer.keys_values(weighted)
        assert torch.equal(own_keys, keys)
        assert torch.equal(own_values, values * each)


def test_every_step_reads_its_own_weight(model: StoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a round begins within the schedule, and in the micro-batch after."""
    pictures = {**first_pictures(), **{(1, i): image for (_, i), image in first_pictures().items()}}
    chosen = settings(
        iterations=2, steps=5, reference_scale=(0.4, 0.4), reference_ramp=(0.5, 1.5), restart=0.6
    )

    class Watched(Kept):
        def has(self, round: int, frame: int) -> bool:
            return round < 2

    samplers: list[Sampler] = []
    set_round = Sampler.set_round

    def kept(sampler: Sampler, *references: Any) -> None:
        samplers.append(sampler)
        set_round(sampler, *references)

    monkeypatch.setattr(Sampler, "set_round", kept)
    plan = StoryPlan(STORY, chosen, finished=Watched(pictures))
    steps = (event for event in iterative(model, plan, batch_sizes=[2]) if isinstance(event, StepDone))
    seen = [float(samplers[0].context.scale[0]) for _ in steps]  # type: ignore[union-attr]
    assert seen == pytest.approx([0.4 * factor for factor in (1.0, 1.25, 1.5)] * 2)
    assert ramp(settings(reference_ramp=(0.5, 1.5)), 0, 1) == 1.5


def test_a_ramp_that_is_level_is_another_weight(model: StoryModel) -> None:
    """Byte by byte: powers of two are exact."""
    given = {"iterations": 1, "steps": 2}
    wanted = draw(model, SHORT, settings(**given, reference_scale=(0.5, 0.5)), 2)
    found = draw(model, SHORT, settings(**given, reference_scale=(0.25, 0.25), reference_ramp=(2.0, 2.0)), 2)
    assert all(found[place].tobytes() == wanted[place].tobytes() for place in wanted)


def test_a_run_is_resumed_to_the_same_bytes(model: StoryModel, tmp_path: Path) -> None:
    list(generate(STORY, model=model, output=tmp_path / "whole", **GIVEN))
    end_and_resume(STORY, tmp_path / "cut", is_picture(2, 1), model=model, **GIVEN)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    page = (tmp_path / "whole/storybook.html").read_text()
    assert "times 0.5 to 1 within a round" in page and "less of those that differ from most" in page


@pytest.mark.slow
def test_a_redrawn_frame_leaves_the_others_alone(model: StoryModel, tmp_path: Path) -> None:
    again, changed = redraw_one(STORY, 1, tmp_path / "run", model=model, **GIVEN)
    assert again == {(k, 1) for k in range(3)}
    assert changed == {1}


@pytest.mark.slow
def test_several_processes_weigh_alike(tmp_path: Path) -> None:
    options = ["--iterations=1", "--steps=2", "--batch-size=1", "--quiet"]
    options += ["--reference-weighting=majority", "--reference-ramp=0.5:1"]
    alone, together = (files for _, files in run_alone_and_in_two(SHORT, options, tmp_path))
    assert alone == together


def test_the_paper_has_neither_and_what_they_take_is_said(model: StoryModel) -> None:
    assert not {"reference_weighting", "reference_ramp"} & set(settings().identity())
    with pytest.raises(InputError, match="wanted one of equal, majority"):
        generate(STORY, model=model, reference_weighting="most")
    with pytest.raises(InputError, match=r"reference_ramp .*wanted 0 to 10 for both"):
        generate(STORY, model=model, reference_ramp="1:11")
