"""With --offline a hub id must open from the cache without a single request, or be refused in one message."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hub_cache import cached
from huggingface_hub import constants

from fastory.checkpoints import model_hashes, open_checkpoint
from fastory.errors import InputError


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "hub"


def test_cached_model_adapter_and_encoder_open(
    hub_cache: Path, sd15_folder: Path, sd15_adapter_base: Path
) -> None:
    shutil.copytree(sd15_folder, cached(hub_cache, "someone/model"))
    adapters = cached(hub_cache, "someone/adapters")
    (adapters / "models").mkdir(parents=True)
    shutil.copy(sd15_adapter_base, adapters / "models" / "a.safetensors")
    shutil.copytree(sd15_folder / "image_encoder", adapters / "models" / "image_encoder")
    checkpoint = open_checkpoint(
        "someone/model",
        ip_adapter="someone/adapters/models/a.safetensors",
        image_encoder="someone/adapters/models/image_encoder",
        offline=True,
    )
    assert checkpoint.adapter is not None
    local = open_checkpoint(str(sd15_folder), ip_adapter=str(sd15_adapter_base)).sources
    assert sorted(model_hashes(checkpoint.sources).values()) == sorted(model_hashes(local).values())


@pytest.mark.parametrize(
    "options",
    [
        {"model": "someone/model"},
        {"model": "builtin", "ip_adapter": "someone/adapters/a.safetensors"},
        {"model": "builtin", "image_encoder": "someone/adapters/image_encoder"},
        {"model": "builtin", "loras": [("someone/loras/a.safetensors", 1.0)]},
    ],
)
def test_what_is_not_cached_is_refused(options: dict[str, object], hub_cache: Path) -> None:
    with pytest.raises(
        InputError, match=r"someone/\S* is not here and not in the hub's cache, and --offline"
    ):
        open_checkpoint(offline=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../x", "a b/c", "one", "a/b/c"])
def test_what_is_no_hub_id_is_not_looked_for_there(name: str, hub_cache: Path) -> None:
    with pytest.raises(InputError, match="does not exist: no folder, no file, and no hub id"):
        open_checkpoint(name)


def test_cached_model_of_pickles_names_the_files(hub_cache: Path, sd15_folder: Path) -> None:
    snapshot = shutil.copytree(sd15_folder, cached(hub_cache, "someone/model"))
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").rename(
        snapshot / "unet" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(InputError, match=r"fastory convert .*diffusion_pytorch_model\.bin"):
        open_checkpoint("someone/model", offline=True)
