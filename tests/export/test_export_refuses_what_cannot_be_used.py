"""An export that is wrong, damaged or too small ends with a clear error, and nothing that looks finished is left."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastory import Story, StoryModel, files, generate
from fastory.cli import app
from fastory.errors import FastoryError, InputError
from fastory.export import parity
from fastory.export.choices import Groups
from fastory.export.graphs import components
from fastory.export.onnx import export_onnx
from fastory.models.engine_model import EngineModel
from fastory.models.onnx_session import OrtSession

STORY = Story.from_captions(["A fox is jumping in the forest", "A cat is sleeping in the house"])


@pytest.fixture
def copy(export_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export_folder, tmp_path / "engines"))


@pytest.fixture(scope="module")
def model(causal_builtin_folder: Path) -> StoryModel:
    return StoryModel.open(str(causal_builtin_folder), device="cpu", dtype="float32")


def change(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def edit(folder: Path, **values: object) -> None:
    file = folder / "fastory.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: change(folder / "unet.onnx.data"), "unet.onnx.data is not the file of this export"),
        (lambda folder: change(folder / "tokenizer" / "tokenizer.json"), "is not the file of this export"),
        (lambda folder: (folder / "vae_decoder.onnx").unlink(), "vae_decoder.onnx is missing"),
        (lambda folder: (folder / "fastory.json").write_text("{"), "fastory.json is damaged"),
        (lambda folder: (folder / "fastory.json").unlink(), "holds no fastory.json"),
        (lambda folder: edit(folder, schema=99), "has schema 99"),
        (
            lambda folder: shutil.copy(folder / "text_encoder.onnx", folder / "unet.onnx"),
            "unet.onnx is not the file of this export",
        ),
    ],
    ids=["weights", "tokenizer", "missing", "cut", "no-manifest", "newer", "other-component"],
)
def test_a_changed_folder_is_refused(copy: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(copy)
    with pytest.raises(InputError, match=said):
        EngineModel.open_engine(copy)


def test_an_export_keeps_what_its_weights_were_distilled_as(copy: Path) -> None:
    assert EngineModel.open_engine(copy).distilled is None
    edit(copy, distilled="lcm-lora")
    assert EngineModel.open_engine(copy).distilled == "lcm-lora"
    edit(copy, distilled="a star")
    with pytest.raises(InputError, match=r"fastory\.json.*distilled"):
        EngineModel.open_engine(copy)


def test_sizes_beyond_the_graphs_are_refused_before_drawing(export_folder: Path, tmp_path: Path) -> None:
    engine = EngineModel.open_engine(export_folder)
    for settings, said in (
        ({"width": 100}, "multiple of 32 pixels"),
        ({"width": 32 * 65}, "takes width of 32 to 2048 pixels"),
        ({"batch_size": 40}, "rows of a UNet call"),
    ):
        with pytest.raises(InputError, match=said):
            generate(STORY, model=engine, output=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_more_groups_than_exported_are_refused(
    export_folder: Path, model: StoryModel, tmp_path: Path
) -> None:
    engine = EngineModel.open_engine(export_folder)
    event = next(e for e in generate(STORY, model=model, iterations=0, steps=1) if hasattr(e, "image"))
    event.image.save(tmp_path / "a.png")
    (tmp_path / "story.yaml").write_text(
        "version: 1\ncharacters:\n"
        + "".join(f'  {name}: {{prompt: "a fox", references: [a.png]}}\n' for name in ("Anna", "Bruno"))
        + "frames: [Anna and Bruno are jumping]\n"
    )
    with pytest.raises(InputError, match=r"for 2 groups .* has 3 .*--groups 3"):
        generate(Story.read(tmp_path / "story.yaml"), model=engine)


def test_another_type_or_mode_than_exported_is_refused(export_folder: Path, copy: Path) -> None:
    with pytest.raises(InputError, match="was exported in float32"):
        EngineModel.open_engine(export_folder, dtype="float16")
    edit(copy, dtype="bfloat16")
    with pytest.raises(InputError, match="ONNX Runtime does not compute"):
        EngineModel.open_engine(copy)
    edit(copy, dtype="float32", binding="trt")
    with pytest.raises(InputError, match="--bind ort"):
        EngineModel.open_engine(copy)


def test_a_graph_with_other_weights_is_found_out(model: StoryModel, export_folder: Path) -> None:
    """The comparison can fail: one weight of a projection is a thousandth off."""
    projector = next(one for one in components(model, Groups(2)) if one.name == "text_projector")
    session = OrtSession(export_folder / "text_projector.onnx")
    parity.refuse_apart(parity.measure(projector, session))
    weight = model.layers.layers[0].attn.to_k.weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
    try:
        with pytest.raises(FastoryError, match="text_projector does not compute what torch computes"):
            parity.refuse_apart(parity.measure(projector, session))
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1e-3


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000,) * 2)
from fastory.cli import app
app(["export", "--output", sys.argv[1], "--quiet"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """The first component's weights stop at 1 MB, as a full disk would stop them."""
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "engines")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    assert "could not be written" in ended.stderr and "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_something_else_are_kept(model: StoryModel, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds another export"):
        export_onnx(model, copy, groups=1)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"no export|no fastory\.json"):
            export_onnx(model, mine, overwrite=overwrite)
    assert (mine / "letter.txt").read_text() == "dear"


