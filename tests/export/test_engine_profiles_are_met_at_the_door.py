"""Risk: an engine was built for fewer sizes than its graph, and a story too large for it fails at its first UNet call."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastory import Story, generate
from fastory.errors import InputError
from fastory.events import BatchChosen
from fastory.export import build_engines
from fastory.export.profiles import profiles
from fastory.models.engine_model import EngineModel
from fastory.models.engine_sessions import bounded_by_engines, sessions_for
from fastory.models.export_folder import DrawableManifest, ExportFolder
from fastory.runtime import choose_placement

ENGINE = "unet.engine"


def record(folder: Path, sizes: Mapping[str, tuple[int, int]], **differs: Any) -> None:
    """engines.json as a build for these sizes writes it."""
    export = ExportFolder.open(folder, check=False)
    shapes = profiles(export.manifest, ["unet"], sizes)["unet"]
    made = {"component": "unet", "builder": "tensorrt", "version": "11.1.0", "flags": [], "capability": "9.0"}
    profile = {name: [list(shape) for shape in three] for name, three in shapes.items()}
    build_engines.note(
        folder, ENGINE, {**made, "name": None, "profile": profile, "sha256": {ENGINE: "0" * 64}, **differs}
    )


def opened(folder: Path, engines: Mapping[str, str]) -> EngineModel:
    """The export as it is opened where `engines` run; what is drawn here is drawn by ONNX Runtime."""
    export = ExportFolder.open(folder, check=False, schema=DrawableManifest)
    placed = choose_placement("cpu", "float32", "off")
    return EngineModel(bounded_by_engines(export, engines), placed, sessions_for(export, placed.device))


@pytest.fixture
def export(export_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export_folder, tmp_path / "export", copy_function=os.link))


def story() -> Story:
    return Story.from_captions(["a fox is sleeping in the snow", "a fox is jumping in the forest"])


def test_a_story_beyond_the_profile_is_refused_before_its_folder_is_made(
    export: Path, tmp_path: Path
) -> None:
    record(export, {"batch": (1, 2), "references": (1, 2)})
    model = opened(export, {"unet": ENGINE})
    for settings, said in (
        ({"batch_size": 2}, "batch of 1 to 2 rows"),
        ({"width": 256}, "width of 64 to 192 pixels"),
        ({"iterations": 1}, "references of 1 to 2 references"),
    ):
        quick = {"iterations": 0, "steps": 1} if "iterations" not in settings else {"steps": 1}
        with pytest.raises(InputError, match=said):
            quick |= {"references_from": "last"}  # so that round 0 has none
            list(generate(story(), model=model, output=tmp_path / "out", **quick, **settings))
        assert not (tmp_path / "out").exists()


def test_the_default_micro_batch_fits_the_profile(export: Path, tmp_path: Path) -> None:
    record(export, {"batch": (1, 2)})

    def chosen(engines: Mapping[str, str], name: str) -> int:
        events = generate(
            story(), model=opened(export, engines), output=tmp_path / name, steps=1, iterations=0
        )
        return next(event.size for event in events if isinstance(event, BatchChosen))

    assert chosen({}, "graph") == 2
    assert chosen({"unet": ENGINE}, "engine") == 1


def test_what_the_graph_takes_and_the_engine_too_is_left(export: Path) -> None:
    """The engine's bounds are in steps of the axes, as the graph's: 4*height counts a fourth of the latent's rows."""
    record(export, {"height": (64, 128), "width": (128, 128)})
    graph = opened(export, {}).folder.components["unet"]["ranges"]
    engine = opened(export, {"unet": ENGINE}).folder.components["unet"]["ranges"]
    assert engine["width"] == (4, 4) and engine["height"] == (2, 4)
    assert graph["width"][0] <= 1 and graph["width"][1] > 4


def test_a_record_of_other_inputs_is_refused(export: Path) -> None:
    record(export, {}, profile={"sample": [[1], [1], [1]]})
    with pytest.raises(InputError, match=r"was built for other inputs than unet has.*fastory export --trt"):
        opened(export, {"unet": ENGINE})


def test_a_record_without_a_profile_bounds_nothing(export: Path) -> None:
    record(export, {}, profile={})
    assert opened(export, {"unet": ENGINE}).most_rows == opened(export, {}).most_rows
