"""What a step asks of the host, and what a captured UNet call leaves behind. A GPU is stood in for by torch's meta device
and by a graph that, as CUDA's, leaves its result in the same memory at every replay."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastory import Story, StoryModel
from fastory.checkpoints import open_checkpoint
from fastory.conditioning.references import ReferenceContext, ReferenceRow, References
from fastory.errors import FastoryError
from fastory.events import BatchHalved, FrameDrawn, StepDone
from fastory.models.protocol import Model, UnetInputs
from fastory.modes.iterative import iterative
from fastory.modes.mode import StoryPlan
from fastory.runtime import Placement, free_bytes
from fastory.sampling.clock import timed
from fastory.sampling.denoiser import Captured, explained
from fastory.sampling.sampler import Row, Sampler
from fastory.sampling.schedulers import SchedulerStep
from fastory.settings import SCHEDULERS, Settings

CAPTIONS = ["a red fox in the sea", "the rabbit sleeps"]
ALL = [
    name for name in SCHEDULERS if name != "lcm"
]  # which wants another UNet; it steps as euler-ancestral does
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device"),
]


def settings(**values: Any) -> Settings:
    return Settings(**{"iterations": 0, "steps": 6, "width": 64, "height": 64, **values})


# --- copies and reads ------------------------------------------------------------------------------------------------


READS = ("_local_scalar_dense", "nonzero", "equal", "_linalg_check_errors")


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: copies that block, and values that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode such an operator comes whole, with its copies inside
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        made = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            free = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            if source.device != made.device and not free:
                self.counter["copy"] += 1
        elif name in READS and args[0].device.type != "cpu":
            self.counter[name] += 1
        return made


@pytest.fixture(scope="module")
def elsewhere(sd15_folder: Path) -> StoryModel:
    """A model on a device that is not the CPU."""
    placement = Placement(torch.device("meta"), torch.float32, 1)
    return StoryModel(open_checkpoint(str(sd15_folder), dtype=torch.float32), placement, "meta")


def row(model: StoryModel, sampler: Sampler, seed: int) -> Row:
    assert isinstance(sampler.context, ReferenceContext)
    context = sampler.context
    assert context.ref_ranges is not None
    parts = (context.text_kv, context.ref_visible, context.ref_ranges)
    inputs = ReferenceRow(*(part[:1].clone() for part in parts))
    caption = model.encode_caption("a fox")
    return Row(seed, seed, caption, caption, inputs, inputs)


@pytest.mark.parametrize("scheduler", ALL)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_no_step_waits_for_the_device(elsewhere: StoryModel, scheduler: str, guidance: float) -> None:
    sampler = Sampler(elsewhere, settings(scheduler=scheduler, guidance_scale=guidance), 2, 64, 64)
    width = elsewhere.layers.width
    with torch.device("meta"):
        shared = References(
            (), torch.zeros(1, 0, width), torch.zeros(1), torch.zeros(2, dtype=torch.int32), 4, 77
        )
    sampler.set_round(shared)
    steps = sampler.denoise([row(elsewhere, sampler, seed) for seed in (1, 2)])
    next(steps)  # the first step follows the loading of the rows; all others are the loop alone
    with Waits() as waits:
        assert len(list(steps)) >= 5
    assert not waits.counter
    with Waits() as waits:  # the check can fail
        torch.ones(2).to("meta")
        torch.ones(2, device="meta").copy_(torch.ones(2))
    assert waits.counter == {"copy": 2}


# --- captured calls --------------------------------------------------------------------------------------------------


class StaticGraph:
    """Computes when it is replayed, and leaves the result where it left the last one."""

    def __init__(self, model: Model, inputs: UnetInputs) -> None:
        self.model, self.inputs, self.prediction = model, inputs, model.predict(inputs)

    def replay(self) -> None:
        self.prediction.copy_(self.model.predict(self.inputs))


@pytest.fixture(scope="module")
def eager(sd15_folder: Path) -> StoryModel:
    return StoryModel.open(str(sd15_folder), device="cpu")


@pytest.fixture
def captured(sd15_folder: Path) -> StoryModel:
    model = StoryModel.open(str(sd15_folder), device="cpu")
    model.placement = replace(model.placement, graphs=True)
    return model


def draw(model: StoryModel, **values: Any) -> list[bytes]:
    plan = StoryPlan(Story.from_captions(CAPTIONS), settings(**values))
    events = iterative(model, plan, batch_sizes=[2])
    return [event.image.tobytes() for event in events if isinstance(event, FrameDrawn)]


@pytest.mark.parametrize("scheduler", ALL)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_captured_call_draws_what_the_call_draws(
    eager: StoryModel, captured: StoryModel, monkeypatch: pytest.MonkeyPatch, scheduler: str, guidance: float
) -> None:
    """PNDM keeps predictions of earlier steps: without guidance they were the graph's own memory, written over."""

    def capture(self: Captured, inputs: UnetInputs) -> tuple[StaticGraph, torch.Tensor]:
        graph = StaticGraph(self.model, inputs)
        return graph, graph.prediction

    monkeypatch.setattr(Captured, "capture", capture)
    chosen = {"scheduler": scheduler, "guidance_scale": guidance}
    assert draw(captured, **chosen) == draw(eager, **chosen)


