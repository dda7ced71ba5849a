"""A story on exported components follows the same story on torch, in both modes, round by round and to the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastory import InputError, Story, StoryModel, generate
from fastory.events import FrameDrawn
from fastory.models.engine_model import EngineModel
from fastory.modes.mode import StoryPlan, mode_of
from fastory.runs.resolve import resolve_story

STORY = Story.from_captions(
    [
        "A fox is jumping in the forest",
        "A fox is reading a book on the beach",
        "A fox and a cat are sleeping in the house",
    ]
)
SETTINGS = {"steps": 4, "iterations": 2, "regions": "off"}  # which exports without masks draw without
APART = {"references": "others", "regions": "auto"}
TWO = """\
version: 1
characters: {Ann: {prompt: a rabbit}, Bob: {prompt: a fox}}
frames:
- Ann is sleeping in the snow
- Bob is jumping in the forest
- %s
"""
FOUND = "Ann and Bob are standing on the beach"
BOXES = f"{{caption: {FOUND}, boxes: {{Ann: [0, 0, 0.5, 1], Bob: [0.5, 0, 1, 1]}}}}"
ROUND = 1e-3  # of a picture in 0 .. 1, before it is rounded to 8 bits
WHOLE = 40.0  # dB


@pytest.fixture(scope="module")
def engine(export_folder: Path) -> EngineModel:
    return EngineModel.open_engine(export_folder, device="cpu")


@pytest.fixture(scope="module")
def masked_engine(masked_export_folder: Path) -> EngineModel:
    return EngineModel.open_engine(masked_export_folder, device="cpu")


@pytest.fixture(scope="module")
def model(causal_builtin_folder: Path) -> StoryModel:
    return StoryModel.open(str(causal_builtin_folder), device="cpu", dtype="float32")


def drawn(model: StoryModel, story: Story = STORY, **settings: Any) -> dict[tuple[int, int], np.ndarray]:
    """Every picture of a run, as floats in 0 .. 255."""
    events = generate(story, model=model, **{**SETTINGS, **settings})
    return {
        (e.round, e.frame): np.asarray(e.image, dtype=np.float64) for e in events if isinstance(e, FrameDrawn)
    }


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a - b) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


@dataclass
class Pixels:
    """A processor of decoded pictures that remembers what it was given, before rounding."""

    processor: Any
    given: list[torch.Tensor] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def postprocess(self, pixels: torch.Tensor, **options: Any) -> Any:
        self.given.append((pixels / 2 + 0.5).clamp(0, 1))
        return self.processor.postprocess(pixels, **options)


@dataclass
class Earlier:
    """Finished pictures: everything before `now`, a round or a frame."""

    pictures: Mapping[tuple[int, int], np.ndarray]
    now: tuple[int | None, int | None]

    def has(self, round: int, frame: int) -> bool:
        rounds, frames = self.now
        return round < rounds if rounds is not None else frames is not None and frame < frames

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        return Image.fromarray(self.pictures[round, frame].astype(np.uint8)), None


def floats(
    model: StoryModel | EngineModel, mode: str, earlier: Earlier, story: Story = STORY, **settings: Any
) -> Iterator[torch.Tensor]:
    """The pictures that come after the earlier ones: of one round, or of causal mode all from a frame on."""
    flags = {**SETTINGS, "mode": mode, **settings}
    rounds, _ = earlier.now
    if rounds is not None:
        flags["iterations"] = rounds
    if mode != "iterative":
        del flags["iterations"]
    resolved = resolve_story(model, story, flags, batch_size=1).settings
    size = (resolved.width or 0, resolved.height or 0)
    owner, name = (
        (model.pipeline, "image_processor")
        if isinstance(model, StoryModel)
        else (model, "vae_image_processor")
    )
    recorded = Pixels(getattr(owner, name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, recorded)
        if isinstance(model, EngineModel):
            patch.setattr(model.causal, name, recorded)
        plan = StoryPlan(story, resolved, finished=earlier)
        list(mode_of(mode).draw(model, [plan], batch_sizes=[2 if rounds is not None else 1], size=size))
    yield from recorded.given


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_each_round_from_the_same_pictures(rounds: int, model: StoryModel, engine: EngineModel) -> None:
    """Round 0 sees nothing: on the engine one reference that nobody sees, in torch none."""
    pictures = drawn(model, batch_size=2)
    pairs = [list(floats(one, "iterative", Earlier(pictures, (rounds, None)))) for one in (model, engine)]
    assert len(pairs[0]) == len(pairs[1]) == 3
    for own, other in zip(*pairs, strict=True):
        assert (own - other).abs().max() <= ROUND


def test_references_count_by_the_majority(
    model: StoryModel, engine: EngineModel, export_folder: Path, tmp_path: Path
) -> None:
    """The export says which columns are values; one of before, which does not, is refused before anything is drawn."""
    assert engine.layers.value_columns is not None
    assert torch.equal(engine.layers.value_columns, model.layers.value_columns)
    pictures = drawn(model, batch_size=2)
    chosen, equal = {"reference_weighting": "majority"}, {"reference_weighting": "equal"}
    weighed, alike = (
        [
            next(iter(floats(one, "iterative", Earlier(pictures, (1, None)), **flags)))
            for one in (model, engine)
        ]
        for flags in (chosen, equal)
    )
    assert (weighed[0] - weighed[1]).abs().max() <= ROUND < (weighed[0] - alike[0]).abs().max()
    before = shutil.copytree(export_folder, tmp_path / "before", copy_function=os.link)
    manifest = json.loads((before / "fastory.json").read_text())
    (before / "fastory.json").unlink()  # a name of the one file of both folders
    channels = manifest.pop("layer_channels")
    (before / "fastory.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="exports did not say which columns are values; export it anew"):
        generate(STORY, model=EngineModel.open_engine(before, device="cpu"), **SETTINGS, **chosen)
    (before / "fastory.json").write_text(json.dumps(manifest | {"layer_channels": channels[1:]}))
    with pytest.raises(InputError, match="layer_channels: wanted keys and values of"):
        EngineModel.open_engine(before, device="cpu")


def test_each_frame_from_the_same_history(model: StoryModel, engine: EngineModel) -> None:
    pictures = drawn(model, mode="causal", iterations=None)
    for frame in range(3):
        ours, theirs = (
            next(iter(floats(one, "causal", Earlier(pictures, (None, frame))))) for one in (model, engine)
        )
        assert (ours - theirs).abs().max() <= ROUND


@pytest.mark.parametrize("mode", ["iterative", "causal", "plain", "reference"])
def test_a_whole_story_stays_near(mode: str, model: StoryModel, engine: EngineModel) -> None:
    # One draft, as every draft of four steps takes up what the one before rounded otherwise: after four of them, 20 dB.
    more: dict[str, Any] = {"iterative": {}, "causal": {"iterations": None, "drafts": 1}}
    flags = {"mode": mode, **more.get(mode, {"iterations": None})}
    own, other = drawn(model, **flags), drawn(engine, **flags)
    assert own.keys() == other.keys()
    last = max(round for round, _ in own)
    assert np.mean([psnr(own[key], other[key]) for key in own if key[0] == last]) >= WHOLE


def two(folder: Path, last: str) -> Story:
    """A story of two named characters, who meet in the last frame."""
    (folder / "two.yaml").write_text(TWO % last)
    return Story.read(folder / "two.yaml")


@pytest.mark.parametrize(("last", "rounds"), [(FOUND, 2), (BOXES, 1)], ids=["found", "boxes"])
def test_two_characters_are_drawn_apart(
    last: str, rounds: int, model: StoryModel, masked_engine: EngineModel, tmp_path: Path
) -> None:
    """Round by round from the same pictures, in which they are found or have boxes; and the whole story."""
    story = two(tmp_path, last)
    own = drawn(model, story, batch_size=2, iterations=rounds, **APART)
    for k in range(rounds + 1):
        pairs = [
            list(floats(one, "iterative", Earlier(own, (k, None)), story, **APART))
            for one in (model, masked_engine)
        ]
        assert len(pairs[0]) == len(pairs[1]) == 3
        assert max((a - b).abs().max() for a, b in zip(*pairs, strict=True)) <= ROUND
    other = drawn(masked_engine, story, iterations=rounds, **APART)
    final = [key for key in own if key[0] == rounds]
    assert np.mean([psnr(own[key], other[key]) for key in final]) >= WHOLE
    alike = drawn(model, story, iterations=rounds, **{**APART, "regions": "off"})
    assert np.mean([psnr(alike[key], other[key]) for key in final]) < WHOLE - 10


def test_frames_that_see_each_other_are_refused_before_anything_is_drawn(engine: EngineModel) -> None:
    with pytest.raises(InputError, match="see each other in the self-attention of an export; wanted --model"):
        generate(STORY, model=engine, mode="consistent")


def test_shallow_calls_are_refused_before_anything_is_drawn(engine: EngineModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--cache-interval wants a model of PyTorch"):
        generate(STORY, model=engine, output=tmp_path / "run", cache_interval=2, **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_characters_with_pictures_are_a_second_group(
    model: StoryModel, engine: EngineModel, tmp_path: Path
) -> None:
    """The export has two groups; a story with one leaves the other empty, one with two uses both."""
    Image.fromarray(drawn(model)[0, 0].astype(np.uint8)).save(tmp_path / "fox.png")
    (tmp_path / "story.yaml").write_text(
        'version: 1\ncharacters:\n  Finn: {prompt: "a fox", references: [fox.png]}\n'
        "frames:\n  - Finn is jumping in the forest\n  - A cat is reading in the house\n"
    )
    story = Story.read(tmp_path / "story.yaml")
    own, other = (drawn(one, story, iterations=1) for one in (model, engine))
    alone = drawn(engine, Story.from_captions([story.prompt(n) for n in range(2)]), iterations=1)
    assert all(psnr(own[key], other[key]) >= WHOLE for key in own)
    assert not np.array_equal(other[1, 0], alone[1, 0])


def test_a_run_folder_resumes_on_the_engine_to_the_same_bytes(engine: EngineModel, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    list(generate(STORY, model=engine, output=whole, **SETTINGS))
    events = generate(STORY, model=engine, output=cut, **SETTINGS)
    for _ in range(14):
        next(events)
    events.close()
    list(generate(STORY, model=engine, output=cut, **SETTINGS))
    names = sorted(p.relative_to(whole) for p in whole.rglob("*.png"))
    assert names and all((whole / name).read_bytes() == (cut / name).read_bytes() for name in names)
