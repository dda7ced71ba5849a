"""Risk: guidance or references in a part of the steps alone are computed elsewhere, or the other steps are not as without.

The oracle is diffusers' own pipeline on the same weights, whose scales a callback changes between steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from counted_calls import calls
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from drawn_rounds import CAPTIONS, Kept, draw
from PIL import Image
from run_folders import contents, end_and_resume, is_picture

from fastory import InputError, Settings, Story, StoryModel, generate
from fastory.conditioning.references import ReferenceContext
from fastory.models.protocol import UnetInputs
from fastory.modes.iterative import prepare_round
from fastory.modes.mode import StoryPlan

STEPS, SCALE, GUIDANCE, SEED, CAPTION = 10, 0.4, 5.0, 3, "a rabbit in the snow"
# As in test_parity_with_diffusers: two orders of summation in float32 over 10 steps; guidance by 1 + 1e-6 in place of none
# adds 1e-6 of the difference of two predictions a step.
TOLERANCE = 1e-4
NEARLY_NONE = 1 + 1e-6
PICTURES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]


def stock(folder: Path, adapter: Path, guidance: tuple[float, float], references: tuple[float, float]) -> Any:
    """Diffusers' latents, with guidance and references in the steps of these intervals."""
    kind = StableDiffusionXLPipeline if "sdxl" in folder.name else StableDiffusionPipeline
    pipeline = kind.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    model = StoryModel.open(str(folder), ip_adapter=str(adapter))
    pipeline.register_modules(
        image_encoder=model.checkpoint.image_encoder, feature_extractor=model.checkpoint.image_processor
    )
    pipeline.load_ip_adapter(
        str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None
    )
    embeds = pipeline.prepare_ip_adapter_image_embeds([PICTURES], None, torch.device("cpu"), 1, True)

    def set_scales(step: int) -> None:
        inside = [low * STEPS <= step < high * STEPS for low, high in (guidance, references)]
        pipeline._guidance_scale = GUIDANCE if inside[0] else NEARLY_NONE
        pipeline.set_ip_adapter_scale(SCALE if inside[1] else 0.0)

    def after(_: object, step: int, __: object, found: dict[str, Any]) -> dict[str, Any]:
        set_scales(step + 1)
        return found

    set_scales(0)
    return pipeline(
        CAPTION,
        num_inference_steps=STEPS,
        guidance_scale=pipeline._guidance_scale,
        ip_adapter_image_embeds=embeds,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        callback_on_step_end=after,
    ).images


def own(folder: Path, adapter: Path, **intervals: tuple[float, float]) -> torch.Tensor:
    """The same frame as frame 0 of a story of two, in a micro-batch of two whose rows are told apart."""
    model = StoryModel.open(str(folder), ip_adapter=str(adapter))
    chosen = Settings(
        iterations=1,
        reference_scale=(SCALE, SCALE),
        steps=STEPS,
        guidance_scale=GUIDANCE,
        seed=SEED,
        **intervals,
    )
    kept = Kept({(0, n): image for n, image in enumerate(PICTURES)})
    plan = StoryPlan(Story.from_captions([CAPTION, "a fox"]), chosen, finished=kept)
    sampler, rows = prepare_round(model, plan, 1, 2)
    for _ in sampler.denoise(rows):
        pass
    return sampler.latents[:1]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("guidance", "references"),
    [((0.0, 0.5), (0.0, 1.0)), ((0.3, 1.0), (0.0, 1.0)), ((0.0, 1.0), (0.4, 1.0)), ((0.2, 0.8), (0.1, 0.6))],
    ids=["guidance first", "guidance later", "references later", "both"],
)
def test_latents_are_those_of_the_stock_pipeline(
    family: str,
    guidance: tuple[float, float],
    references: tuple[float, float],
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    adapter = request.getfixturevalue(f"{family}_adapter_base")
    got = own(folder, adapter, guidance_interval=guidance, reference_interval=references)
    assert (got - stock(folder, adapter, guidance, references)).abs().max() < TOLERANCE
    assert (got - own(folder, adapter)).abs().max() > 100 * TOLERANCE  # the check can fail


def test_rows_and_references_outside_are_not_computed() -> None:
    """Four steps of a micro-batch of two: guidance in the middle two, references in the last two."""
    model = StoryModel.open("builtin", device="cpu")
    seen: list[tuple[int, int]] = []
    predict = model.predict

    def noted(inputs: UnetInputs) -> torch.Tensor:
        assert isinstance(inputs.context, ReferenceContext)
        seen.append((len(inputs.latents), inputs.context.ref_kv.shape[1] // model.tokens_per_ref))
        return predict(inputs)

    model.predict = noted  # type: ignore[method-assign]
    chosen = {"guidance_interval": (0.25, 0.75), "reference_interval": (0.5, 1.0), "steps": 4}
    draw(model, CAPTIONS[:2], Settings(iterations=1, noise="per-frame", **chosen), 2)
    assert seen[:4] == [(2, 0), (4, 0), (4, 0), (2, 0)]  # round 0 has no references
    assert seen[4:] == [(2, 0), (4, 0), (4, 3), (2, 3)]  # two frames and their null block
    model.predict = predict  # type: ignore[method-assign]
    with calls({"unet": model.pipeline.unet}) as count:
        draw(model, CAPTIONS[:2], Settings(iterations=1, steps=4), 2)
    assert count["unet"] == 8


@pytest.mark.parametrize("mode_name", ["iterative", "causal"])
def test_resumed_to_the_same_bytes(mode_name: str, tmp_path: Path) -> None:
    model = StoryModel.open("builtin", device="cpu")
    story = Story.from_captions(["a fox in the snow", "a fox is sleeping", "a fox is jumping"], title="parts")
    given: dict[str, Any] = {"model": model, "mode": mode_name, "steps": 4, "guidance_interval": "0:0.5"}
    given |= {"iterations": 1, "reference_interval": "0.5:1"} if mode_name == "iterative" else {"drafts": 1}
    list(generate(story, output=tmp_path / "whole", **given))
    end_and_resume(story, tmp_path / "cut", is_picture(0, 0), **given)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("value", ["0.5", "0.5:0.2", "0:2", "-1:1", "a:b", "0:nan", 0.5])
def test_what_is_no_interval_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"guidance_interval .*wanted START:END such as 0\.2:0\.8"):
        list(generate(Story.from_captions(["a fox"]), guidance_interval=value, iterations=0))


def test_where_there_is_no_guidance_the_interval_is_said_to_decide_nothing() -> None:
    events = generate(
        Story.from_captions(["a fox"]), iterations=0, steps=1, guidance_scale=1.0, guidance_interval="0:0.5"
    )
    assert any("`guidance_interval` is not used" in str(event) for event in events)