def test_overwrite_never_deletes_what_no_export_wrote(model: StoryModel, copy: Path) -> None:
    """Neither a file beside the graphs nor one in a folder of the export; what a build of engines left is no obstacle."""
    for name in ("letter.txt", "tokenizer/letter.txt", "unet.engine.txt"):
        (copy / name).write_text("dear")
        with pytest.raises(InputError, match=f"holds {name}, which no export wrote"):
            export_onnx(model, copy, overwrite=True)
        assert (copy / name).read_text() == "dear"
        (copy / name).unlink()
    for name in ("engines.json", "unet.engine", "unet.rtx-sm89.engine", "unet.trt.onnx", "build_engines.py",
                 "tensorrt_packages.py", ".unet.engine.partial", "timing-nvidia-l4-sm89-11.0.cache"):  # fmt: skip
        (copy / name).write_text("ours")
    export_onnx(model, copy, overwrite=True)  # refuses nothing; its events are not asked for
    (copy / "fastory.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        export_onnx(model, copy, overwrite=True)


def test_two_exports_into_one_folder_are_refused(model: StoryModel, copy: Path) -> None:
    with files.unfinished(copy, "exports into", "wait") as place:
        for overwrite in (False, True):
            with pytest.raises(FastoryError, match=f"another process exports into {re.escape(str(copy))};"):
                list(export_onnx(model, copy, groups=2, binding="portable", overwrite=overwrite))
        assert place.is_dir()
    assert not place.exists()


def test_a_folder_of_the_users_beside_the_export_stays(model: StoryModel, copy: Path) -> None:
    beside = copy.with_name(f"{copy.name}.unfinished")
    (beside / "new").mkdir(parents=True)
    (beside / "new" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"engines\.unfinished is in the way"):
            list(export_onnx(model, copy, groups=2, overwrite=overwrite))
    assert (beside / "new" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "--bind", "cuda"], "--bind: wanted one of ort, portable, trt"),
        (["export", "--groups", "0"], "--groups: wanted 1 or more"),
        (["export", "--characters", "-1"], "--characters: wanted 0 or more"),
        (
            ["export", "--boxes"],
            "--boxes is about characters with references of their own; give --characters",
        ),
        (["export", "--trt", "--size", "depth=3"], "NAME one of batch"),
        (["export", "--trt", "--rtx", "sm90"], "--rtx sm90: TensorRT for RTX builds for"),
        (["export", "--refit"], "--refit is about engines; give --trt"),
        (["generate", "flag", "--engine", "nowhere"], "holds no fastory.json"),
        (["generate", "flag", "--engine", "nowhere", "--lora", "a"], "--lora is given when it is exported"),
    ],
    ids=[
        "bind",
        "groups",
        "characters",
        "boxes",
        "size",
        "target",
        "engines",
        "no-engine",
        "engine-and-lora",
    ],
)
def test_the_command_line_says_what_was_wanted(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
