"""A group of references must reach its part of the picture and no more, and a mask of ones must change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from fastory import StoryModel
from fastory.conditioning.references import Group, ReferenceContext, References
from fastory.conditioning.regions import Grid, apart, cut_out, from_maps, rest_of, self_bias, text_bias
from fastory.models.protocol import UnetInputs

GRID = Grid(16, 16)
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def test_a_box_is_whole_inside_and_nothing_outside_with_a_soft_edge() -> None:
    mask = Grid(16, 32).box((0.25, 0.5, 0.75, 1.0))
    assert mask.shape == (16, 32)
    assert mask[9:, 9:23].min() == 1  # down to the lower edge, which is the picture's
    assert mask[:7].max() == 0 and mask[:, :7].max() == 0 and mask[:, 25:].max() == 0
    edge = mask[12, 7:9]
    assert 0 < edge[0] < edge[1] < 1
    assert torch.equal(GRID.box((0, 0, 1, 1)), torch.ones(16, 16))


def test_halves_share_their_border_and_overlapping_boxes_their_middle() -> None:
    halves = apart({"a": GRID.box(LEFT), "b": GRID.box(RIGHT)})
    assert torch.allclose(halves["a"] + halves["b"], torch.ones(16, 16))
    overlapping = apart({"a": GRID.box((0, 0, 0.75, 1)), "b": GRID.box((0.25, 0, 1, 1))})
    assert torch.allclose(overlapping["a"][:, 7:9], torch.full((16, 2), 0.5))
    assert overlapping["a"][0, 0] == 1 and overlapping["b"][0, 0] == 0
    assert torch.allclose(rest_of([GRID.box(LEFT)]), GRID.box(RIGHT))


def test_a_pixel_goes_to_the_character_whose_map_is_highest_there() -> None:
    low, high = torch.full((8, 8), 0.001), torch.full((8, 8), 0.001)
    low[2:6, 1:4], high[2:6, 4:7] = 0.01, 0.1  # words differ in how much is looked at them
    masks = from_maps({"a": low, "b": high}, GRID)
    assert masks["a"][6:10, 3:6].min() > 0.9 and masks["a"][:, 9:].max() < 0.1
    assert masks["b"][6:10, 10:13].min() > 0.9 and masks["b"][:, :6].max() < 0.1
    assert max(mask[[0, 0, 15, 15], [0, 15, 0, 15]].max() for mask in masks.values()) == 0
    assert (masks["a"] + masks["b"]).max() <= 1 + 1e-6


def test_what_is_cut_out_is_square_and_lies_in_the_picture() -> None:
    picture = Image.new("RGB", (160, 80))
    for box, wanted in (
        ((0, 0, 0.3, 1), (0, 0, 80, 80)),  # as high as the picture, at its left edge
        ((0.4, 0.4, 0.6, 0.6), (52, 12, 108, 68)),
    ):
        grid = Grid(40, 80)
        part = cut_out(picture, grid.box(box))
        assert part is not None
        assert abs(part.width - part.height) <= 2
        assert abs(part.width - (wanted[2] - wanted[0])) <= 8
    assert cut_out(picture, torch.zeros(8, 16)) is None


@pytest.fixture
def model(sd15_folder: Path, sd15_adapter_base: Path) -> StoryModel:
    return StoryModel.open(str(sd15_folder), ip_adapter=str(sd15_adapter_base))


def references(model: StoryModel, tokens: list[Tensor], masks: list[Tensor | None] | None) -> References:
    """A group for each of the tokens, with its mask."""
    text = model.layers.project_text(torch.zeros(1, 7, model.cross_attention_dim))
    given = masks or [None] * len(tokens)
    groups = [
        Group([one], 0.8, lambda i, n: True, lambda i, m=m: m) for one, m in zip(tokens, given, strict=True)
    ]
    return References.of(
        groups,
        model.null_reference,
        model.layers.project_references,
        tokens_per_ref=model.tokens_per_ref,
        like=text,
        grid=None if masks is None else GRID,
    )


def tokens_of(model: StoryModel, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (1, model.tokens_per_ref, model.cross_attention_dim)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@torch.inference_mode()
def predict(model: StoryModel, shared: References) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    caption = torch.randn(1, 7, model.cross_attention_dim, generator=generator)
    context = shared.context(1)
    context.put(0, shared.row(0, model.layers.project_text(caption)))
    latents = torch.randn(1, model.sizes.latent_channels, 16, 16, generator=generator)
    return model.predict(UnetInputs(latents, torch.tensor(500), context, None, None))


def test_masks_of_ones_are_no_masks(model: StoryModel) -> None:
    tokens = tokens_of(model, 2)
    plain = predict(model, references(model, tokens, None))
    ones = predict(model, references(model, tokens, [None, torch.ones(16, 16)]))
    assert (plain - ones).abs().max() < 1e-6
    half = predict(model, references(model, tokens, [None, GRID.box(LEFT)]))
    assert (plain - half).abs().max() > 1e-3


def test_masks_are_those_of_diffusers(sd15_folder: Path, sd15_adapter_base: Path, model: StoryModel) -> None:
    """One picture a group is what a stock pipeline calls several images with ip_adapter_masks."""
    pipe = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None, local_files_only=True)
    pipe.load_ip_adapter(
        sd15_adapter_base.parent, subfolder="", weight_name=sd15_adapter_base.name, image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale([[0.8, 0.8, 0.8]])
    embeds = torch.randn(1, 3, model.checkpoint.image_encoder.config.projection_dim)  # type: ignore[union-attr]
    tokens = [model._project_image(embeds[:, n]) for n in range(3)]
    masks = torch.stack([torch.full((16, 16), value) for value in (0.3, 1.0, 0.0)])
    generator = torch.Generator().manual_seed(1)
    caption = torch.randn(1, 7, model.cross_attention_dim, generator=generator)
    latents = torch.randn(1, model.sizes.latent_channels, 16, 16, generator=generator)
    with torch.inference_mode():
        wanted = pipe.unet(
            latents,
            torch.tensor(500),
            caption,
            added_cond_kwargs={"image_embeds": [embeds]},
            cross_attention_kwargs={"ip_adapter_masks": [masks[None]]},
        ).sample
    got = predict(model, references(model, tokens, list(masks)))
    assert (wanted - got).abs().max() < 1e-5
    assert (got - predict(model, references(model, tokens, None))).abs().max() > 1e-3


def test_every_layer_reads_the_mask_on_its_own_grid(model: StoryModel) -> None:
    """Rows of one call have masks of their own, the unconditional one too, on pictures that are not square."""
    text = model.layers.project_text(torch.zeros(1, 7, model.cross_attention_dim))
    grid = Grid(8, 24)
    groups = [
        Group(tokens_of(model, 1), 0.8, lambda i, n: True, lambda i: grid.box(LEFT) if i else grid.box(RIGHT))
    ]
    shared = References.of(
        groups,
        model.null_reference,
        model.layers.project_references,
        tokens_per_ref=model.tokens_per_ref,
        like=text,
        grid=grid,
    )
    context = shared.context(3)
    for index, row in enumerate((shared.row(0, text), shared.row(1, text), shared.null_row(1, text))):
        context.put(index, row)
    assert isinstance(context, ReferenceContext) and context.masks is not None
    assert {tokens: mask.shape for tokens, mask in context.masks.items()} == {
        length: (3, 1, length) for length in (8 * 24, 4 * 12, 2 * 6, 1 * 3)
    }
    for tokens, width in ((8 * 24, 24), (4 * 12, 12), (2 * 6, 6)):
        right, left, null = context.masks[tokens].view(3, -1, width)
        assert right[:, 0].max() == 0 and right[:, -1].min() == 1
        assert left[:, 0].min() == 1 and left[:, -1].max() == 0
        assert torch.equal(left, null)
    same = References.of(
        groups, model.null_reference, model.layers.project_references,
        tokens_per_ref=model.tokens_per_ref, like=text,
    )  # fmt: skip
    assert shared.refill(context) and not same.refill(context)


def attended(model: StoryModel, words: dict[str, list[int]] | None, captions: Tensor) -> Tensor:
    """What one layer of 16 x 16 queries gets, (L, H, d), where each character's words reach its half."""
    text = model.layers.project_text(captions)
    shared = References.of(
        [Group(tokens_of(model, 1), 0.8, lambda i, n: True)],
        model.null_reference,
        model.layers.project_references,
        tokens_per_ref=model.tokens_per_ref,
        like=text,
        words=None if words is None else GRID,
    )
    halves = {"a": GRID.box((0, 0, 0.4, 1)), "b": GRID.box((0.6, 0, 1, 1))}
    bias = None if words is None else text_bias(halves, words, captions.shape[1], GRID)
    context = shared.context(1)
    context.put(0, shared.row(0, text, bias))
    layer = model.layers.layers[0]
    heads, width = layer.attn.heads, layer.channels // layer.attn.heads
    query = torch.randn(1, 256, heads, width, generator=torch.Generator().manual_seed(2))
    return context.attend(layer, query)[0]


