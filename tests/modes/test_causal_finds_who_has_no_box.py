"""Risk: causal mode draws two characters of a frame that has no boxes as one, or finds them and keeps nobody apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_folders import contents
from typer.testing import CliRunner

from fastory import Story, StoryModel, generate
from fastory.cli import app
from fastory.events import FrameDrawn
from fastory.models.protocol import UnetInputs
from fastory.modes.laid_out import LaidOut, looked_for_at
from fastory.modes.mode import mode_of
from fastory.runs.resolve import resolve_story
from fastory.settings import Settings

STORY = """\
characters:
  Ann: {prompt: a rabbit}
  Bob: {prompt: a fox}
frames:
- Ann and Bob are standing in the snow
- caption: Bob and Ann are standing on the beach
  %s
- Bob is standing in the city
"""
LEFT = "boxes: {Bob: [0.0, 0.0, 0.5, 1.0]}"
FLAGS = {"mode": "causal", "steps": 4, "drafts": 0}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def story(folder: Path, said: str = "seed: 1") -> Story:
    (folder / "two.yaml").write_text(STORY % said)
    return Story.read(folder / "two.yaml")


def drawn(model: StoryModel, given: Story, **more: object) -> list[bytes]:
    events = generate(given, model=model, **{**FLAGS, **more})  # type: ignore[arg-type]
    return [event.image.tobytes() for event in events if isinstance(event, FrameDrawn)]


Found = list[tuple[LaidOut, int, dict[str, torch.Tensor]]]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Found:
    """Whom a run finds: in which frame, and where."""
    places: Found = []
    find = LaidOut.find

    def watched(self: LaidOut, frame: int, maps: Mapping[str, torch.Tensor]) -> None:
        find(self, frame, maps)
        places.append((self, frame, dict(self.masks[frame])))

    monkeypatch.setattr(LaidOut, "find", watched)
    return places


def centre(mask: torch.Tensor) -> float:
    """The mean column of a mask, 0 to 1."""
    return float((mask.sum(0) * torch.linspace(0, 1, mask.shape[1])).sum() / mask.sum())


def test_who_is_named_first_is_found_on_the_left(
    model: StoryModel, tmp_path: Path, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As this world draws it, in either order, once outlines are there. In a frame of one nobody is looked for."""
    monkeypatch.setattr("fastory.modes.causal.looked_for_at", lambda calls: {15})
    told = story(tmp_path)
    first, _, last = told.frames
    for caption, left, right in (
        (first.caption, "Ann", "Bob"),
        ("Bob and Ann are standing in the snow", "Bob", "Ann"),
    ):
        found.clear()
        drawn(
            model,
            replace(told, frames=(replace(first, caption=caption), last)),
            steps=25,
            scheduler="euler-ancestral",
            guidance_scale=2.0,
        )
        ((_, frame, masks),) = found
        assert frame == 0
        assert centre(masks[left]) < 0.4
        assert centre(masks[right]) > 0.6
        assert float(torch.stack(list(masks.values())).sum(0).max()) <= 1 + 1e-6


def test_the_rows_of_the_running_frame_hear_of_who_was_found(
    model: StoryModel, tmp_path: Path, found: Found
) -> None:
    """What the sampler's buffers hold after the last step is what the found masks say."""
    told = story(tmp_path)
    drawn(model, replace(told, frames=told.frames[:2]), window=2)
    laid_out, frame, _ = found[-1]
    assert [where for _, where, _ in found] == [0, 1] and frame == 1
    limit = int(model.tokenizer.model_max_length)
    bias, between = laid_out.bias(1, limit, range(1), 2), laid_out.between(1)
    context = model.causal.idle_samplers[-1].context
    assert bias is not None and between is not None
    for layer, wanted in bias.items():
        assert torch.equal(context.bias[layer][1:], wanted) and wanted.min() < -1
        assert not context.bias[layer][:1].any()  # the unconditional row names nobody
    for layer, wanted in between.items():
        assert torch.equal(context.self_bias[layer], wanted.expand(2, -1, -1))


