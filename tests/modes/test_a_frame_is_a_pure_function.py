"""With schedulers that draw noise at every step, too, a frame's bytes depend on its model, caption, context and seed alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from small_history import pictures, tell, write_causal_folder

from fastory import Story, StoryModel, generate
from fastory.events import FrameDrawn, StepDone
from fastory.modes.causal import causal, prepare_frame
from fastory.modes.iterative import iterative
from fastory.modes.mode import StoryPlan
from fastory.sampling.sampler import Row, Sampler
from fastory.sampling.schedulers import SchedulerStep
from fastory.settings import Settings

CAPTIONS = ["a red fox in the sea", "the rabbit sleeps", "a fox and a rabbit", "robinson swims"]
OTHERS = ["the forest", "a blue fox sleeps", "the red rabbit swims", "a rabbit in the forest", "a fox"]
# Every scheduler that may draw noise while it steps; `sde` is DPM++ where the checkpoint's own configuration says so.
NOISY = ["euler-ancestral", "lcm", "sde"]
Pictures = dict[int, bytes]


def distilled_folder(base: Path, folder: Path) -> Path:
    """The same checkpoint with a UNet that takes the guidance scale as an input, as LCM's do."""
    shutil.copytree(base, folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    torch.manual_seed(3)
    made = UNet2DConditionModel(**{**config, "time_cond_proj_dim": 16})
    made.load_state_dict(unet.state_dict(), strict=False)
    made.save_pretrained(folder / "unet")
    return folder


def sde_folder(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "algorithm_type": "sde-dpmsolver++"}))
    return folder


@pytest.fixture(scope="module")
def models(
    sd15_folder: Path, sd15_adapter_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, StoryModel]:
    """For both modes, by scheduler."""
    folder = tmp_path_factory.mktemp("noisy")
    plain = write_causal_folder(sd15_folder, folder / "plain")
    folders = {
        "euler-ancestral": plain,
        "lcm": distilled_folder(plain, folder / "lcm"),
        "sde": sde_folder(plain, folder / "sde"),
    }
    return {
        name: StoryModel.open(str(path), ip_adapter=str(sd15_adapter_base), device="cpu")
        for name, path in folders.items()
    }


@pytest.fixture(params=NOISY)
def scheduler(request: pytest.FixtureRequest) -> str:
    return request.param


def options(scheduler: str) -> dict[str, object]:
    return {"scheduler": "dpm++" if scheduler == "sde" else scheduler, "steps": 2, "noise": "per-frame"}


def settings(scheduler: str, **values: object) -> Settings:
    return Settings(**{"width": 64, "height": 64, **options(scheduler), **values})  # type: ignore[arg-type]


def story(captions: list[str], title: str = "one") -> Story:
    return Story.from_captions(captions, title=title)


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("frame-*.png"))}


def iterate(
    model: StoryModel, captions: list[str], scheduler: str, output: Path | None = None, size: int = 2
) -> list[FrameDrawn]:
    events = generate(
        story(captions), model=model, output=output, batch_size=size, iterations=1, **options(scheduler)
    )
    return [event for event in events if isinstance(event, FrameDrawn)]


def test_these_schedulers_do_draw_noise(models: dict[str, StoryModel], scheduler: str) -> None:
    """The tests below can fail: the pictures hang on the generator after the initial noise was drawn from it."""
    drawn = []
    for seed in (1, 2):
        sampler = Sampler(models[scheduler], settings(scheduler), 1, 64, 64)
        latents = torch.ones(2, *sampler.latent_shape)
        sampler.scheduler.set_timesteps(2)
        sampler.scheduler.scale_model_input(latents, sampler.scheduler.timesteps[0])
        generators = [torch.Generator().manual_seed(seed), torch.Generator().manual_seed(7)]
        with SchedulerStep(torch.device("cpu"), generators):
            drawn.append(
                sampler.scheduler.step(latents, sampler.scheduler.timesteps[0], latents, return_dict=False)[0]
            )
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


# --- side by side in causal mode -------------------------------------------------------------------------------------


def side_by_side(model: StoryModel, stories: list[Story], scheduler: str, drafts: int = 0) -> list[Pictures]:
    """Each story's pictures, drawn in batches of two whatever their number."""
    chosen = settings(scheduler, mode="causal", window=2, drafts=drafts)
    plans = [StoryPlan(one, chosen, index) for index, one in enumerate(stories)]
    found: list[Pictures] = [{} for _ in stories]
    for event in causal(model, plans, batch_sizes=[2], size=(64, 64)):
        if isinstance(event, FrameDrawn):
            found[event.story_index][event.frame] = event.image.tobytes()
    return found


@pytest.mark.parametrize("drafts", [0, 1])
def test_a_causal_story_is_the_same_beside_any_neighbour(
    models: dict[str, StoryModel], scheduler: str, drafts: int
) -> None:
    """A neighbour that is longer, as long, shorter, much shorter, before or behind it, or none."""
    model, one = models[scheduler], story(CAPTIONS)
    (alone,) = side_by_side(model, [one], scheduler, drafts)
    assert len(alone) == 4
    for count in (5, 2) if drafts else (5, 4, 1):
        other = story(OTHERS[:count], "other")
        for place, both in ((0, [one, other]), (1, [other, one])):
            assert side_by_side(model, both, scheduler, drafts)[place] == alone, (count, place)


