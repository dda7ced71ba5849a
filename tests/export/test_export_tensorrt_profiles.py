"""Risk: an engine is built for other sizes than asked, or a wrong range is found only by the builder, minutes later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_export import write_export

from fastory.errors import InputError
from fastory.export.choices import parse_sizes
from fastory.export.profiles import default_bounds, profiles


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = write_export(tmp_path_factory.mktemp("exports") / "small")
    described = json.loads((folder / "fastory.json").read_text(encoding="utf-8"))
    decoder = {
        "inputs": {"latents": {"dtype": "float16", "shape": ["batch", 4, "height", "width"]}},
        "ranges": {"batch": [1, 63], "height": [1, 512], "width": [1, 512]},
        "hot": {"batch": 1, "height": 16, "width": 16},
    }
    fixed = {"inputs": {"pixels": {"dtype": "float16", "shape": [1, 3, 8, 8]}}, "ranges": {}, "hot": {}}
    return {**described, "components": {**described["components"], "vae_decoder": decoder, "fixed": fixed}}


def test_sizes_reach_every_axis_that_depends_on_them(manifest: dict) -> None:
    sizes = parse_sizes(["batch=1:8", "height=64:256", "width=96", "text=77:308", "references=1:100"])
    found = profiles(manifest, ["unet"], sizes)["unet"]
    assert found == {
        "sample": ((1, 32, 8, 12), (8, 32, 16, 12), (8, 32, 32, 12)),
        "text_kv": ((1, 77, 64), (8, 77, 64), (8, 308, 64)),
        "ref_kv": ((1, 4, 64), (1, 36, 64), (1, 400, 64)),
        "ref_visible": ((1, 1), (8, 9), (8, 100)),
    }


def test_pixels_mean_the_same_in_the_unet_and_the_decoder(manifest: dict) -> None:
    found = profiles(manifest, ["unet", "vae_decoder"], {"height": (64, 128), "width": (128, 192)})
    assert [shape[2:] for shape in found["unet"]["sample"]] == [
        shape[2:] for shape in found["vae_decoder"]["latents"]
    ]


def test_what_is_not_named_is_bounded_around_the_usual_size(manifest: dict) -> None:
    least, usual, most = profiles(manifest, ["unet"], {})["unet"]["sample"]
    assert (least, usual, most) == ((1, 32, 8, 8), (8, 32, 16, 16), (32, 32, 24, 24))
    assert default_bounds("references", 9) == (1, 128)


def test_an_input_of_fixed_shape_is_in_no_profile(manifest: dict) -> None:
    assert profiles(manifest, ["fixed"], {}) == {"fixed": {}}


def test_the_usual_size_lies_within_narrow_bounds(manifest: dict) -> None:
    least, usual, most = profiles(manifest, ["unet"], {"batch": (2, 3)})["unet"]["ref_visible"]
    assert (least[0], usual[0], most[0]) == (2, 3, 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["batch"], "wanted NAME=LEAST:MOST"),
        (["depth=1:2"], "NAME one of batch, height"),
        (["batch=a:2"], "wanted whole numbers"),
        (["batch=1:"], "wanted whole numbers"),
        (["batch=0:2"], "1 or more"),
        (["batch=3:2"], "the least first"),
        (["batch=1:2", "batch=1:3"], "give it once"),
    ],
)
def test_a_size_that_is_none_is_refused(given: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_sizes(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["height=60:128"], "multiples of 32 pixels"),
        (["height=64:4096"], "exported for 32 to 2048 pixels"),
        (["batch=1:64"], "exported for 1 to 63"),
        (["keys=1:9"], "they have batch"),
    ],
)
def test_bounds_that_the_graphs_do_not_have_are_refused(manifest: dict, given: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        profiles(manifest, ["unet"], parse_sizes(given))


def test_an_unknown_component_is_refused(manifest: dict) -> None:
    with pytest.raises(InputError, match="no such component; it has unet"):
        profiles(manifest, ["unte"], {})


def test_the_folder_of_the_fixture_is_an_export(tmp_path: Path) -> None:
    from fastory.models.export_folder import ExportFolder

    assert ExportFolder.open(write_export(tmp_path / "small")).groups == 1