def test_a_frame_of_two_costs_two_calls_more_and_others_none(
    model: StoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    predict = StoryModel.predict

    def counted(self: StoryModel, inputs: UnetInputs) -> torch.Tensor:
        rows.append(inputs.latents.shape[0])
        return predict(self, inputs)

    monkeypatch.setattr(StoryModel, "predict", counted)
    given = story(tmp_path)
    drawn(model, given, steps=10)
    assert rows == 2 * _calls(10) + [2] * 10
    rows.clear()
    drawn(model, given, steps=10, regions="off")
    assert rows == [2] * 30


def _calls(steps: int) -> list[int]:
    """Rows of the calls of a frame of two characters: three more before those where they are looked for."""
    found = looked_for_at(steps)
    return [rows for step in range(steps) for rows in ([3, 2] if step in found else [2])]


def test_few_steps_look_after_the_first_one() -> None:
    """Before it the latents are noise, in which nobody stands anywhere."""
    assert [sorted(looked_for_at(calls)) for calls in (1, 2, 4, 25, 50)] == [[1], [1], [1], [2, 5], [4, 10]]


def test_a_box_stays_where_it_is_and_the_other_is_found_beside_it(
    model: StoryModel, tmp_path: Path, found: Found
) -> None:
    told = story(tmp_path, LEFT)
    drawn(model, replace(told, frames=told.frames[:2]))
    laid_out, frame, masks = found[-1]
    assert frame == 1 and set(masks) == {"Ann", "Bob"}
    box = laid_out.boxed[1]["Bob"]
    assert not masks["Bob"][box == 0].any() and masks["Bob"][8, 2] > 0.4
    laid_out.forget(1)
    assert set(laid_out.masks[1]) == {"Bob"} and torch.equal(laid_out.masks[1]["Bob"], box)


def test_nobody_is_found_between_others_who_has_no_words(model: StoryModel, tmp_path: Path) -> None:
    """A character that `characters:` puts in a frame whose caption does not name it."""
    given = story(tmp_path, "characters: [Ann, Bob]")
    frames = (
        given.frames[0],
        replace(given.frames[1], caption="Bob is standing on the beach"),
        given.frames[2],
    )
    given = replace(given, frames=frames)
    prompts = [given.prompt(i) for i in range(3)]
    settings = Settings(mode="causal")
    laid_out = LaidOut(model.causal, model.require_history(), given, prompts, (128, 128), settings)
    assert set(laid_out.casts[1]) == {"Ann", "Bob"} and not laid_out.captions_without(1)
    assert set(laid_out.captions_without(0)) == {"Ann", "Bob"}


def test_regions_are_settled_by_what_the_frames_name(model: StoryModel, tmp_path: Path) -> None:
    """Two that never meet in a frame need nobody found; the animals of a plain story are its characters here."""
    alone = "a fox is standing in the snow", "a rabbit is standing in the snow"
    together = (*alone, "a fox and a rabbit are standing in the snow")
    for captions, wanted in ((alone, "off"), (together, "auto")):
        found = resolve_story(model, Story.from_captions(captions), FLAGS)
        assert found.settings.regions == wanted
    chosen = [resolve_story(model, story(tmp_path), {**FLAGS, "regions": way}) for way in ("auto", "off")]
    groups = {mode_of("causal").group(one.story, one.settings) for one in chosen}
    assert [one.settings.regions for one in chosen] == ["auto", "off"] and len(groups) == 2


def test_the_same_bytes_beside_others_after_a_break_and_without_regions_other_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    story(tmp_path)
    Path("pair.txt").write_text("a fox and a cat are standing in the snow\na cat is reading on the beach\n")

    def run(*arguments: str) -> dict[str, bytes]:
        flags = ["--mode", "causal", "--steps", "3", "--drafts", "1", "--batch-size", "2"]
        result = CliRunner().invoke(app, ["generate", *arguments, *flags])
        assert result.exit_code == 0, result.output
        there = contents(Path(arguments[arguments.index("-o") + 1]))
        return {name: data for name, data in there.items() if "iteration-00/frame-" in name}

    together = run("pair.txt", "two.yaml", "-o", "together")
    alone = {name: run(f"{name}", "-o", Path(name).stem) for name in ("pair.txt", "two.yaml")}
    assert together == {
        f"{Path(name).stem}/{at}": data for name, pictures in alone.items() for at, data in pictures.items()
    }
    for file in [*Path("two").rglob("frame-001.png"), *Path("two").rglob("frame-002.png")]:
        file.unlink()
    assert run("two.yaml", "-o", "two") == alone["two.yaml"]
    off = run("two.yaml", "-o", "off", "--regions", "off")
    assert off.keys() == alone["two.yaml"].keys()
    assert off["iteration-00/frame-000.png"] != alone["two.yaml"]["iteration-00/frame-000.png"]
