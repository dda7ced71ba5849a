"""Risk: an export draws two characters alike, as its graphs read masks of another layer, of other sides, or of none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastory import InputError, Story, StoryModel
from fastory.conditioning.history import HistoryRow, Window
from fastory.conditioning.references import Group, ReferenceContext, References
from fastory.conditioning.regions import Grid, from_maps, history_bias, rest_of, self_bias, text_bias
from fastory.models.engine_model import EngineModel
from fastory.models.protocol import UnetInputs
from fastory.runs.notices import story_notices
from fastory.runs.resolve import ResolvedStory, resolve_story

# Of 7 cross-attention layers and the convolutions between them, in float32; parity measures 5e-6 of values near 4.
CLOSE = 2e-5


@pytest.fixture(scope="module")
def engine(masked_export_folder: Path) -> EngineModel:
    return EngineModel.open_engine(masked_export_folder, device="cpu")


@pytest.fixture(scope="module")
def model(causal_builtin_folder: Path) -> StoryModel:
    return StoryModel.open(str(causal_builtin_folder), device="cpu", dtype="float32")


def context(model: StoryModel, grid: Grid) -> ReferenceContext:
    """Two rows of a frame with two characters, each of whom has two references; and the story's group."""
    generator = torch.Generator().manual_seed(4)
    one, two = from_maps(
        {name: torch.rand(4, 4, generator=generator) for name in ("one", "two")}, grid
    ).values()

    def group(mask: torch.Tensor) -> Group:
        shape = (1, model.tokens_per_ref, model.cross_attention_dim)
        tokens = [torch.randn(shape, generator=generator) for _ in range(2)]
        return Group(tokens, 0.5, lambda frame, n: True, lambda frame: mask)

    text = torch.randn(1, 40, model.layers.width, generator=generator)
    references = References.of(
        [group(rest_of([one, two])), group(one), group(two)],
        model.null_reference,
        model.layers.project_references,
        tokens_per_ref=model.tokens_per_ref,
        like=text,
        grid=grid,
    )
    made = references.context(2)
    made.put(0, references.null_row(0, text))
    made.put(1, references.row(0, text))
    return made


