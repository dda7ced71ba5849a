"""What causal mode cannot draw is refused before anything is written: what was wanted, what came, what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from refused_commands import refuse
from safetensors.torch import load_file, save_file
from small_history import config, encoder, write_causal_folder

from fastory import InputError, StoryModel


@pytest.fixture(scope="module")
def causal_folder(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal_folder(sd15_folder, tmp_path_factory.mktemp("causal") / "model")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("good.txt").write_text("a fox\na rabbit\nthe sea\n")
    Path("long.txt").write_text("a fox\n" * 9)
    Path("picture.png").write_text("no picture")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["good.txt", "--window", "0"], "--window: wanted 1 to 1000 frames, or all, got '0'"),
        (["good.txt", "--window", "-2"], "--window: wanted 1 to 1000 frames, or all"),
        (["good.txt", "--window", "some"], "--window: wanted 1 to 1000 frames, or all"),
        (["good.txt", "--window", "7"], "time embeddings for 6 frames of history; give --window 6 or less"),
        (["long.txt"], "window all, and the story's 9 frames need 8: this model has time embeddings for 6"),
        (["good.txt", "--first-frame", "picture.png"], "picture.png: wanted a picture"),
        (["good.txt", "--first-frame", "missing.png"], "missing.png"),
        (["good.txt", "--adapter", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_option_that_cannot_be_used(causal_folder: Path, options: list[str], wanted: str) -> None:
    refuse([*options, "--mode", "causal", "--model", str(causal_folder)], wanted)


def test_a_redraw_must_run_to_the_last_frame(causal_folder: Path) -> None:
    options = ["--mode", "causal", "--model", str(causal_folder), "--output", "run"]
    refuse(["good.txt", *options, "--frames", "1"], "wanted a first frame to redraw from, such as 1-")
    refuse(["good.txt", *options, "--frames", "3-"], "has the frames 0 to 2, and none of them was chosen")


def test_a_model_without_history_says_what_it_lacks(sd15_folder: Path) -> None:
    refuse(["good.txt", "--mode", "causal", "--model", str(sd15_folder)], "--adapter FILE.safetensors")


def broken(causal_folder: Path, folder: Path) -> Path:
    shutil.copytree(causal_folder, folder)
    return folder


def test_history_weights_that_are_not_all_there(causal_folder: Path, tmp_path: Path) -> None:
    folder = broken(causal_folder, tmp_path / "broken")
    file = folder / "history" / "model.safetensors"
    tensors = load_file(file)
    lost = tensors.pop("time_embeddings.weight")
    save_file(tensors, file)
    with pytest.raises(
        InputError, match=r"1 weights of the history encoder are missing.*time_embeddings\.weight"
    ):
        StoryModel.open(str(folder))
    save_file({**tensors, "time_embeddings.weight": lost[:3]}, file)
    with pytest.raises(InputError, match="of another shape"):
        StoryModel.open(str(folder))
    save_file({**tensors, "time_embeddings.weight": lost, "inception.weight": lost + 1}, file)
    with pytest.raises(InputError, match=r"are unknown.*inception\.weight"):
        StoryModel.open(str(folder))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        StoryModel.open(str(folder))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"schema": 2}, "schema"),
        ({"frame_tokens": 0}, "frame_tokens: wanted 1 or more, got 0"),
        ({"positions": None}, "positions: wanted 1 or more"),
        ({"vision": []}, "vision: wanted the configuration of a Blip class"),
        ({"local_heads": 7}, "local_heads: wanted heads whose width is a multiple of 8"),
    ],
)
def test_history_config_that_cannot_be_read(
    causal_folder: Path, tmp_path: Path, change: dict[str, object], wanted: str
) -> None:
    folder = broken(causal_folder, tmp_path / "broken")
    file = folder / "history" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=wanted):
        StoryModel.open(str(folder))


def test_adapters_that_belong_elsewhere(sd15_folder: Path, tmp_path: Path) -> None:
    sizes = config(64, 20)
    tensors = {f"history.{name}": tensor for name, tensor in encoder(sizes).state_dict().items()}
    metadata = {"history": json.dumps(sizes.as_dict())}
    file = tmp_path / "adapter.safetensors"
    save_file(tensors, file, metadata)
    with pytest.raises(InputError, match="history tokens of width 64, and the UNet takes"):
        StoryModel.open(str(sd15_folder), adapter=str(file))
    save_file(tensors, file)
    with pytest.raises(InputError, match="is not an adapter of causal mode"):
        StoryModel.open(str(sd15_folder), adapter=str(file))
    width = json.loads((sd15_folder / "unet" / "config.json").read_text())["cross_attention_dim"]
    sizes = config(width, 20)
    tensors = {f"history.{name}": tensor for name, tensor in encoder(sizes).state_dict().items()}
    update = {
        "unet.mid_block.nothing.lora_A": torch.zeros(2, 4),
        "unet.mid_block.nothing.lora_B": torch.zeros(4, 2),
    }
    save_file({**tensors, **update}, file, {"history": json.dumps(sizes.as_dict())})
    with pytest.raises(InputError, match=r"mid_block\.nothing does not belong to this UNet"):
        StoryModel.open(str(sd15_folder), adapter=str(file))
