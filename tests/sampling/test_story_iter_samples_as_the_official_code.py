"""--preset story-iter samples as the official code does, whatever the model folder's own scheduler says."""

from __future__ import annotations

from diffusers import DDIMScheduler

from fastory import StoryModel
from fastory.sampling.schedulers import make_scheduler
from fastory.settings import PRESETS


def test_its_timesteps_and_last_step_are_not_the_folders() -> None:
    model = StoryModel.open("builtin", device="cpu")
    own = dict(model.pipeline.scheduler.config)
    other = {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}
    model.pipeline.scheduler = DDIMScheduler.from_config({**own, **other})
    official = DDIMScheduler.from_config(
        {**own, "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    )
    ours = make_scheduler(model, PRESETS["story-iter"]["scheduler"])
    for scheduler in (official, ours):
        scheduler.set_timesteps(50)
    assert ours.timesteps.tolist() == official.timesteps.tolist()
    assert ours.timesteps[-1] == 1 and ours.final_alpha_cumprod == ours.alphas_cumprod[0]
    folders = make_scheduler(model, "ddim")
    folders.set_timesteps(50)
    assert folders.timesteps.tolist() != ours.timesteps.tolist()  # or the test would see nothing
