"""A single file must open to the same weights as its folder, and never ask the hub when it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from original_layout import write_single_file
from safetensors.torch import load_file, save_file

from fastory.checkpoints import open_checkpoint
from fastory.errors import InputError

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def sd15_file(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(sd15_folder, tmp_path_factory.mktemp("single") / "sd15.safetensors")


@pytest.fixture(scope="module")
def sdxl_file(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(sdxl_folder, tmp_path_factory.mktemp("single") / "sdxl.safetensors")


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_single_file_opens_to_the_weights_of_its_folder(family: str, request: pytest.FixtureRequest) -> None:
    folder, file = request.getfixturevalue(f"{family}_folder"), request.getfixturevalue(f"{family}_file")
    adapter = request.getfixturevalue(f"{family}_adapter_plus")
    single = open_checkpoint(str(file), config=folder, ip_adapter=str(adapter), offline=True)
    whole = open_checkpoint(str(folder), offline=True)
    assert single.family.name == family and single.sources[0] == file and single.image_encoder is not None
    for part in PARTS[: 3 if family == "sd15" else 4]:
        opened, wanted = (getattr(model.pipeline, part).state_dict() for model in (single, whole))
        assert opened.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(opened[name], wanted[name])] == []
        assert not getattr(single.pipeline, part).training


def test_without_config_it_is_refused_offline(sd15_file: Path) -> None:
    with pytest.raises(InputError, match=r"--offline forbids asking the hub.*--config"):
        open_checkpoint(str(sd15_file), offline=True)


def test_config_of_the_other_family_is_refused(sd15_file: Path, sdxl_folder: Path) -> None:
    with pytest.raises(InputError, match=r"is Stable Diffusion 1\.5; the configs in .* are of SDXL"):
        open_checkpoint(str(sd15_file), config=sdxl_folder, offline=True)


def test_config_that_is_no_model_folder_is_refused(sd15_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model_index\.json"):
        open_checkpoint(str(sd15_file), config=tmp_path, offline=True)


def test_adapter_given_as_model_is_refused(sd15_adapter_base: Path, sd15_folder: Path) -> None:
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        open_checkpoint(str(sd15_adapter_base), config=sd15_folder, offline=True)


@pytest.mark.parametrize(
    "missing",
    [
        "model.diffusion_model.out.2.weight",
        "first_stage_model.decoder.conv_in.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_file_that_lacks_a_weight_is_refused(
    missing: str, sd15_file: Path, sd15_folder: Path, tmp_path: Path
) -> None:
    """The loader ends in an error about meta tensors, or would draw with random numbers in its place."""
    weights = load_file(sd15_file)
    del weights[missing]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match="lacks weights that the configs"):
        open_checkpoint(str(tmp_path / "part.safetensors"), config=sd15_folder, offline=True)


def test_inpainting_file_is_refused_by_kind(sd15_file: Path, sd15_folder: Path, tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    weights = load_file(sd15_file) | {key: torch.zeros(32, 9, 3, 3)}
    save_file(weights, tmp_path / "inpainting.safetensors")
    with pytest.raises(InputError, match="of kind inpainting"):
        open_checkpoint(str(tmp_path / "inpainting.safetensors"), config=sd15_folder, offline=True)
