"""Risk: in causal mode a box is read and does nothing, or what is said of one character reaches the other's place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_folders import contents
from typer.testing import CliRunner

from fastory import InputError, Story, StoryModel, generate
from fastory.cli import app
from fastory.conditioning.history import HistoryRow, Window
from fastory.conditioning.regions import SILENT, Grid
from fastory.events import FrameDrawn
from fastory.models.text import nearest_tokens
from fastory.modes.causal import prepare_frame
from fastory.modes.laid_out import LaidOut
from fastory.modes.mode import StoryPlan, mode_of
from fastory.settings import Settings

STORY = """\
title: Two
characters:
  Ann: {prompt: a rabbit}
  Bob: {prompt: a fox}
frames:
- Ann and Bob are standing in the snow
- caption: Ann and Bob are standing on the beach
  %s
- Bob is standing in the city
"""
LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
BOXES = f"boxes: {{Ann: {LEFT}, Bob: {RIGHT}}}"
FEW = {"mode": "causal", "steps": 2, "drafts": 1, "regions": "off"}
BY_BOXES = Settings(mode="causal", regions="off")


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin")


def story(folder: Path, said: str) -> Story:
    (folder / "two.yaml").write_text(STORY % said)
    return Story.read(folder / "two.yaml")


def drawn(model: StoryModel, given: Story, **more: object) -> list[Image.Image]:
    events = generate(given, model=model, **{**FEW, **more})  # type: ignore[arg-type]
    return [event.image for event in events if isinstance(event, FrameDrawn)]


def laid_out(model: StoryModel, given: Story) -> LaidOut:
    prompts = [given.prompt(i) for i in range(len(given.frames))]
    return LaidOut(model.causal, model.require_history(), given, prompts, (128, 128), BY_BOXES)


def words_of(tokenizer: object, prompt: str) -> list[str]:
    ids = tokenizer(prompt, padding="max_length", truncation=True).input_ids  # type: ignore[operator]
    return tokenizer.convert_ids_to_tokens(ids)  # type: ignore[attr-defined,no-any-return]


def test_scores_with_a_bias_are_the_softmax_of_their_sum() -> None:
    """By hand in float64; zero everywhere is the operator without one; what is padding stays unseen."""
    made = StoryModel.open("builtin").causal
    layer, noise = made.layers.layers[0], torch.Generator().manual_seed(0)
    heads, width = layer.attn.heads, layer.channels // layer.attn.heads
    window, grid = Window(5, 4, 3, torch.zeros(1, made.layers.width)), Grid(4, 4)
    plain, biased = window.context(2), replace(window, grid=grid).context(2)
    kv = torch.randn(2, 17, made.layers.width, generator=noise)
    padding = torch.zeros(2, 17, dtype=torch.bool)
    padding[:, [3, 4, 16]] = True
    query = torch.randn(2, 16, heads, width, generator=noise)
    for context in (plain, biased):
        for row in (0, 1):
            context.put(row, HistoryRow(kv[row : row + 1], padding[row : row + 1]))
    # float32's rounding in sums of 17 products
    torch.testing.assert_close(biased.attend(layer, query), plain.attend(layer, query), atol=2e-6, rtol=1e-5)
    bias = torch.randn(1, 16, 17, generator=noise)
    own = {tokens: torch.zeros(1, tokens, 17) for tokens in grid.layers()} | {16: bias}
    biased.put(1, HistoryRow(kv[1:], padding[1:], own))
    keys, values = (part.double() for part in layer.keys_values(kv))
    scores = torch.einsum("blhd,bkhd->bhlk", query.double(), keys) / width**0.5
    scores[1] += bias[0].double()
    scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    wanted = torch.einsum("bhlk,bkhd->blhd", scores.softmax(-1), values)
    torch.testing.assert_close(biased.attend(layer, query).double(), wanted, atol=2e-6, rtol=1e-5)


def test_words_and_what_earlier_frames_tell_reach_their_own_character(
    model: StoryModel, tmp_path: Path
) -> None:
    found = laid_out(model, story(tmp_path, BOXES))
    tokens, limit = model.require_history().encoder.config.frame_tokens, model.tokenizer.model_max_length
    bias = found.bias(1, limit, [0], 3)
    assert bias is not None
    grid = found.grid
    words = words_of(model.tokenizer, found.prompts[1])
    rabbit, fox, beach = (
        next(n for n, word in enumerate(words) if one in word) for one in ("rabbit", "fox", "beach")
    )
    for layer, (height, width) in grid.layers().items():
        shown = bias[layer].view(height, width, -1).exp()
        left, right = shown[:, 0], shown[:, -1]
        assert (left[:, rabbit] == 1).all() and (right[:, fox] == 1).all() and (shown[..., beach] == 1).all()
        silent = torch.full((height,), SILENT)
        torch.testing.assert_close(right[:, rabbit], silent)
        torch.testing.assert_close(left[:, fox], silent)
        history = shown[..., limit:]
        assert history.shape[-1] == 3 * tokens and (history[..., tokens:] == 1).all()  # nobody was there yet
        said = words_of(model.require_history().tokenizer, found.prompts[0])
        first, second = (next(n for n, word in enumerate(said) if one in word) for one in ("rabbit", "fox"))
        torch.testing.assert_close(history[:, -1, first], silent)
        torch.testing.assert_close(history[:, 0, second], silent)
        assert (history[:, 0, first] == 1).all() and (history[:, -1, second] == 1).all()
    assert found.bias(0, limit, [0], 3) is None and found.between(0) is None  # without boxes


def test_a_token_speaks_of_the_nearest_character() -> None:
    assert nearest_tokens({"A": [1, 2], "B": [6]}, 9) == {"A": [0, 1, 2, 3, 4], "B": [5, 6, 7, 8]}
    assert nearest_tokens({"A": [], "B": [2]}, 4) == {"A": [], "B": [0, 1, 2, 3]}
    assert nearest_tokens({"A": []}, 4) == {"A": []}


def test_the_unconditional_row_hears_of_nobody_and_keeps_them_apart(
    model: StoryModel, tmp_path: Path
) -> None:
    given = story(tmp_path, BOXES)
    plan = StoryPlan(given, replace(BY_BOXES, window=2), finished=_Grey())
    _, (row,) = prepare_frame(model, [plan], 1, 1, (128, 128))
    conditional, unconditional = row.conditional, row.unconditional
    assert isinstance(conditional, HistoryRow) and isinstance(unconditional, HistoryRow)
    assert conditional.bias is not None and unconditional.bias is None
    assert conditional.self_bias is not None and unconditional.self_bias is not None
    for layer, between in unconditional.self_bias.items():
        assert torch.equal(between, conditional.self_bias[layer])
    assert all(between[0, 0, -1] == torch.tensor(SILENT).log() for between in conditional.self_bias.values())


class _Grey:
    def has(self, round: int, frame: int) -> bool:
        return frame == 0

    def load(self, round: int, frame: int) -> tuple[Image.Image, None]:
        return Image.new("RGB", (128, 128), (128, 128, 128)), None


def test_boxes_change_their_frame_and_exchanged_ones_change_it_otherwise(
    model: StoryModel, tmp_path: Path
) -> None:
    """The frame before has none: its scores are the same numbers, added up in another order."""
    given = story(tmp_path, BOXES)
    bare = replace(given, frames=tuple(replace(frame, boxes=()) for frame in given.frames))
    exchanged = story(tmp_path, f"boxes: {{Ann: {RIGHT}, Bob: {LEFT}}}")
    without, as_said, other = (drawn(model, one, steps=3, drafts=0) for one in (bare, given, exchanged))
    assert max(_difference(without[0], as_said[0]), _difference(as_said[0], other[0])) <= 1
    assert min(_difference(without[1], as_said[1]), _difference(as_said[1], other[1])) > 8


def _difference(first: Image.Image, second: Image.Image) -> int:
    pixels = [torch.tensor(list(image.tobytes()), dtype=torch.int) for image in (first, second)]
    return int((pixels[0] - pixels[1]).abs().max())


def test_a_story_with_boxes_has_the_same_bytes_beside_others_and_after_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A story without boxes keeps its own, too: they come from another kernel, so the two are no batch."""
    monkeypatch.chdir(tmp_path)
    given, chosen = story(tmp_path, BOXES), BY_BOXES
    bare = replace(given, frames=tuple(replace(frame, boxes=()) for frame in given.frames))
    assert mode_of("causal").group(given, chosen) != mode_of("causal").group(bare, chosen)
    Path("one.txt").write_text("a fox is standing in the snow\na fox is reading on the beach\n")

    def run(*arguments: str) -> dict[str, bytes]:
        flags = ["--mode", "causal", "--steps", "1", "--drafts", "0", "--batch-size", "2", "--regions", "off"]
        result = CliRunner().invoke(app, ["generate", *arguments, *flags])
        assert result.exit_code == 0, result.output
        there = contents(Path(arguments[-1]))
        return {name: data for name, data in there.items() if "iteration-00/frame-" in name}

    together = run("one.txt", "two.yaml", "-o", "together")
    alone = {name: run(name, "-o", name[:3]) for name in ("one.txt", "two.yaml")}
    assert [len(pictures) for pictures in alone.values()] == [2, 3]
    assert together == {
        f"{name[:3]}/{at}": data for name, pictures in alone.items() for at, data in pictures.items()
    }
    for file in Path("two").rglob("frame-002.png"):
        file.unlink()
    assert run("two.yaml", "-o", "two") == alone["two.yaml"]


def test_a_box_of_who_is_not_in_the_frame_is_refused(model: StoryModel, tmp_path: Path) -> None:
    given = story(tmp_path, BOXES)
    moved = replace(given, frames=(*given.frames[:2], replace(given.frames[2], boxes=given.frames[1].boxes)))
    with pytest.raises(InputError, match="the box of Ann"):
        drawn(model, moved)