@pytest.mark.parametrize("lost", [[("one", 3)], [("one", 0), ("other", 1)], [("other", 2)]])
def test_causal_stories_side_by_side_resume_to_the_same_bytes(
    models: dict[str, StoryModel], scheduler: str, lost: list[tuple[str, int]], tmp_path: Path
) -> None:
    """Pictures of one story are missing while those of its neighbour are there, and the other way round."""
    both = [story(CAPTIONS), story(OTHERS[:3], "other")]
    chosen = {**options(scheduler), "window": 2}
    list(tell(models[scheduler], both, tmp_path, **chosen))
    whole = on_disk(tmp_path)
    for name, frame in lost:
        (tmp_path / name / "iteration-00" / f"frame-{frame:03d}.png").unlink()
    assert len(pictures(tell(models[scheduler], both, tmp_path, **chosen))) == len(lost)
    assert on_disk(tmp_path) == whole


def test_a_causal_story_may_begin_from_a_picture_beside_one_that_does_not(
    models: dict[str, StoryModel], scheduler: str, tmp_path: Path
) -> None:
    """Frame 0 of the one is given: its place is taken by the other's row, which must not change by that."""
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "first.png")
    given = replace(story(OTHERS[:3], "other"), first_frame=tmp_path / "first.png")
    (alone,) = side_by_side(models[scheduler], [story(CAPTIONS)], scheduler, drafts=1)
    assert side_by_side(models[scheduler], [given, story(CAPTIONS)], scheduler, drafts=1)[1] == alone


# --- iterative mode --------------------------------------------------------------------------------------------------


def test_a_frame_of_round_0_is_the_same_beside_any_neighbour(
    models: dict[str, StoryModel], scheduler: str
) -> None:
    """Drawn alone in a micro-batch of two, beside another caption, and behind one."""

    def drawn(captions: list[str], frame: int, seeds: dict[int, int]) -> bytes:
        chosen = settings(scheduler, iterations=0, noise="shared")
        found: dict[int, bytes] = {}
        plan = StoryPlan(story(captions), chosen, seeds=seeds)
        for event in iterative(models[scheduler], plan, batch_sizes=[2]):
            if isinstance(event, FrameDrawn):
                found[event.frame] = event.image.tobytes()
        return found[frame]

    alone = drawn(CAPTIONS[:1], 0, {0: 5})
    assert drawn([CAPTIONS[0], CAPTIONS[1]], 0, {0: 5, 1: 6}) == alone
    assert drawn([CAPTIONS[1], CAPTIONS[0]], 1, {0: 6, 1: 5}) == alone
    assert drawn([CAPTIONS[0], CAPTIONS[0]], 1, {0: 5, 1: 5}) == alone  # one seed, two generators
    assert drawn([CAPTIONS[0], CAPTIONS[1]], 0, {0: 6, 1: 5}) != alone


def test_an_iterative_story_resumes_to_the_same_bytes(
    models: dict[str, StoryModel], scheduler: str, tmp_path: Path
) -> None:
    """Five frames in micro-batches of two, the last one padded; a frame of each kind of place is drawn again."""
    captions = [*CAPTIONS, OTHERS[0]]
    assert len(iterate(models[scheduler], captions, scheduler, tmp_path)) == 10
    whole = on_disk(tmp_path)
    for k, i in ((0, 4), (1, 0), (1, 3), (1, 4)):
        (tmp_path / f"iteration-{k:02d}" / f"frame-{i:03d}.png").unlink()
    again = iterate(models[scheduler], captions, scheduler, tmp_path)
    assert [(event.round, event.frame) for event in again] == [(0, 4), (1, 0), (1, 3), (1, 4)]
    assert on_disk(tmp_path) == whole


def test_a_run_that_stops_between_two_steps_goes_on_to_the_same_bytes(
    models: dict[str, StoryModel], scheduler: str, tmp_path: Path
) -> None:
    """The second micro-batch had drawn some of its noise; a resume draws it again from the beginning."""

    def begun(folder: Path):  # type: ignore[no-untyped-def]
        return generate(
            story(CAPTIONS),
            model=models[scheduler],
            output=folder,
            batch_size=2,
            iterations=0,
            **options(scheduler),
        )

    list(begun(tmp_path / "whole"))
    events, drawn = begun(tmp_path / "stopped"), 0
    for event in events:
        drawn += isinstance(event, FrameDrawn)
        if drawn == 2 and isinstance(event, StepDone) and event.step == 1:
            break
    events.close()
    list(begun(tmp_path / "stopped"))
    assert on_disk(tmp_path / "stopped") == on_disk(tmp_path / "whole")


# --- the sampler -----------------------------------------------------------------------------------------------------


def test_one_row_in_several_places_is_one_frame(models: dict[str, StoryModel], scheduler: str) -> None:
    """A stand-in and padding are the row itself; its noise is drawn once, whatever stands beside it."""
    chosen = settings(scheduler)
    plans = [StoryPlan(story(captions), chosen, n) for n, captions in enumerate((CAPTIONS[:2], OTHERS))]
    sampler, (one, other) = prepare_frame(models[scheduler], plans, 0, 3, (64, 64))

    def latents(rows: list[Row]) -> torch.Tensor:
        list(sampler.denoise(rows))
        return sampler.latents.clone()

    alone = latents([one])
    assert torch.equal(alone[0], alone[1]) and torch.equal(alone[0], alone[2])
    for rows, place in (([one, one, other], 0), ([other, one, one], 1), ([other, other, one], 2)):
        assert torch.equal(latents(rows)[place], alone[0])
