"""Where pictures come from, as they and their run folder say it: PNG text chunks, versions, the storybook's footer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from fastory import __version__
from fastory.events import FrameDrawn
from fastory.models.protocol import Model
from fastory.modes.mode import mode_of
from fastory.settings import Settings
from fastory.wording import counted

VERSIONED = ("torch", "diffusers", "transformers", "safetensors", "pillow")


def png_chunks(
    title: str, prompt: str, settings: Settings, model: Model, drawn: FrameDrawn
) -> dict[str, str]:
    """Text chunks of a picture: `parameters`, as picture viewers of the field read it, and `fastory`, as JSON.

    title: of the story; prompt: of the frame, as the text encoder got it.
    """
    lines = [prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    strength = f", Denoising strength: {settings.restart:g}" if settings.restarts(drawn.round) else ""
    steps = settings.scheduled_steps(drawn.round)
    lines.append(
        f"Steps: {steps}, Sampler: {settings.scheduler}, CFG scale: {settings.guidance_scale:g}, "
        f"Seed: {drawn.seed}, Size: {settings.width}x{settings.height}, Model: {Path(model.name).name}{strength}"
    )
    values = {
        "schema": 1,
        "version": __version__,
        "story": title,
        "frame": drawn.frame,
        "round": drawn.round,
        "mode": settings.mode,
        "rounds": settings.rounds - 1,
        "prompt": prompt,
        "seed": drawn.seed,
        "left_out": drawn.left_out,
    }
    if drawn.converged is not None:
        values["converged"] = drawn.converged
    values |= mode_of(settings.mode).picture_values(settings, drawn.round)
    return {"parameters": "\n".join(lines), "fastory": json.dumps(values, ensure_ascii=False)}


def footer(model: Model, settings: Settings) -> dict[str, str]:
    """The settings as the storybook prints them."""
    return {
        "Model": Path(model.name).name,
        "Mode": settings.mode,
        **mode_of(settings.mode).method(settings),
        "Sampling": f"{settings.scheduler}, {counted(settings.steps, 'step')}, guidance {settings.guidance_scale:g}"
        + within(settings.guidance_interval)
        + (
            f", the whole UNet in one of {settings.cache_interval} steps"
            if settings.cache_interval > 1
            else ""
        ),
        "Noise": f"{settings.noise}, seed {settings.seed}",
        "Size": f"{settings.width} x {settings.height}",
    }


def within(interval: tuple[float, float]) -> str:
    """Words for an interval of the steps; none for all of them."""
    return "" if interval == (0.0, 1.0) else f" in {interval[0]:g} to {interval[1]:g} of the steps"


def versions() -> dict[str, str]:
    """Versions of fastory and of what decides a picture's bytes."""
    return {"fastory": __version__, **{name: version(name) for name in VERSIONED}}


def version_notices(stored: Mapping[str, str]) -> list[str]:
    """One notice where a run is taken up again with other library versions."""
    now = versions()
    changed = [
        f"{name} {stored[name]} -> {now[name]}"
        for name in now
        if name in stored and stored[name] != now[name]
    ]
    if not changed:
        return []
    return [
        f"this run began with other versions ({', '.join(changed)}); its remaining pictures may differ in their last bits"
    ]
