"""A model that cannot be used must end in one message that names the file and the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastory.checkpoints import open_checkpoint
from fastory.errors import InputError


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def without(path: Path, *names: str) -> None:
    weights = {name: weight for name, weight in load_file(path).items() if name not in names}
    save_file(weights, path, metadata={"format": "pt"})


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def as_pickle(path: Path) -> None:
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


UNET = "unet/diffusion_pytorch_model.safetensors"
DEFECTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no-index": (lambda f: (f / "model_index.json").unlink(), ["no model_index.json", "--config"]),
    "sd3": (
        lambda f: edit_json(f / "model_index.json", _class_name="StableDiffusion3Pipeline"),
        ["is a StableDiffusion3Pipeline model", "StableDiffusionXLPipeline"],
    ),
    "flux": (lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"), ["FluxPipeline"]),
    "index-not-json": (lambda f: (f / "model_index.json").write_text("{", "utf-8"), ["model_index.json"]),
    "inpainting": (lambda f: edit_json(f / "unet" / "config.json", in_channels=9), ["9", "inpainting"]),
    "pix2pix": (lambda f: edit_json(f / "unet" / "config.json", in_channels=8), ["8", "InstructPix2Pix"]),
    "sdxl-unet": (
        lambda f: edit_json(f / "unet" / "config.json", addition_embed_type="text_time"),
        ["text_time", "not that of Stable Diffusion 1.5"],
    ),
    "no-vae": (lambda f: shutil.rmtree(f / "vae"), ["no vae folder"]),
    "no-tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), ["no tokenizer folder"]),
    "no-scheduler": (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), ["not exist"]),
    "no-unet-config": (lambda f: (f / "unet" / "config.json").unlink(), ["unet/config.json", "not exist"]),
    "no-weights": (lambda f: (f / UNET).unlink(), ["unet holds no weights"]),
    "cut-short": (lambda f: cut_short(f / UNET), [UNET, "not a whole safetensors file", "download"]),
    "empty": (lambda f: (f / UNET).write_bytes(b""), [UNET, "not a whole safetensors file"]),
    "lfs": (
        lambda f: (f / UNET).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "utf-8"
        ),
        [UNET, "git lfs pull"],
    ),
    "pickle-in-disguise": (lambda f: torch.save({}, f / UNET), [UNET, "holds a pickle", "fastory convert"]),
    "only-bin": (lambda f: as_pickle(f / UNET), ["fastory convert", "unet/diffusion_pytorch_model.bin"]),
    "missing-weight": (lambda f: without(f / UNET, "conv_out.weight"), ["unet", "conv_out.weight"]),
    "missing-vae-weight": (
        lambda f: without(f / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
        ["vae", "decoder.conv_in.bias"],
    ),
    "other-width": (
        lambda f: edit_json(f / "unet" / "config.json", cross_attention_dim=48),
        ["unet cannot be opened", "attn2.to_k"],
    ),
    "defaults-newer": (
        lambda f: (f / "fastory_defaults.json").write_text('{"schema": 2}', "utf-8"),
        ["schema 2", "Update fastory"],
    ),
    "defaults-without-schema": (
        lambda f: (f / "fastory_defaults.json").write_text('{"width": 64}', "utf-8"),
        ["fastory_defaults.json", "schema"],
    ),
    "defaults-name-another-world": (
        lambda f: (f / "fastory_defaults.json").write_text('{"schema": 1, "world": "mars"}', "utf-8"),
        ["fastory_defaults.json", "world is 'mars'", "wanted builtin"],
    ),
    "defaults-lead-outside": (
        lambda f: (f / "fastory_defaults.json").write_text(
            '{"schema": 1, "ip_adapter": "../x.safetensors"}', "utf-8"
        ),
        ["ip_adapter", "inside the folder"],
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defective_folder_is_refused_by_name(defect: str, sd15_folder: Path, tmp_path: Path) -> None:
    make, words = DEFECTS[defect]
    folder = shutil.copytree(sd15_folder, tmp_path / "model")
    make(folder)
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(folder), offline=True)
    message = str(caught.value)
    assert str(folder) in message
    assert [word for word in words if word not in message] == []


def test_convert_commands_of_a_pickled_folder_work_as_printed(sd15_folder: Path, tmp_path: Path) -> None:
    """The printed commands must suffice: files land under the names that are looked for."""
    from fastory.checkpoints import convert_pickle

    folder = shutil.copytree(sd15_folder, tmp_path / "pickled model")
    as_pickle(folder / UNET)
    as_pickle(folder / "text_encoder" / "model.safetensors")
    (folder / "text_encoder" / "model.bin").rename(folder / "text_encoder" / "pytorch_model.bin")
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        with pytest.raises(InputError, match=f"fastory convert '.*{name}'"):
            open_checkpoint(str(folder))
        convert_pickle(folder / name)
    open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./nowhere", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("owner/name", "not in the hub's cache"),
        ("a.ckpt", "does not exist"),
    ],
)
def test_model_that_is_nowhere_is_refused(model: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        open_checkpoint(model, offline=True)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_single_pickle_is_refused_with_its_command(name: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(InputError, match=f"fastory convert {tmp_path / name}"):
        open_checkpoint(str(tmp_path / name), offline=True)


def test_config_beside_a_folder_is_refused(sd15_folder: Path) -> None:
    with pytest.raises(InputError, match="--config is for single"):
        open_checkpoint(str(sd15_folder), config=sd15_folder)