def inputs(model: StoryModel, height: int, width: int) -> UnetInputs:
    latents = torch.randn(2, 8, height, width, generator=torch.Generator().manual_seed(6))
    return UnetInputs(latents, torch.tensor(400), context(model, Grid(height, width)), None, None)


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 20)])
def test_the_graph_reads_the_masks_of_every_layer(
    height: int, width: int, model: StoryModel, engine: EngineModel
) -> None:
    """Fractions, where nobody is, and of four groups one that is empty; pictures that are no squares."""
    given = inputs(model, height, width)
    masks = given.context.masks
    assert any(((mask > 0.05) & (mask < 0.95)).any() for mask in masks.values())
    expected = model.predict(given)
    assert (engine.predict(given) - expected).abs().max() <= CLOSE
    swapped = {tokens: mask[:, [0, 2, 1]] for tokens, mask in masks.items()}
    other = replace(given, context=replace(given.context, masks=swapped))
    assert (engine.predict(other) - model.predict(other)).abs().max() <= CLOSE
    assert (engine.predict(other) - expected).abs().max() > 100 * CLOSE


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 20)])
def test_the_graph_reads_the_biases_of_every_layer(
    height: int, width: int, model: StoryModel, engine: EngineModel
) -> None:
    """Of a character's words, and of its pixels, in the rows of a frame with boxes beside one without."""
    grid = Grid(height, width)
    masks = {"one": grid.box((0, 0, 0.45, 0.8)), "two": grid.box((0.5, 0.1, 1, 1))}
    plain = inputs(model, height, width)
    text = text_bias(masks, {"one": [3, 4], "two": [7]}, 40, grid)
    apart = self_bias(list(masks.values()), grid)
    both = [
        {n: torch.cat([torch.zeros_like(bias), bias]) for n, bias in one.items()} for one in (text, apart)
    ]
    for biases in ({"text_bias": both[0]}, {"self_bias": both[1]}):
        given = replace(plain, context=replace(plain.context, **biases))
        expected = model.predict(given)
        assert (engine.predict(given) - expected).abs().max() <= CLOSE
        assert (expected - model.predict(plain))[1].abs().max() > 100 * CLOSE


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 20)])
def test_the_causal_graph_reads_the_biases_of_every_layer(
    height: int, width: int, model: StoryModel, engine: EngineModel
) -> None:
    """Of words and history, and of pixels; a row of a frame that finds somebody beside one that does not."""
    causal, exported = model.causal, engine.causal
    generator, grid = torch.Generator().manual_seed(2), Grid(height, width)
    masks = {"one": grid.box((0, 0, 0.45, 0.8)), "two": grid.box((0.5, 0.1, 1, 1))}
    window = Window(40, 40, 2, torch.zeros(1, causal.layers.width), grid)
    words = text_bias(masks, {"one": [3, 4], "two": [7]}, 40, grid)
    told = history_bias(masks, {"one": [*range(30)], "two": [*range(30, 80)]}, 80, grid)
    bias = {n: torch.cat([words[n], told[n]], 2) for n in words}
    latents = torch.randn(2, 8, height, width, generator=generator)
    kv = torch.randn(2, 120, causal.layers.width, generator=generator)
    padding = torch.rand(2, 120, generator=generator) < 0.3
    seen: list[torch.Tensor] = []
    for own, between in ((None, None), (bias, None), (None, self_bias(list(masks.values()), grid))):
        made = window.context(2)
        made.put(0, HistoryRow(kv[:1], padding[:1]))
        made.put(1, HistoryRow(kv[1:], padding[1:], own, between))
        given = UnetInputs(latents, torch.tensor(400), made, None, None)
        seen.append(causal.predict(given))
        assert (exported.predict(given) - seen[-1]).abs().max() <= CLOSE
        assert torch.equal(seen[-1][0], seen[0][0])
    assert min((other - seen[0])[1].abs().max() for other in seen[1:]) > 100 * CLOSE


@torch.inference_mode()
def test_masks_of_ones_are_none(model: StoryModel, engine: EngineModel, export_folder: Path) -> None:
    given = inputs(model, 16, 16)
    ones = {tokens: torch.ones_like(mask) for tokens, mask in given.context.masks.items()}
    whole, without = (replace(given, context=replace(given.context, masks=m)) for m in (ones, None))
    assert torch.equal(engine.predict(whole), engine.predict(without))
    two = without.context
    two = replace(two, ref_offsets=two.ref_offsets[[0, 1, 3]], scale=two.scale[:2])
    plain = EngineModel.open_engine(export_folder, device="cpu")
    as_two = replace(given, context=two)
    assert (plain.predict(as_two) - engine.predict(as_two)).abs().max() <= CLOSE


def test_a_picture_is_encoded_as_torch_encodes_it(model: StoryModel, engine: EngineModel) -> None:
    picture = model.decode(torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(1))).image
    own, other = model.encode_picture(picture), engine.encode_picture(picture)
    assert (own - other).abs().max() <= CLOSE * own.abs().max()


def story(folder: Path, characters: int) -> Story:
    """One of so many characters, two of whom meet."""
    names = ("Ann", "Bob", "Cid", "Dan", "Eve")[:characters]
    told = {
        "version": 1,
        "characters": {name: {"prompt": "a fox"} for name in names},
        "frames": ["Ann and Bob are standing", *(f"{name} is standing" for name in names[1:])],
    }
    (folder / "story.json").write_text(json.dumps(told))
    return Story.read(folder / "story.json")


def resolved(model: EngineModel, given: Story, **settings: Any) -> ResolvedStory:
    return resolve_story(model, given, {"references": "others", "iterations": 1, "steps": 2, **settings})


