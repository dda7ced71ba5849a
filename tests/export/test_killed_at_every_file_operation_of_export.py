"""`fastory export`, killed before any of its changes of the disk, leaves the old export or the new one, and goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed import check_every_operation, contents, run_apart

from fastory import StoryModel
from fastory.export.choices import Groups
from fastory.export.component import Component
from fastory.export.graphs import components
from fastory.models.export_folder import ExportFolder

pytest.importorskip("onnxruntime", reason="exported graphs run on ONNX Runtime")

QUICK = 3  # of 40 and more, each of which traces and compares twice
SLOW = pytest.param(None, marks=pytest.mark.slow)
ONE = "text_projector"  # the component that is traced in two seconds


def only_one(model: StoryModel, groups: Groups) -> Iterator[Component]:
    return (component for component in components(model, groups) if component.name == ONE)


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, sd15_folder: Path):
    """export(folder, ...) of one component of a small model."""
    from fastory.export import onnx, parity

    monkeypatch.setattr(onnx, "components", only_one)
    monkeypatch.setattr(parity, "components", only_one)
    model = StoryModel.open(str(sd15_folder), device="cpu", dtype="float32")

    def run(folder: Path, **options: object) -> None:
        list(onnx.export_onnx(model, folder / "out", **options))  # type: ignore[arg-type]

    return run


@pytest.fixture
def other(export, tmp_path: Path) -> Path:
    """An export for two groups, with an engine's record and its graph beside it."""
    (tmp_path / "other").mkdir()
    ended = run_apart(lambda folder: export(folder, groups=2), tmp_path / "other")
    assert ended.status == 0, ended.said
    (tmp_path / "other" / "out" / "engines.json").write_text("{}")
    shutil.copy(tmp_path / "other" / "out" / f"{ONE}.onnx", tmp_path / "other" / "out" / f"{ONE}.trt.onnx")
    return tmp_path / "other" / "out"


def check_whole(folder: Path, old: dict[str, str] | None) -> None:
    """The export that is there opens, its files compared with their hashes; or it lies aside as it was."""
    if (folder / "out").exists():
        ExportFolder.open(folder / "out")
    else:
        assert old is None or contents(folder / "out.unfinished" / "old") == old


@pytest.mark.parametrize("most", [SLOW], ids=["every"])
def test_export(export, most: int | None, tmp_path: Path) -> None:
    def after(folder: Path) -> None:
        check_whole(folder, None)

    operations = check_every_operation(tmp_path, lambda folder: None, export, most=most, after_kill=after)
    assert ("replace", "out") in operations


@pytest.mark.parametrize("most", [QUICK, SLOW], ids=["some", "every"])
def test_overwriting(export, other: Path, most: int | None, tmp_path: Path) -> None:
    old = contents(other)

    def prepare(folder: Path) -> None:
        shutil.copytree(other, folder / "out")

    def command(folder: Path) -> None:
        export(folder, overwrite=True)

    def after(folder: Path) -> None:
        check_whole(folder, old)

    operations = check_every_operation(tmp_path, prepare, command, most=most, after_kill=after)
    assert ("replace", "out.unfinished/old") in operations


@pytest.mark.parametrize("most", [SLOW], ids=["every"])
def test_binding_anew(export, other: Path, most: int | None, tmp_path: Path) -> None:
    """Graphs are replaced one by one, fastory.json last: what a kill leaves, the same command finishes."""

    def prepare(folder: Path) -> None:
        shutil.copytree(other, folder / "out")

    def command(folder: Path) -> None:
        export(folder, groups=2, binding="portable")

    operations = check_every_operation(tmp_path, prepare, command, most=most)
    assert operations.index(("replace", f"out/{ONE}.onnx")) < operations.index(
        ("replace", "out/fastory.json")
    )
