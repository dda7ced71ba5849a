"""One name opens a base checkpoint of the hub with its IP-Adapter and the encoder that this adapter was trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hub_cache import cached
from huggingface_hub import constants
from typer.testing import CliRunner

from fastory import StoryModel
from fastory.cli import app
from fastory.errors import InputError
from fastory.model_names import PUBLISHED

CHECKPOINT = {"sd15": "sd15_folder", "sdxl": "sdxl_folder"}
# How h94/IP-Adapter is laid out: the adapter's file, and the folder of the encoder that it was trained with.
LAYOUT = {
    "sd15": ("models/ip-adapter_sd15.safetensors", "models/image_encoder"),
    "sd15-plus": ("models/ip-adapter-plus_sd15.safetensors", "models/image_encoder"),
    "sdxl": ("sdxl_models/ip-adapter_sdxl.safetensors", "sdxl_models/image_encoder"),
    "sdxl-plus": ("sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", "models/image_encoder"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # --offline sets it for its process
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def lay_out(hub: Path, name: str, request: pytest.FixtureRequest) -> Path:
    """The cache with what `name` stands for, its encoder where the adapter's is and another where the other family's is."""
    family, _, kind = name.partition("-")
    own = request.getfixturevalue(CHECKPOINT[family])
    other = request.getfixturevalue(CHECKPOINT["sdxl" if family == "sd15" else "sd15"])
    model = cached(hub, PUBLISHED[name].model)
    shutil.copytree(own, model, ignore=shutil.ignore_patterns("image_encoder"))
    adapters = cached(hub, "h94/IP-Adapter")
    file, encoder = (adapters / place for place in LAYOUT[name])
    file.parent.mkdir(parents=True)
    shutil.copy(request.getfixturevalue(f"{family}_adapter_{kind or 'base'}"), file)
    shutil.copytree(own / "image_encoder", encoder)
    (elsewhere,) = {adapters / "models" / "image_encoder", adapters / "sdxl_models" / "image_encoder"} - {
        encoder
    }
    shutil.copytree(other / "image_encoder", elsewhere)
    return adapters


def test_the_names() -> None:
    assert list(PUBLISHED) == list(LAYOUT)
    assert (
        PUBLISHED["sd15"].model
        == PUBLISHED["sd15-plus"].model
        == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    assert (
        PUBLISHED["sdxl"].model == PUBLISHED["sdxl-plus"].model == "stabilityai/stable-diffusion-xl-base-1.0"
    )


@pytest.mark.parametrize("name", LAYOUT)
def test_one_flag_draws_offline_from_the_cache(name: str, hub: Path, request: pytest.FixtureRequest) -> None:
    lay_out(hub, name, request)
    Path("story.txt").write_text("a fox\na cat\n")
    quick = ["--steps", "1", "--iterations", "1", "--width", "64", "--height", "64", "-o", "run"]
    done = CliRunner().invoke(app, ["generate", "story.txt", "--model", name, "--offline", *quick])
    assert done.exit_code == 0, done.output
    model = StoryModel.open(name, device="cpu", offline=True)
    assert model.hashes == json.loads(Path("run/manifest.json").read_text())["models"]
    assert model.tokens_per_ref == (16 if name.endswith("-plus") else 4)


def test_the_builtin_model_as_the_hubs(hub: Path, builtin_folder: Path) -> None:
    """Its pictures are those of the built-in model: nothing but where the files come from is different."""
    row = PUBLISHED["sd15"]
    left_out = shutil.ignore_patterns("image_encoder", "ip_adapter", "causal")
    shutil.copytree(builtin_folder, cached(hub, row.model), ignore=left_out)
    adapters = cached(hub, "h94/IP-Adapter")
    (adapters / "models").mkdir(parents=True)
    shutil.copy(
        builtin_folder / "ip_adapter" / "ip_adapter.safetensors",
        adapters / "models" / "ip-adapter_sd15.safetensors",
    )
    shutil.copytree(builtin_folder / "image_encoder", adapters / "models" / "image_encoder")
    defaults = (
        hub
        / "models--stable-diffusion-v1-5--stable-diffusion-v1-5/snapshots"
        / ("0" * 40)
        / "fastory_defaults.json"
    )
    defaults.write_text(json.dumps({"schema": 1, "width": 128, "height": 128}))
    Path("story.txt").write_text("a fox is sleeping in the snow\na fox is jumping in the snow\n")
    quick = [
        "--steps",
        "2",
        "--iterations",
        "1",
        "--guidance-scale",
        "3",
        "--noise",
        "per-frame",
        "--references",
        "others",
        "--references-from=last",
        "--scheduler=ddim",
        "--reference-scale=0.3:0.5",
        "--reference-saturation=1",
    ]
    for name, folder in (("builtin", "one"), ("sd15", "two")):
        done = CliRunner().invoke(
            app, ["generate", "story.txt", "--model", name, "--offline", *quick, "-o", folder]
        )
        assert done.exit_code == 0, done.output
    for frame in ("frame-000.png", "frame-001.png"):
        assert pixels(Path("one/frames") / frame) == pixels(Path("two/frames") / frame)


def pixels(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.tobytes()


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_missing_is_named_whole_in_one_line(name: str, hub: Path) -> None:
    Path("story.txt").write_text("a fox\n")
    done = CliRunner().invoke(app, ["generate", "story.txt", "--model", name, "--offline"])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    missing = done.stderr.partition("not here and not in the hub's cache: ")[2]
    row = PUBLISHED[name]
    for part in (row.model, row.ip_adapter, row.image_encoder):
        assert part in missing
    assert "--offline forbids downloading" in missing


def test_of_a_cache_with_a_part_the_others_are_named(hub: Path, request: pytest.FixtureRequest) -> None:
    encoder = lay_out(hub, "sd15", request) / "models" / "image_encoder"
    shutil.rmtree(encoder)
    with pytest.raises(InputError, match=r"cache: h94/IP-Adapter/models/image_encoder\. --offline"):
        StoryModel.open("sd15", device="cpu", offline=True)


def test_an_adapter_that_is_given_counts(
    hub: Path, sd15_adapter_plus: Path, sd15_folder: Path, request: pytest.FixtureRequest
) -> None:
    shutil.rmtree(lay_out(hub, "sd15", request))
    given = {"ip_adapter": str(sd15_adapter_plus), "image_encoder": str(sd15_folder / "image_encoder")}
    assert StoryModel.open("sd15", device="cpu", offline=True, **given).tokens_per_ref == 16


def test_a_folder_of_that_name_is_that_folder(hub: Path, sd15_folder: Path) -> None:
    shutil.copytree(sd15_folder, "sd15")
    assert StoryModel.open("sd15", device="cpu", offline=True).hashes
