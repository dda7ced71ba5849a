"""Risk: a compiled block is compiled again for every layer, frame, round or weight, or draws another picture.

Quick tests run the graphs that torch traces as they are (its backend `eager`): what is traced, how often, and that it is the
same computation does not depend on who makes kernels of them. The slow one has inductor's.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from run_folders import contents
from shapes_alone import ShapesAlone
from step import loaded
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import ExternKernelSchedulerNode

from fastory import InputError, Story, StoryModel, generate
from fastory.events import Compiling, FrameDrawn, Notice
from fastory.processors import compiled
from fastory.processors.fused import fuse_self_attention
from fastory.runs.compiling import decide
from fastory.runs.resolve import resolve_story
from fastory.runtime import Placement

BUDGET = json.loads(Path(__file__).with_name("launches.json").read_text())
CAPTIONS = ["a fox in the snow", "a rabbit", "a cat on the beach", "a fox is sleeping", "a bear", "a dog"]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs run as they are, and none is there yet."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def opened(compile: str) -> StoryModel:
    return StoryModel.open("builtin", device="cpu", compile=compile)


def drawn(
    model: StoryModel, frames: int, **values: Any
) -> tuple[list[np.ndarray], list[Compiling], list[str]]:
    few = {"steps": 2, "batch_size": 2, "regions": "off"}
    # Stronger colours make two levels of what is one in a picture of the round before.
    rounds = {} if values.get("mode") == "causal" else {"iterations": 2, "reference_saturation": 1.0}
    values = {**few, **rounds, **values}
    events = list(generate(Story.from_captions(CAPTIONS[:frames]), model=model, **values))
    pictures = [np.asarray(event.image, np.int16) for event in events if isinstance(event, FrameDrawn)]
    notices = [event.message for event in events if isinstance(event, Notice)]
    return pictures, [event for event in events if isinstance(event, Compiling)], notices


def test_one_graph_a_kind_for_every_number_of_frames_weight_round_and_size(traced: None) -> None:
    model = opened("on")
    kinds = compiled.CompiledBlocks(model.unet).kinds
    pictures, progress, notices = drawn(model, 3)
    assert [(event.done, event.total) for event in progress] == [(n, kinds) for n in range(1, kinds + 1)]
    assert any("compiled, as asked for; kept in" in notice for notice in notices)
    # Round 0 without references and later rounds with them are the same graphs, and so are all of these.
    for change in (
        {"frames": 6, "batch_size": 3},
        {"frames": 2, "reference_scale": (0.1, 0.9)},
        {"frames": 2, "width": 96, "height": 64, "iterations": 1},
    ):
        assert drawn(model, **change)[1] == []
    assert compiled.graphs_compiled() == kinds
    # The same operators on the same numbers; a CPU adds up rows of an embedding together in place of one by one.
    for ours, eager in zip(pictures, drawn(opened("off"), 3)[0], strict=True):
        assert np.abs(ours - eager).max() <= 1


def test_causal_blocks_are_compiled_once_where_characters_keep_to_their_places(traced: None) -> None:
    """Scores with a bias are a graph of their own, one a kind; a frame that finds nobody and one that does share them."""
    told = Story.from_captions(
        ["a fox and a cat in the snow", "a fox in the city", "a cat and a fox on the beach"]
    )
    values: dict[str, Any] = {"mode": "causal", "steps": 3, "drafts": 0, "guidance_scale": 2.0}

    def run(model: StoryModel) -> tuple[list[np.ndarray], list[Compiling]]:
        events = list(generate(told, model=model, **values))
        pictures = [np.asarray(event.image, np.int16) for event in events if isinstance(event, FrameDrawn)]
        return pictures, [event for event in events if isinstance(event, Compiling)]

    model = opened("on")
    kinds = compiled.CompiledBlocks(model.causal.unet).kinds
    pictures, progress = run(model)
    assert [(event.done, event.total) for event in progress] == [(n, kinds) for n in range(1, kinds + 1)]
    assert compiled.graphs_compiled() == kinds
    for ours, eager in zip(pictures, run(opened("off"))[0], strict=True):
        assert np.abs(ours - eager).max() <= 1


@pytest.mark.slow
def test_a_run_goes_on_as_it_began(traced: None, tmp_path: Path) -> None:
    story, model = Story.from_captions(CAPTIONS[:2], title="began"), opened("on")
    given: dict[str, Any] = {"steps": 1, "iterations": 1, "batch_size": 1, "regions": "off"}
    list(generate(story, model=model, output=tmp_path / "whole", **given))
    events = generate(story, model=model, output=tmp_path / "cut", **given)
    for event in events:
        if isinstance(event, FrameDrawn):
            break
    events.close()
    machine = json.loads((tmp_path / "cut" / "manifest.json").read_text())["machine"]
    assert machine["compiled"] is True
    with pytest.raises(InputError, match="began with compiled blocks; give --compile auto"):
        generate(story, model=opened("off"), output=tmp_path / "cut", **given)
    list(generate(story, model=opened("auto"), output=tmp_path / "cut", **given))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_an_eager_run_says_nothing_of_compiling_and_does_not_go_on_compiled(tmp_path: Path) -> None:
    story = Story.from_captions(CAPTIONS[:1])
    given: dict[str, Any] = {"steps": 1, "iterations": 0}
    list(generate(story, model=opened("auto"), output=tmp_path / "run", **given))
    assert "compiled" not in json.loads((tmp_path / "run" / "manifest.json").read_text())["machine"]
    with pytest.raises(InputError, match="began without compiled blocks; give --compile off"):
        generate(story, model=opened("on"), output=tmp_path / "run", **given)


@pytest.mark.parametrize(
    ("name", "device", "frames", "expected"),
    [
        ("sdxl", "cuda:0", 100, True),
        ("sdxl", "cuda:0", 4, False),
        ("sd15", "cuda:0", 10, False),
        ("sdxl", "cpu", 100, False),
    ],
)
def test_auto_goes_by_the_work_ahead_and_leaves_the_cpu_as_it_is(
    name: str, device: str, frames: int, expected: bool
) -> None:
    model = random_model(name, Placement(torch.device("meta"), torch.float16, 1))
    model.placement = Placement(torch.device(device), torch.float16, 1)
    captions = [f"a fox {n}" for n in range(frames)]
    decided, why = decide([resolve_story(model, Story.from_captions(captions), {})])
    assert decided is expected
    assert (why is None) == (device == "cpu")
    if why is not None:
        assert f"{frames * 11 * 50} steps of a frame save about" in why
        assert ("are compiled" if expected else "are not compiled") in why


# --- launches --------------------------------------------------------------------------------------------------------


def launched(block: torch.nn.Module, arguments: Any, values: dict[str, Any]) -> Counter[str]:
    """What inductor's code for a CPU calls in a block: its own kernels (`fused`), libraries and our operator by name.

    Its code is written and not built.
    """
    found = Counter[str]()

    def count(nodes: list[Any]) -> list[Any]:
        for node in nodes:
            if isinstance(node, ExternKernelSchedulerNode) and not isinstance(node.node, MultiOutput):
                found[str(node.node.op_overload or node.node.python_kernel_name)] += 1
        return nodes

    def written(code: str) -> None:
        found["fused"] = len(re.findall(r"^\s+cpp_fused\w*\(", code, re.MULTILINE))
        raise KeyboardInterrupt  # nothing after it is wanted

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        with (
            torch._inductor.config.patch(_post_fusion_custom_pass=count, fx_graph_cache=False),
            pytest.MonkeyPatch.context() as patch,
            contextlib.suppress(KeyboardInterrupt),
        ):
            patch.setattr(GraphLowering, "save_output_code", staticmethod(written))
            compile_fx(graph, inputs)
        assert found["fused"]
        return graph.forward

    torch._dynamo.reset()
    how: dict[str, Any] = {"fullgraph": True, "dynamic": True, "backend": backend}
    torch.compile(type(block).forward, **how)(
        block, *arguments, **compiled.of_block(block, arguments, values)
    )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.inference_mode()
def test_launches_of_a_compiled_full_size_unet_call(name: str) -> None:
    """Of every kind of a block of the small UNet, times such blocks of the full-size one, and what is around the blocks."""
    small = random_model(f"small-{name}", Placement(torch.device("cpu"), torch.float32, 1))
    fuse_self_attention(small.unet)  # as on CUDA
    called: dict[tuple[Any, ...], Counter[str]] = {}

    def keep(block: torch.nn.Module, arguments: Any, values: dict[str, Any]) -> None:
        kind = structure(block)
        if kind not in called:
            called[kind] = Counter()
            calls.append((kind, block, arguments, values))

    calls: list[Any] = []
    sampler, rows = loaded(small, 2, 2)
    for region in compiled.regions_of(small.unet):
        region.block.register_forward_pre_hook(keep, with_kwargs=True)
    list(sampler.denoise(rows))
    for kind, block, arguments, values in calls:
        called[kind] = launched(block, arguments, values)

    full = random_model(name, Placement(torch.device("meta"), torch.float16, 1))
    sampler, rows = loaded(full, 2, 2)
    total = Counter[str]()
    with ShapesAlone() as device:
        for region in compiled.regions_of(full.unet):
            region.block.__dict__["forward"] = uncounted(region.block, device)
            total += called[structure(region.block)]
        full.predict(sampler.inputs)
    around = +device.counted.launches
    assert {"blocks": dict(total), "around them": dict(around)} == BUDGET["compiled UNet call"][name]


def structure(block: torch.nn.Module) -> tuple[Any, ...]:
    return type(block), getattr(block, "conv_shortcut", None) is not None


def uncounted(block: torch.nn.Module, device: ShapesAlone) -> Any:
    def forward(*arguments: Any, **values: Any) -> Any:
        before = device.counted.copy()
        result = type(block).forward(block, *arguments, **values)
        device.counted = before
        return result

    return forward
