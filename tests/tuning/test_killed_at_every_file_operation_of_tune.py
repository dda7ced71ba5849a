"""`fastory tune`, killed before any of its changes of the disk, ends in the same bytes when it is run again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from killed import check_every_operation, contents, run_apart
from safetensors.torch import load_file
from small_stories import write_stories

from fastory.tuning.loop import tune
from fastory.tuning.sizes import HistorySizes, Tuning

QUICK = 3  # of about 70, each of which costs two tunings
SHORT = Tuning(steps=2, batch_size=1, frames=2, warmup=1, rank=2, save_every=1, validate_every=0)
SMALL = HistorySizes(positions=3, local_heads=4, bottleneck=8, frame_tokens=12)
TENSORBOARD = "tensorboard"  # its files are named after the time


def run(base: Path, stories: Path, folder: Path, overwrite: bool, seed: int = 0) -> None:
    tuning = Tuning(**{**vars(SHORT), "seed": seed})
    options = {"model": str(base), "tuning": tuning, "sizes": SMALL, "device": "cpu", "offline": True}
    list(tune(stories, folder / "a.safetensors", overwrite=overwrite, **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize(
    ("overwrite", "most"),
    [
        pytest.param(False, QUICK, id="new-some"),
        pytest.param(False, None, id="new-every", marks=pytest.mark.slow),
        pytest.param(True, None, id="overwrite-every", marks=pytest.mark.slow),
    ],
)
def test_tune(sd15_folder: Path, stories: Path, overwrite: bool, most: int | None, tmp_path: Path) -> None:
    def prepare(folder: Path) -> None:
        if overwrite:
            shutil.copytree(tmp_path / "other", folder, dirs_exist_ok=True)

    def command(folder: Path) -> None:
        run(sd15_folder, stories, folder, overwrite)

    def whole(folder: Path) -> None:
        if (folder / "a.safetensors").exists():
            load_file(folder / "a.safetensors")
        assert not overwrite or (folder / "a.safetensors").exists()

    if overwrite:
        (tmp_path / "other").mkdir()
        # In a child: accelerate's state, once made, would be in all that are forked afterwards.
        ended = run_apart(lambda folder: run(sd15_folder, stories, folder, False, seed=1), tmp_path / "other")
        assert ended.status == 0, ended.said
    operations = check_every_operation(
        tmp_path,
        prepare,
        command,
        most=most,
        look=lambda folder: contents(folder, skip=(".lock", TENSORBOARD)),
        after_kill=whole,
    )
    assert ("replace", "a.safetensors") in operations
