"""How long a story's first picture and a denoising step take, with CUDA graphs and without, on the built-in model."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import pytest
import results
import torch

from fastory import Story, StoryModel, generate
from fastory.events import FrameDrawn, StepDone

CAPTIONS = [
    f"a fox is {action} in the snow" for action in ("sleeping", "jumping", "standing", "reading a book")
] * 2
SETTINGS: dict[str, Any] = {"steps": 50, "iterations": 1}


def measure(graphs: str, device: str) -> dict[str, Any]:
    """One story of eight frames, two rounds, 50 steps: seconds to the first picture, and per step (p20, p50, p80)."""
    model, steps, first = StoryModel.open("builtin", device=device, graphs=graphs), [], None
    started = time.perf_counter()
    for event in generate(Story.from_captions(CAPTIONS), model=model, batch_size=4, **SETTINGS):
        if (
            isinstance(event, StepDone) and event.step > 1
        ):  # the first of a micro-batch loads, warms up and captures
            steps.append(event.seconds)
        if isinstance(event, FrameDrawn):
            first = first or time.perf_counter() - started
    p20, _, _, p80 = statistics.quantiles(steps, n=5)
    return {
        "graphs": graphs,
        "dtype": model.placement.dtype_name,
        "frames_at_once": 4,
        "first_picture_s": first,
        "step_ms": {"p20": p20 * 1e3, "p50": statistics.median(steps) * 1e3, "p80": p80 * 1e3},
        "story_s": time.perf_counter() - started,
    }


@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_story(graphs: str, benchmark: Any, device: str, request: pytest.FixtureRequest) -> None:
    """Eager and captured; on a CPU both are eager, so one is measured."""
    if request.config.getoption("--compare"):
        pytest.skip("--compare measures the kernels alone")
    if graphs == "auto" and not torch.cuda.is_available():
        pytest.skip("a CPU has no CUDA graphs")
    found = benchmark.pedantic(lambda: measure(graphs, device), rounds=1, iterations=1)
    benchmark.extra_info.update(found)
    if request.config.getoption("--save"):
        file = results.FOLDER / f"story-{device}-graphs-{graphs}.json"
        file.parent.mkdir(exist_ok=True)
        record = {"kind": "measured", "environment": results.environment(device), **found}
        file.write_text(json.dumps(record, indent=1) + "\n")
