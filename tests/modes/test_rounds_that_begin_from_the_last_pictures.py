"""Risk: a round begins from another picture, with other noise or at another step than it says, or otherwise after a resume."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_rounds import CAPTIONS, Kept, Pictures, draw, settings
from PIL import Image
from ranks import run_alone_and_in_two
from run_folders import contents, end_and_resume, is_step, redraw_one

from fastory import InputError, Story, StoryModel, generate
from fastory.events import StepDone, StoryStarted
from fastory.modes.iterative import prepare_round
from fastory.modes.mode import StoryPlan
from fastory.runs.manifest import picture_name
from fastory.settings import SCHEDULERS, Settings

SHORT = CAPTIONS[:3]
STORY = Story.from_captions(SHORT, title="restart")
GIVEN = {"iterations": 3, "steps": 4, "restart": 0.5, "batch_size": 2}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


@pytest.fixture(scope="module")
def first_rounds(model: StoryModel) -> Pictures:
    return draw(model, SHORT, settings(iterations=1, steps=3), 3)


def steps_within(model: StoryModel, chosen: Settings, pictures: Pictures, start: torch.Tensor | None) -> list:
    """The latents of frame 0 in round 2, before its first step and after each."""
    plan = StoryPlan(STORY, chosen, finished=Kept(pictures))
    sampler, (row, *_) = prepare_round(model, plan, 2, 1)
    row = row if start is None else replace(row, start=start)
    begun = sampler.first_latents(sampler.noise_of(torch.Generator().manual_seed(row.seed)), row.start)
    return [begun, *(sampler.latents.clone() for _ in sampler.denoise([row]))]


@pytest.mark.parametrize("scheduler", ["ddim", "ddim-leading", "euler"])
def test_the_last_steps_from_what_a_whole_round_has_there_are_its_own(
    model: StoryModel, first_rounds: Pictures, scheduler: str
) -> None:
    """The start is solved for from the forward process, x = sqrt(a) x_0 + sqrt(1 - a) noise, in float64."""
    given = {"iterations": 2, "steps": 5, "scheduler": scheduler, "reference_interval": (0.5, 1.0)}
    whole = steps_within(model, settings(**given), first_rounds, None)
    plan = StoryPlan(STORY, settings(**given), finished=Kept(first_rounds))
    sampler, (row, *_) = prepare_round(model, plan, 2, 1)
    a = sampler.scheduler.alphas_cumprod[int(sampler.timesteps[2])].double()
    noise = sampler.noise_of(torch.Generator().manual_seed(row.seed)).double()
    # Euler's latents are those of the others over sqrt(a).
    latents = whole[2].double() * (a.sqrt() if scheduler == "euler" else 1)
    start = (latents - (1 - a).sqrt() * noise) / a.sqrt()
    begun = steps_within(model, settings(**given, restart=0.6), first_rounds, start.float())
    assert len(begun) == 4
    for mine, theirs in zip(begun, whole[2:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["euler-ancestral", "dpm++", "unipc"])
def test_picture_and_noise_have_the_weights_of_their_step(
    model: StoryModel, first_rounds: Pictures, scheduler: str
) -> None:
    chosen = settings(iterations=2, steps=10, scheduler=scheduler, restart=0.6)
    sampler, _ = prepare_round(model, StoryPlan(STORY, chosen, finished=Kept(first_rounds)), 2, 1)
    assert (sampler.skipped, sampler.steps) == (4, 6)
    one, none = torch.ones(1, *sampler.latent_shape), torch.zeros(1, *sampler.latent_shape)
    signal, noise = (
        float(sampler.first_latents(none, one).mean()),
        float(sampler.first_latents(one, none).mean()),
    )
    a = float(sampler.scheduler.alphas_cumprod[int(sampler.timesteps[4])])
    wanted = (1.0, ((1 - a) / a) ** 0.5) if scheduler == "euler-ancestral" else (a**0.5, (1 - a) ** 0.5)
    # Timesteps are rounded, and the schedulers' tables are not: half a step of 1000 is below 0.5 %.
    assert (signal, noise) == pytest.approx(wanted, rel=5e-3)


def test_a_frame_begins_from_its_own_saved_picture(model: StoryModel, first_rounds: Pictures) -> None:
    """One step of a thousand leaves it as the VAE restores it."""
    for image in first_rounds.values():
        assert image.mode == "RGB"
    chosen = settings(iterations=2, steps=1000, restart=0.001)
    found = draw(model, SHORT, chosen, 2, first_rounds)
    restored = [model.decode(model.encode_picture(first_rounds[1, i])).image for i in range(3)]
    for i in range(3):
        apart = [np.abs(np.asarray(found[2, i], float) - np.asarray(r, float)).mean() for r in restored]
        assert apart[i] < 3 < min(apart[:i] + apart[i + 1 :])


def test_a_picture_that_is_left_out_gives_nothing_to_begin_from(
    model: StoryModel, first_rounds: Pictures
) -> None:
    class LeftOut(Kept):
        def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
            black = Image.new("RGB", (128, 128))
            return (black, "holds non-finite values") if frame == 0 else super().load(round, frame)

    chosen = settings(iterations=2, steps=4, restart=0.5)
    plan = StoryPlan(STORY, chosen, finished=LeftOut(first_rounds))
    sampler, rows = prepare_round(model, plan, 2, 3)
    assert [row.start is None for row in rows] == [True, False, False]
    list(sampler.denoise(rows))
    assert torch.isfinite(sampler.latents).all()


@pytest.mark.parametrize("latest", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_resumes_to_the_same_bytes_and_its_steps_are_told(
    model: StoryModel, tmp_path: Path, latest: bool
) -> None:
    given = {"model": model, **GIVEN} | ({"references_from": "latest"} if latest else {})
    events = list(generate(STORY, output=tmp_path / "whole", **given))
    steps = Counter(e.round for e in events if isinstance(e, StepDone) for _ in e.frames)
    assert steps == {0: 12, 1: 12, 2: 6, 3: 6}
    (started,) = (event for event in events if isinstance(event, StoryStarted))
    assert started.steps_left == 36
    end_and_resume(STORY, tmp_path / "cut", is_step(3, (2,)), **given)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    with Image.open(tmp_path / "whole" / picture_name(2, 0)) as picture:
        said, line = json.loads(picture.text["fastory"]), picture.text["parameters"]
    assert said["restart"] == 0.5 and "Steps: 4," in line and "Denoising strength: 0.5" in line
    with Image.open(tmp_path / "whole" / picture_name(1, 0)) as picture:
        assert "restart" not in json.loads(picture.text["fastory"])


def test_a_redrawn_frame_begins_from_its_new_picture_and_the_others_stay(
    model: StoryModel, tmp_path: Path
) -> None:
    again, changed = redraw_one(
        STORY, 1, tmp_path / "run", model=model, **{**GIVEN, "iterations": 2, "steps": 2}
    )
    assert again == {(k, 1) for k in range(3)}
    assert changed == {1}


@pytest.mark.slow
def test_several_processes_begin_from_the_same_pictures(tmp_path: Path) -> None:
    options = ["--iterations=2", "--steps=2", "--restart=0.5", "--batch-size=1", "--quiet"]
    alone, together = (files for _, files in run_alone_and_in_two(SHORT, options, tmp_path))
    assert alone == together


def test_what_cannot_begin_from_pictures_is_refused(model: StoryModel) -> None:
    given = {"model": model, "iterations": 2, "steps": 4}
    for value in (0, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"restart .*wanted 0.01 to 1, got"):
            generate(STORY, **given, restart=value)
    with pytest.raises(InputError, match="scheduler pndm begins with steps of its own; wanted one of ddim"):
        generate(STORY, **given, restart=0.5, scheduler="pndm")
    events = generate(STORY, model=model, iterations=1, steps=1, restart=0.5)
    assert any("`restart` is not used" in str(event) for event in events)
    assert [name for name, row in SCHEDULERS.items() if not row.begins_within] == ["pndm"]


def test_the_weight_rises_to_its_last_value_in_the_round_that_is_named() -> None:
    """0 leaves the paper's rule; round 1 has the last weight at once."""
    scales = {
        rise: [settings(iterations=5, reference_rise=rise).reference_scale_of(k) for k in range(6)]
        for rise in (0, 1, 3, 9)
    }
    assert scales[0] == pytest.approx([0, 0.3, 0.35, 0.4, 0.45, 0.5])
    assert scales[1] == pytest.approx([0, *[0.5] * 5])
    assert scales[3] == pytest.approx([0, 0.3, 0.4, 0.5, 0.5, 0.5])
    assert scales[9] == pytest.approx([0, 0.3, 0.325, 0.35, 0.375, 0.4])
    assert "reference_rise" not in settings().identity() and "restart" not in settings().identity()