def test_more_characters_than_exported_are_refused_by_the_option_that_takes_them(
    engine: EngineModel, tmp_path: Path
) -> None:
    """Four groups: the frames, and three characters, as no character has pictures; a fourth one is too many."""
    assert resolved(engine, story(tmp_path, 3)).settings.regions == "auto"
    with pytest.raises(InputError, match=r"for 4 groups .* has 5 .*export it with --characters 3$"):
        resolved(engine, story(tmp_path, 4))
    plain = Story.from_captions(["a fox and a bear are standing", "a cat and a rabbit are standing"])
    with pytest.raises(InputError, match=r"has 5 .*export it with --characters 3$"):
        resolved(engine, plain)


def test_an_export_without_masks_says_what_two_characters_need(export_folder: Path, tmp_path: Path) -> None:
    plain, given = EngineModel.open_engine(export_folder, device="cpu"), story(tmp_path, 2)
    for regions in ("auto", "on"):
        found = resolved(plain, given, regions=regions)
        assert found.settings.regions == "off"
        (said,) = [line for line in found.notices if "regions" in line]
        assert said.endswith("export it with --characters 2")
    assert not [line for line in resolved(plain, given, regions="off").notices if "regions" in line]
    with pytest.raises(InputError, match=r"restart: .*export it with --characters 1 or more"):
        resolved(plain, given, restart=0.5, iterations=2)


def test_boxes_say_what_an_export_without_biases_leaves_off(
    engine: EngineModel, export_folder: Path, tmp_path: Path
) -> None:
    placed = {"caption": "Ann and Bob are standing", "boxes": {"Ann": [0, 0, 0.5, 1]}}
    characters = {name: {"prompt": "a fox"} for name in ("Ann", "Bob")}
    (tmp_path / "boxes.json").write_text(
        json.dumps({"version": 1, "characters": characters, "frames": [placed, "Bob is standing"]})
    )
    given = Story.read(tmp_path / "boxes.json")
    assert not [line for line in resolved(engine, given).notices if "export" in line]
    (said,) = [line for line in resolved(without(engine, "boxes"), given).notices if "export" in line]
    assert said.endswith("export it with --boxes as well")
    plain = EngineModel.open_engine(export_folder, device="cpu")
    for able, exported in ((True, engine), (False, plain)):
        causal = resolved(exported, given, mode="causal", iterations=None)
        lines = story_notices(exported, given, causal.settings, causal.prompts)
        assert able != any("exported without inputs for them" in line for line in lines)
        assert causal.settings.regions == ("auto" if able else "off")
        assert able != any(line.endswith("export it with --characters 2 --boxes") for line in causal.notices)
    assert any(line.endswith("--characters 2 --boxes") for line in resolved(plain, given).notices)


def without(model: EngineModel, key: str) -> EngineModel:
    """The export as one that does not say `key`."""
    manifest = {name: value for name, value in model.folder.manifest.items() if name != key}
    return EngineModel(replace(model.folder, manifest=manifest), model.placement, model.session_of)


def test_characters_that_cannot_be_found_in_one_call_are_refused_at_the_door(
    engine: EngineModel, tmp_path: Path
) -> None:
    """An engine for two rows draws a frame at a time, but finding two characters takes three."""
    unet = engine.folder.components["unet"]
    narrow = {**unet, "ranges": {**unet["ranges"], "batch": [1, 2]}}
    components = {**engine.folder.components, "unet": narrow}
    folder = replace(engine.folder, manifest={**engine.folder.manifest, "components": components})
    bounded = EngineModel(folder, engine.placement, engine.session_of)
    with pytest.raises(InputError, match=r"batch of 1 to 2 rows .* needs 3"):
        resolved(bounded, story(tmp_path, 2))
    assert resolved(bounded, story(tmp_path, 2), regions="off").settings.regions == "off"
