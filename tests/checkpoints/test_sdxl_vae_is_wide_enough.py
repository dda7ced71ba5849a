"""Risk: a VAE that overflows in float16 decodes in it, or one that was made for it is kept in float32 for nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastory import StoryModel


@pytest.mark.parametrize(
    ("said", "wanted"),
    [(True, torch.float32), (None, torch.float32), (False, torch.float16)],
    ids=["it overflows", "it does not say", "it is safe"],
)
def test_the_type_of_sdxls_vae_beside_a_unet_in_float16(
    sdxl_folder: Path, tmp_path: Path, said: bool | None, wanted: torch.dtype
) -> None:
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    path = folder / "vae" / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "force_upcast"}
    path.write_text(json.dumps(config if said is None else config | {"force_upcast": said}))
    model = StoryModel.open(folder, device="cpu", dtype="float16")
    assert (model.unet.dtype, model.vae.dtype) == (torch.float16, wanted)