@contextmanager
def failing_capture() -> Iterator[None]:
    """As torch.cuda.graph: ending a capture in which something failed raises an error of its own."""
    try:
        yield
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_memory_that_runs_out_inside_a_capture_halves_the_micro_batch(
    captured: StoryModel, eager: StoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(self: Captured, inputs: UnetInputs) -> tuple[StaticGraph, torch.Tensor]:
        if len(inputs.latents) == 4:  # two frames under guidance
            with explained(failing_capture()):
                torch.empty(2**60, dtype=torch.uint8)  # what the allocator says of itself
        graph = StaticGraph(self.model, inputs)
        return graph, graph.prediction

    monkeypatch.setattr(Captured, "capture", capture)
    plan = StoryPlan(Story.from_captions(CAPTIONS), settings(scheduler="ddim"))
    events = list(iterative(captured, plan, batch_sizes=[2]))
    assert [event.size for event in events if isinstance(event, BatchHalved)] == [1]
    assert sum(isinstance(event, FrameDrawn) for event in events) == 2


def test_what_cannot_be_captured_is_told_by_its_own_words() -> None:
    own_words = pytest.raises(FastoryError, match=r"could not be captured \(a view is needed\).*--graphs off")
    with own_words, explained(failing_capture()):
        raise RuntimeError("a view is needed")
    with pytest.raises(FastoryError, match="previous error during capture"), explained(failing_capture()):
        pass


# --- seconds of a step -----------------------------------------------------------------------------------------------


def test_seconds_of_a_step_are_its_own_and_not_the_readers() -> None:
    def steps() -> Iterator[None]:
        for _ in range(3):
            time.sleep(0.05)
            yield

    taken = []
    for seconds in timed(torch.device("cpu"), steps()):
        taken.append(seconds)
        time.sleep(0.5)
    assert len(taken) == 3 and all(0.05 <= seconds < 0.4 for seconds in taken)


# --- on a GPU --------------------------------------------------------------------------------------------------------


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("graphs", ["auto", "off"])
    def test_seconds_of_all_steps_are_the_seconds_of_drawing(self, graphs: str) -> None:
        """Enqueueing takes a small part of them: a captured step is one launch."""
        model = StoryModel.open("builtin", device="cuda", graphs=graphs)
        story, chosen = Story.from_captions(CAPTIONS * 8), Settings(iterations=0, steps=30)
        taken, whole = [], 0.0
        for run in range(2):  # the first one compiles and captures
            torch.cuda.synchronize()
            before = time.perf_counter()
            events = list(iterative(model, StoryPlan(story, chosen), batch_sizes=[16]))
            torch.cuda.synchronize()
            whole = time.perf_counter() - before
            taken = [event.seconds for event in events if isinstance(event, StepDone)]
            assert len(taken) == 30 and run >= 0
        assert 0 < sum(taken) <= whole

    @pytest.mark.parametrize("scheduler", ALL)
    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_a_graph_draws_what_the_eager_call_draws(self, scheduler: str, guidance: float) -> None:
        chosen = {"scheduler": scheduler, "guidance_scale": guidance, "width": None, "height": None}
        models = [
            StoryModel.open("builtin", device="cuda", dtype="float32", graphs=g) for g in ("auto", "off")
        ]
        one, other = (
            torch.frombuffer(bytearray(b"".join(draw(m, **chosen))), dtype=torch.uint8) for m in models
        )
        assert (one.float() - other.float()).abs().mean() <= 1.0

    def test_a_live_graphs_memory_is_not_free(self) -> None:
        device = torch.device("cuda")
        room, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (room.expand(2**28).clone() * 2).sum()  # 2 GiB that lie unused in the graph's pool afterwards
        counted = free_bytes(device)
        assert counted <= torch.cuda.mem_get_info(device)[0]
        del graph
        assert free_bytes(device) - counted >= 2**30

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two CUDA devices")
    def test_a_graph_is_captured_on_the_models_own_device(self) -> None:
        chosen = {"width": None, "height": None}
        first = StoryModel.open("builtin", device="cuda:0", dtype="float32")
        second = StoryModel.open("builtin", device="cuda:1", dtype="float32")
        assert draw(first, **chosen) == draw(second, **chosen)

    @torch.inference_mode()
    def test_no_step_waits_for_a_real_device(self) -> None:
        """torch itself reports every operation that waits."""
        model = StoryModel.open("builtin", device="cuda")
        for scheduler in ("euler-ancestral", "unipc"):
            width, height = model.native_size
            sampler = Sampler(model, settings(scheduler=scheduler), 2, width, height)
            no_references = References(
                (),
                torch.zeros(1, 0, model.layers.width, device="cuda", dtype=model.placement.dtype),
                torch.zeros(1, device="cuda"),
                torch.zeros(2, dtype=torch.int32, device="cuda"),
                4,
                77,
            )
            sampler.set_round(no_references)
            within = SchedulerStep(
                model.placement.device,
                sampler._load([row(model, sampler, seed) for seed in (1, 2)]),
                len(sampler.host_timesteps),
                SCHEDULERS[scheduler].solves,
            )
            sampler._step(within, None, 0)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for number in range(1, len(sampler.host_timesteps)):
                    sampler._step(within, None, number)
            finally:
                torch.cuda.set_sync_debug_mode("default")
