"""The real generate on a CUDA device of shapes: what meets what, what is read on the host, what a step launches.

launches.json is the budget: a change that launches more or less has to change it, and says so in its commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_model
from shapes_alone import DEVICE, Counted, ShapesAlone, fake_cuda
from small_history import write_causal_folder
from torch import Tensor

from fastory import Story, StoryModel, generate
from fastory.checkpoints import open_checkpoint
from fastory.conditioning.references import Group, ReferenceContext, ReferenceRow, References
from fastory.conditioning.regions import Grid
from fastory.events import FrameDrawn
from fastory.models.protocol import UnetInputs
from fastory.runtime import Placement
from fastory.sampling.sampler import Row, Sampler
from fastory.settings import SCHEDULERS, Settings

BUDGET = json.loads(Path(__file__).with_name("launches.json").read_text())
CAPTIONS = ["a fox is sleeping in the snow", "a rabbit is jumping in the snow"]


@dataclass
class DryRun:
    """What a story asked of a device of shapes. steps: of every denoising step, in order."""

    steps: list[Counted]
    pictures: int = 0
    whole: Counted = field(default_factory=Counted)
    captures: list[Counted] = field(default_factory=list)


def counted_steps(device: ShapesAlone, monkeypatch: pytest.MonkeyPatch) -> list[Counted]:
    """What every denoising step asks of `device` from now on."""
    found, step = list[Counted](), Sampler._step

    def counted(self: Sampler, *arguments: Any) -> None:
        before = device.counted.copy()
        step(self, *arguments)
        found.append(device.counted - before)

    monkeypatch.setattr(Sampler, "_step", counted)
    return found


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DryRun]]:
    """Draws CAPTIONS with what `make` gives, in float16 on a device of shapes."""

    def run(make: Callable[[Placement], StoryModel], graphs: bool, **values: Any) -> DryRun:
        with fake_cuda() as device:
            found = DryRun(counted_steps(device, monkeypatch))
            model = make(Placement(DEVICE, torch.float16, 1, graphs))
            placed = device.counted.copy()
            for event in generate(Story.from_captions(CAPTIONS), model=model, steps=2, **values):
                found.pictures += isinstance(event, FrameDrawn)
            found.whole, found.captures = device.counted - placed, device.captures
        return found

    yield run


def from_folder(folder: Path, **parts: Any) -> Callable[[Placement], StoryModel]:
    checkpoint = open_checkpoint(str(folder), dtype=torch.float16, **parts)
    return lambda placement: StoryModel(checkpoint, placement, folder.name)


def check(found: DryRun, pictures: int, steps: int, captures: int) -> None:
    """captures: how often a UNet call is captured; 0 for an eager story."""
    assert (found.pictures, len(found.steps), len(found.captures)) == (pictures, steps, captures)
    assert not found.whole.mixed
    for part in [*found.steps, *found.captures]:
        assert not part.reads and not part.copies
    # A picture is looked at once, for values that are not finite, and copied once.
    assert found.whole.reads.total() == pictures and found.whole.copies["to the host"] == pictures
    replays = [step.launches["graph"] for step in found.steps]
    assert replays == [1 if captures else 0] * steps
    in_a_step = {step.launches.total() for step in found.steps}
    assert len(in_a_step) == (1 if captures == 0 else 2)  # warm-up runs the call that a replay stands for
    if captures:
        # All later steps are the scheduler's arithmetic and one launch.
        assert min(in_a_step) < min(captured.launches.total() for captured in found.captures) / 4


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "captured"])
class TestDryRun:
    def test_iterative(self, dry_run: Any, sd15_folder: Path, sd15_adapter_base: Path, graphs: bool) -> None:
        make = from_folder(sd15_folder, ip_adapter=str(sd15_adapter_base))
        found = dry_run(make, graphs, iterations=1, batch_size=2)
        check(found, pictures=4, steps=4, captures=2 * graphs)  # without references, and with them

    def test_sdxl(self, dry_run: Any, sdxl_folder: Path, sdxl_adapter_plus: Path, graphs: bool) -> None:
        make = from_folder(sdxl_folder, ip_adapter=str(sdxl_adapter_plus))
        found = dry_run(make, graphs, iterations=1, batch_size=2)
        check(found, pictures=4, steps=4, captures=2 * graphs)

    def test_causal(self, dry_run: Any, sd15_folder: Path, tmp_path: Path, graphs: bool) -> None:
        make = from_folder(write_causal_folder(sd15_folder, tmp_path / "causal"))
        found = dry_run(make, graphs, mode="causal", window=2)
        check(found, pictures=2, steps=4, captures=1 * graphs)

    def test_reusing_deep_features(
        self, dry_run: Any, sd15_folder: Path, sd15_adapter_base: Path, graphs: bool
    ) -> None:
        """A whole and a shallow call of either kind, each captured by itself."""
        make = from_folder(sd15_folder, ip_adapter=str(sd15_adapter_base))
        found = dry_run(make, graphs, iterations=1, batch_size=2, cache_interval=2)
        assert (found.pictures, len(found.steps), len(found.captures)) == (4, 4, 4 * graphs)
        assert not found.whole.mixed
        for part in [*found.steps, *found.captures]:
            assert not part.reads and not part.copies
        launches = [part.launches.total() for part in (found.captures if graphs else found.steps)]
        assert launches[1] < launches[0] and launches[3] < launches[2]

    def test_with_compiled_blocks(
        self, dry_run: Any, sd15_folder: Path, sd15_adapter_base: Path, graphs: bool
    ) -> None:
        """torch traces nothing on a device of shapes: blocks run as they are, within the code that calls them compiled."""
        make, made = from_folder(sd15_folder, ip_adapter=str(sd15_adapter_base)), list[StoryModel]()

        def compiled(placement: Placement) -> StoryModel:
            made.append(make(placement))
            made[0].requested["compile"] = "on"
            return made[0]

        with torch.compiler.set_stance("force_eager"):
            found = dry_run(compiled, graphs, iterations=1, batch_size=2)
        check(found, pictures=4, steps=4, captures=2 * graphs)
        assert made[0].compiled.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        calls = list(found.captures if graphs else found.steps)  # before others are counted
        # Nothing was copied to the device but what each row brings: inputs that no picture is in are made there.
        eager = dry_run(make, graphs, iterations=1, batch_size=2)
        assert found.whole.copies == eager.whole.copies
        for ours, theirs in zip(calls, eager.captures if graphs else eager.steps, strict=True):
            assert ours.launches == theirs.launches

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["sd15", "sdxl"])
    def test_full_size(self, dry_run: Any, name: str, graphs: bool) -> None:
        found = dry_run(lambda placement: random_model(name, placement), graphs, iterations=1, batch_size=2)
        check(found, pictures=4, steps=4, captures=2 * graphs)
        if not graphs:
            around = BUDGET["around a call"]["ddim, guided"]["launches"]
            assert found.steps[0].launches.total() == sum(BUDGET["UNet call"][name].values()) + around


@pytest.mark.parametrize("mode", ["iterative", "causal"])
def test_a_second_story_of_the_same_sizes_captures_nothing(
    monkeypatch: pytest.MonkeyPatch,
    sd15_folder: Path,
    sd15_adapter_base: Path,
    tmp_path: Path,
    mode: str,
) -> None:
    folder = write_causal_folder(sd15_folder, tmp_path / "causal")
    own = {"iterations": 1, "batch_size": 2} if mode == "iterative" else {"window": 2}
    make = from_folder(folder, ip_adapter=str(sd15_adapter_base))
    made, create = [], Sampler.__init__
    monkeypatch.setattr(Sampler, "__init__", lambda self, *rest: (made.append(1), create(self, *rest))[1])
    with fake_cuda() as device:
        model, counts = make(Placement(DEVICE, torch.float16, 1, True)), []
        for steps, captions in ((2, CAPTIONS), (3, CAPTIONS[::-1]), (2, CAPTIONS[:1] * 3)):
            story = Story.from_captions(captions)
            list(generate(story, model=model, mode=mode, steps=steps, guidance_scale=5.0 + steps, **own))
            counts.append((len(made), len(device.captures)))
    first = {"iterative": 2, "causal": 1}[mode]
    # Another number of frames: other references, while a window has the size that it is set to.
    assert counts == [(1, first), (1, first), (1, first + (mode == "iterative"))]


def test_the_device_of_shapes_counts_what_it_must_find() -> None:
    with fake_cuda() as device:
        there = torch.empty(3, device=DEVICE)
        there.sum().item()
        there.copy_(torch.ones(3))
        there[:2] = torch.ones(2).to(DEVICE, non_blocking=True)
        there.cpu()
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
    counted = device.counted
    assert counted.reads == {"_local_scalar_dense": 1} and counted.mixed == {"add": 1}
    assert counted.copies == {"to the device": 2, "to the host": 1}
    assert counted.blocking == {"to the device": 1, "to the host": 1}
    assert counted.launches == {"sum": 1, "copy_": 1}


# --- launches of a step ----------------------------------------------------------------------------------------------


def sampler_of(model: StoryModel, settings: Settings, references: int) -> Sampler:
    """A sampler of one frame, whose round has so many references."""
    placement, (width, height) = model.placement, model.native_size
    sampler = Sampler(model, settings, 1, width, height)
    tokens = references * model.tokens_per_ref
    with placement.device:
        shared = References(
            (),
            torch.zeros(1, tokens, model.layers.width, dtype=placement.dtype),
            torch.zeros(1),
            torch.zeros(2, dtype=torch.int32),
            model.tokens_per_ref,
            77,
        )
    sampler.set_round(shared)
    return sampler


def on_meta(name: str) -> StoryModel:
    return random_model(name, Placement(torch.device("meta"), torch.float16, 1))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.inference_mode()
def test_launches_of_a_full_size_unet_call(name: str) -> None:
    model = on_meta(name)
    sampler = sampler_of(model, Settings(), references=9)
    assert sampler.inputs is not None
    with ShapesAlone() as device:
        model.predict(sampler.inputs)
    assert +device.counted.launches == BUDGET["UNet call"][name]
    assert not device.counted.copies and not device.counted.reads and not device.counted.mixed


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.inference_mode()
def test_masks_of_two_characters_launch_nothing_more(name: str) -> None:
    """The story's group and one a character, each where it reaches: more work of the one kernel, and no launch beside it."""
    model = on_meta(name)
    sampler, (width, height) = sampler_of(model, Settings(), references=9), model.native_size
    tokens, factor = 9 * model.tokens_per_ref, model.vae_factor
    with model.placement.device:
        masked = References(
            (Group([], 1.0, lambda frame, n: True),) * 3,
            torch.zeros(1, tokens, model.layers.width, dtype=model.placement.dtype),
            torch.zeros(3),
            torch.zeros(4, dtype=torch.int32),
            model.tokens_per_ref,
            77,
            Grid(height // factor, width // factor),
        )
        context = masked.context(2)
    assert sampler.inputs is not None and isinstance(context, ReferenceContext) and context.masks
    with ShapesAlone() as device:
        model.predict(replace(sampler.inputs, context=context))
    assert +device.counted.launches == BUDGET["UNet call"][name]
    assert not device.counted.copies and not device.counted.reads and not device.counted.mixed


class Unchanged:
    """A denoiser that launches nothing: it gives back what it is given, always in the same memory, as a graph does."""

    def begin(self) -> None:
        """No call knows another."""

    def predict(self, inputs: UnetInputs) -> Tensor:
        return inputs.latents

    def forget(self, inputs: UnetInputs) -> None:
        """Nothing is kept."""


@pytest.fixture(scope="module")
def small() -> StoryModel:
    return on_meta("small-sd15")


@pytest.mark.parametrize("guidance", [1.0, 7.5], ids=["unguided", "guided"])
@pytest.mark.parametrize("scheduler", [name for name, row in SCHEDULERS.items() if not row.distilled])
@torch.inference_mode()
def test_launches_of_a_step_around_the_call(
    small: StoryModel, monkeypatch: pytest.MonkeyPatch, scheduler: str, guidance: float
) -> None:
    """The most of any step: first and last ones may be of another order. copies: to the device, of all steps."""
    sampler = sampler_of(small, Settings(scheduler=scheduler, steps=6, guidance_scale=guidance), references=0)
    assert isinstance(sampler.context, ReferenceContext)
    context = sampler.context
    assert context.ref_ranges is not None
    parts = (context.text_kv, context.ref_visible, context.ref_ranges)
    inputs = ReferenceRow(*(part[:1].clone() for part in parts))
    caption = small.encode_caption("a fox")
    sampler.denoiser = Unchanged()
    with ShapesAlone() as device:
        steps = counted_steps(device, monkeypatch)
        list(sampler.denoise([Row(0, 0, caption, caption, inputs, inputs)]))
    assert not any(found.blocking or found.reads or found.mixed for found in steps)
    most = {
        "launches": max(found.launches.total() for found in steps),
        "copies": sum(found.copies.total() for found in steps),
    }
    guided = "guided" if guidance > 1 else "unguided"
    assert most == BUDGET["around a call"].get(f"{scheduler}, {guided}")
