"""Risk: a shallow call is not what the paper says, or reuses features of another frame, step or kind of call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counted_calls import calls
from run_folders import contents, end_and_resume, is_picture

from fastory import Settings, Story, StoryModel, generate
from fastory.events import FrameDrawn
from fastory.models.protocol import UnetInputs
from fastory.modes.iterative import prepare_round
from fastory.modes.mode import StoryPlan
from fastory.sampling.denoiser import denoiser_of

CAPTIONS = ["a fox in the snow", "a rabbit", "a cat on the beach"]


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


def inputs_of(model: StoryModel, frames: int) -> UnetInputs:
    """What a call of round 0 reads, with noise as latents."""
    plan = StoryPlan(
        Story.from_captions(CAPTIONS[:frames]), Settings(iterations=0, noise="per-frame", regions="off")
    )
    sampler, rows = prepare_round(model, plan, 0, frames)
    sampler._load(rows)
    assert sampler.inputs is not None
    sampler.inputs.latents.copy_(torch.cat([sampler.latents] * 2))
    sampler.inputs.timestep.fill_(601)
    return sampler.inputs


@torch.inference_mode()
def by_hand(unet: Any, inputs: UnetInputs, deep: torch.Tensor) -> torch.Tensor:
    """The outermost level alone, block after block, on deep features of another call."""
    rows = len(inputs.latents)
    context = {"cross_attention_kwargs": {"context": inputs.context}}
    emb = unet.time_embedding(unet.time_proj(inputs.timestep.expand(rows)).to(unet.dtype))
    hidden = unet.conv_in(inputs.latents)
    down, up = unet.down_blocks[0], unet.up_blocks[-1]
    _, skips = down(hidden, emb, **(context if getattr(down, "has_cross_attention", False) else {}))
    taken = (hidden, *skips)[: len(up.resnets)]
    up_context = context if getattr(up, "has_cross_attention", False) else {}
    hidden = up(hidden_states=deep, temb=emb, res_hidden_states_tuple=taken, **up_context)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


@torch.inference_mode()
def test_a_shallow_call_is_the_outermost_level_on_the_last_whole_calls_features(model: StoryModel) -> None:
    inputs, kept = inputs_of(model, 2), []
    hook = model.unet.up_blocks[-2].register_forward_hook(lambda _, __, made: kept.append(made.clone()))
    denoiser = denoiser_of(model, 3)
    whole = denoiser.predict(inputs).clone()
    hook.remove()
    torch.testing.assert_close(whole, model.predict(inputs), rtol=0, atol=0)
    inputs.latents.mul_(0.9)
    inputs.timestep.fill_(581)
    shallow = denoiser.predict(inputs)
    torch.testing.assert_close(shallow, by_hand(model.unet, inputs, kept[0]), rtol=0, atol=1e-5)
    assert (shallow - model.predict(inputs)).abs().max() > 1e-3  # it is another than a whole call's
    assert not any("forward" in module.__dict__ for module in model.unet.modules())


def test_every_third_step_is_whole_and_so_is_the_first_of_every_kind(model: StoryModel) -> None:
    """7 steps of 3 frames by 2: steps 0, 3, 6 of both micro-batches; where guidance ends at step 2, a kind of call begins."""
    for values, whole in (({}, 2 * 3), ({"guidance_interval": (0.0, 2 / 7)}, 2 * 3)):
        parts = {"whole": model.unet.mid_block.resnets[0], "all": model.unet.conv_in}
        given: dict[str, Any] = {"steps": 7, "iterations": 0, "batch_size": 2, "cache_interval": 3, **values}
        with calls(parts) as count:
            list(generate(Story.from_captions(CAPTIONS), model=model, **given))
        assert (count["whole"], count["all"]) == (whole, 14)


def pictures(model: StoryModel, **values: Any) -> list[np.ndarray]:
    given: dict[str, Any] = {
        "steps": 4,
        "iterations": 1,
        "regions": "off",
        "references_from": "last",
        **values,
    }
    events = generate(Story.from_captions(CAPTIONS), model=model, **given)
    return [np.asarray(event.image) for event in events if isinstance(event, FrameDrawn)]


def test_a_frame_does_not_depend_on_the_micro_batches_before_it(model: StoryModel) -> None:
    by_two, alone = (pictures(model, cache_interval=2, batch_size=size) for size in (2, 1))
    assert all((one == other).all() for one, other in zip(by_two, alone, strict=True))
    assert any((one != other).any() for one, other in zip(alone, pictures(model, batch_size=1), strict=True))


@pytest.mark.parametrize("mode", ["iterative", "causal"])
def test_resumed_to_the_same_bytes(model: StoryModel, mode: str, tmp_path: Path) -> None:
    story = Story.from_captions(CAPTIONS[:2], title="deep")
    given: dict[str, Any] = {"model": model, "mode": mode, "steps": 3, "cache_interval": 2, "batch_size": 1}
    given |= {"iterations": 1} if mode == "iterative" else {"drafts": 1}
    list(generate(story, output=tmp_path / "whole", **given))
    end_and_resume(story, tmp_path / "cut", is_picture(0, 0), **given)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_run_without_it_is_what_it_was() -> None:
    assert "cache_interval" not in Settings().identity()
    assert Settings(cache_interval=2).identity()["cache_interval"] == 2
