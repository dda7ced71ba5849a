"""`fastory convert`, killed before any of its changes of the disk, leaves the old output or the new one, and goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killed import check_every_operation, contents
from original_causal_layout import weights, write_checkpoint, write_config
from safetensors.torch import load_file

from fastory.checkpoints import convert_checkpoint

QUICK = 12
QUICK_FOLDER = 7  # of the operations of a folder, each of which costs two conversions


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pickles of an IP-Adapter's layout: `a.bin`, and the file of another one, converted."""
    folder = tmp_path_factory.mktemp("adapter")
    for name, value in (("a", 1.0), ("other", 2.0)):
        held = {
            "image_proj": {"proj.weight": torch.full((4, 4), value)},
            "ip_adapter": {"1.k": torch.ones(3)},
        }
        torch.save(held, folder / f"{name}.bin")
    convert_checkpoint(folder / "other.bin")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AR-LDM checkpoint, its configs, and the folder of another one, converted."""
    folder = tmp_path_factory.mktemp("ar-ldm")
    write_config(folder / "config")
    tensors = weights()
    shift = {"time_embeddings.weight": tensors["time_embeddings.weight"] + 1}
    write_checkpoint(folder / "other.ckpt", tensors | shift)
    convert_checkpoint(folder / "other.ckpt", folder / "other", config=folder / "config")
    write_checkpoint(folder / "story.ckpt", tensors)
    return folder


def whole_or_aside(output: Path, old: dict[str, str] | None) -> None:
    """After a kill the output is the old one, a whole new one, or missing while the old one lies aside."""
    aside = output.with_name(f"{output.name}.unfinished") / "old"
    if not output.exists():
        assert old is None or contents(aside) == old
    elif output.is_dir():
        assert contents(output) == old or (output / "model_index.json").is_file()
    else:
        load_file(output)


@pytest.mark.parametrize("most", [QUICK, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_ip_adapter(adapter: Path, overwrite: bool, most: int | None, tmp_path: Path) -> None:
    def prepare(folder: Path) -> None:
        if overwrite:
            shutil.copy(adapter / "other.safetensors", folder / "a.safetensors")

    def command(folder: Path) -> None:
        convert_checkpoint(adapter / "a.bin", folder / "a.safetensors", overwrite=overwrite)

    operations = check_every_operation(
        tmp_path,
        prepare,
        command,
        most=most,
        after_kill=lambda folder: whole_or_aside(folder / "a.safetensors", None),
    )
    assert ("replace", "a.safetensors") in operations


@pytest.mark.parametrize(
    "most", [QUICK_FOLDER, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "every"]
)
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_ar_ldm(checkpoint: Path, overwrite: bool, most: int | None, tmp_path: Path) -> None:
    old = contents(checkpoint / "other") if overwrite else None

    def prepare(folder: Path) -> None:
        if overwrite:
            shutil.copytree(checkpoint / "other", folder / "model")

    def command(folder: Path) -> None:
        options = {"config": checkpoint / "config", "overwrite": overwrite, "offline": True}
        convert_checkpoint(checkpoint / "story.ckpt", folder / "model", **options)  # type: ignore[arg-type]

    check: Callable[[Path], None] = lambda folder: whole_or_aside(folder / "model", old)  # noqa: E731
    operations = check_every_operation(tmp_path, prepare, command, most=most, after_kill=check)
    assert ("replace", "model") in operations