@torch.inference_mode()
def test_words_of_a_character_reach_its_box_and_words_of_nobody_reach_all(model: StoryModel) -> None:
    captions = torch.randn(1, 5, model.cross_attention_dim, generator=torch.Generator().manual_seed(4))
    plain = attended(model, None, captions)
    assert (attended(model, {"a": [], "b": []}, captions) - plain).abs().max() < 1e-5
    out = attended(model, {"a": [1, 2], "b": [3]}, captions).unflatten(0, (16, 16))
    without = {
        name: attended(model, None, captions[:, kept])
        for name, kept in (("b", [0, 1, 2, 4]), ("a", [0, 3, 4]))
    }
    without = {name: value.unflatten(0, (16, 16)) for name, value in without.items()}
    # A word keeps a ten-thousandth of its weight where it does not reach.
    assert (out[:, :5] - without["b"][:, :5]).abs().max() < 1e-2
    assert (out[:, 11:] - without["a"][:, 11:]).abs().max() < 1e-2
    assert (out[:, :5] - plain.unflatten(0, (16, 16))[:, :5]).abs().max() > 0.1


def bounded(masks: list[Tensor], frame: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values (1, 64, 2, 4) of a layer of 8 x 8, and what characters that keep apart make of them."""
    text = torch.zeros(1, 7, 4)
    shared = References.of((), lambda: text, lambda it: it, tokens_per_ref=4, like=text, words=GRID)
    context = shared.context(2)
    bias = self_bias(masks, GRID) if masks else None
    context.put(0, shared.null_row(frame, text, bias))
    context.put(1, shared.row(frame, text, None, bias))
    attend = context.last_rows(1).self_attention(64)
    assert attend is not None and context.self_attention(256) is None
    query, keys, values = torch.randn(3, 1, 64, 2, 4, generator=torch.Generator().manual_seed(6))
    return torch.stack([query, keys, values]), attend(query, keys, values), context.self_bias[64]  # type: ignore[index]


def test_pixels_of_a_character_see_itself_and_what_nobody_has() -> None:
    """Against a softmax in float64 over the pixels that are left."""
    left, right = GRID.box((0, 0, 0.375, 1)), GRID.box((0.625, 0, 1, 1))
    (query, keys, values), out, bias = bounded([left, right])
    assert torch.equal(bias[0], bias[1])  # the unconditional row's, too
    columns = torch.arange(64) % 8
    scores = torch.einsum("lhd,khd->hlk", query[0].double(), keys[0].double()) / 2
    for own, seen in (
        (columns < 2, columns < 5),
        (columns > 5, columns > 2),
        ((columns > 2) & (columns < 5), columns >= 0),
    ):
        wanted = torch.einsum(
            "hlk,khd->lhd", scores[:, own][:, :, seen].softmax(-1), values[0, seen].double()
        )
        # What is not seen keeps a ten-thousandth of its weight, and no column is softer than these.
        assert (out[0, own] - wanted).abs().max() < 2e-2
    plain = torch.einsum("hlk,khd->lhd", scores.softmax(-1), values[0].double())
    assert (out[0] - plain).abs().max() > 0.1


def test_without_boxes_self_attention_is_as_ever() -> None:
    (query, keys, values), out, bias = bounded([])
    assert not bias.any()
    scores = torch.einsum("lhd,khd->hlk", query[0].double(), keys[0].double()) / 2
    assert (out[0] - torch.einsum("hlk,khd->lhd", scores.softmax(-1), values[0].double())).abs().max() < 1e-5
    one_alone = self_bias([GRID.box(LEFT)], GRID)
    assert not any(bias.any() for bias in one_alone.values())
    assert set(Grid(128, 128).bounded_layers()) == {1024} and set(Grid(64, 64).bounded_layers()) == {
        1024,
        256,
    }
