"""Risk: a measure leaves frames out in silence, compares the wrong pairs, or is not what the field computes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import check_every_operation
from PIL import Image
from small_clip import write_clip
from transformers import CLIPModel, CLIPProcessor
from typer.testing import CliRunner

from fastory import Story, StoryModel, generate
from fastory.cli import app
from fastory.evaluation.clip import Clip
from fastory.evaluation.journal import Journal
from fastory.evaluation.measures import ClipMeasure, measure, off_diagonal_mean
from fastory.evaluation.rows import Measured
from fastory.evaluation.stories import DrawnStory, read_drawn
from fastory.files import sha256_of

CAPTIONS = ["a fox is sleeping in the snow", "a cat is jumping", "a bear is reading a book in the house"]


@pytest.fixture(scope="module")
def clip_folder(builtin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"), builtin_folder / "tokenizer")


def measured(clip: Path, story: DrawnStory) -> list[Measured]:
    return list(measure([story], [ClipMeasure(Clip(clip, name="small"))]))


def of(rows: list[Measured], kind: str, metric: str) -> list[Measured]:
    return [row for row in rows if (row.kind, row.metric) == (kind, metric)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A story of three frames with random pictures, as a folder that is no run."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "story.txt").write_text("\n".join(CAPTIONS))
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / "own" / f"frame-{i:03d}.png")
    return tmp_path / "own"


def test_a_frame_s_clip_t_is_the_cosine_that_transformers_computes(clip_folder: Path, folder: Path) -> None:
    """logits_per_image is the cosine times exp(logit_scale); its diagonal belongs to the captions of the frames."""
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    images = [Image.open(folder / f"frame-{i:03d}.png") for i in range(3)]
    inputs = processor(text=CAPTIONS, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    wanted = (out.logits_per_image / model.logit_scale.exp()).detach().diagonal()
    rows = measured(clip_folder, read_drawn(folder)[0])
    found = [row.value for row in of(rows, "frame", "clip_t")]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    images_alone = torch.nn.functional.normalize(out.image_embeds, dim=-1)
    cosines = [float(images_alone[i] @ images_alone[j]) for i in range(3) for j in range(3) if i != j]
    (alike,), (story,) = of(rows, "story", "clip_i_self"), of(rows, "story", "clip_t")
    assert alike.value == pytest.approx(np.mean(cosines), abs=1e-5)
    assert story.value == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert story.by.model == "small" and story.by.sha256 == sha256_of(clip_folder / "model.safetensors")


class WithTensors(CLIPModel):
    """transformers 5 wraps features in an output object, which torchmetrics 1.9's CLIPScore does not expect."""

    def get_image_features(self, *arguments: Any, **options: Any) -> Any:
        return super().get_image_features(*arguments, **options).pooler_output

    def get_text_features(self, *arguments: Any, **options: Any) -> Any:
        return super().get_text_features(*arguments, **options).pooler_output


def test_clip_t_is_torchmetrics_clip_score(clip_folder: Path, folder: Path) -> None:
    """Its score is the mean of 100 times the cosine of each pair, at least 0."""
    multimodal = pytest.importorskip("torchmetrics.multimodal", reason="the oracle: pip install .[eval]")
    opened = WithTensors.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    oracle = multimodal.CLIPScore(model_name_or_path=lambda: opened)
    rows = of(measured(clip_folder, read_drawn(folder)[0]), "frame", "clip_t")
    for i, row in enumerate(rows):
        pixels = torch.from_numpy(np.array(Image.open(folder / f"frame-{i:03d}.png"))).permute(2, 0, 1)
        wanted = float(oracle(pixels, CAPTIONS[i])) / 100
        assert max(row.value or 0.0, 0.0) == pytest.approx(wanted, abs=1e-5)


def test_off_diagonal_mean_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert off_diagonal_mean(features) == pytest.approx((0.0 + 0.6 + 0.8) / 3)
    assert off_diagonal_mean(features[:1]) is None


def test_a_picture_that_cannot_be_read_is_a_row_with_its_reason(clip_folder: Path, folder: Path) -> None:
    (folder / "frame-001.png").write_bytes(b"no picture")
    (folder / "frame-002.png").unlink()
    rows = measured(clip_folder, read_drawn(folder)[0])
    frames = of(rows, "frame", "clip_t")
    assert [row.value is None for row in frames] == [False, True, True]
    assert "frame-001.png" in str(frames[1].missing) and "frame-002.png" in str(frames[2].missing)
    (alike,), (story,) = of(rows, "story", "clip_i_self"), of(rows, "story", "clip_t")
    assert (alike.count, alike.of, alike.value) == (1, 3, None) and alike.missing == "fewer than two pictures"
    assert (story.count, story.of) == (1, 3) and story.value == frames[0].value


def test_a_story_without_any_picture_is_counted_as_left_out(clip_folder: Path, folder: Path) -> None:
    whole = read_drawn(folder)[0]
    for picture in whole.pictures:
        picture.rename(picture.with_suffix(".gone"))
    found = measured(clip_folder, whole)
    (mean,) = of(found, "mean", "clip_t")
    assert (mean.value, mean.count, mean.of) == (None, 0, 1) and "frame-000.png" in str(mean.missing)


def test_the_command_measures_a_run_folder_and_writes_what_it_found(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = StoryModel.open("builtin", device="cpu")
    story = Story.from_captions(CAPTIONS[:2], title="two")
    list(generate(story, model=model, output=tmp_path / "run", iterations=0, steps=1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    command = ["eval", "run", "--clip", str(clip_folder), "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, "-o", "table.json"])
    assert done.exit_code == 0, done.output
    assert "two" in done.stdout and "2 of 2" in done.stdout and "table.json" in done.stdout
    table = json.loads((tmp_path / "table.json").read_text())
    rows = table["rows"]
    assert (
        table["schema"] == 1 and [row["kind"] for row in rows] == ["frame"] * 2 + ["story"] * 2 + ["mean"] * 2
    )
    assert rows[0]["caption"] == CAPTIONS[0] and rows[-1]["by"]["model"] == str(clip_folder)
    assert all(row["by"]["versions"]["torch"] and len(row["by"]["sha256"]) == 64 for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "table.json"]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    lines = CliRunner().invoke(app, [*command, "--json"]).stdout.splitlines()
    assert [json.loads(line)["metric"] for line in lines] == [row["metric"] for row in rows]
    for name in ("table.md", "table.tex"):
        assert CliRunner().invoke(app, [*command, "-o", name]).exit_code == 0
        assert "CLIP-T" in (tmp_path / name).read_text()
    again = CliRunner().invoke(app, [*command, "-o", "table.json"])
    assert again.exit_code == 2 and "exists; wanted a name that is free" in again.stderr


def test_an_eval_that_is_killed_anywhere_goes_on_to_the_same_table(
    clip_folder: Path, folder: Path, tmp_path: Path
) -> None:
    """A line a story is kept beside the table until that is written; a story with a picture that is none among them."""

    def prepare(place: Path) -> None:
        for name in ("a", "b"):
            shutil.copytree(folder, place / name)
        (place / "b" / "frame-001.png").write_bytes(b"no picture")

    def command(place: Path) -> None:
        os.chdir(place)
        arguments = ["eval", "a", "b", "--clip", str(clip_folder), "-o", "table.json", "--device", "cpu"]
        assert CliRunner().invoke(app, arguments).exit_code == 0

    kept = list[int]()

    def after_kill(place: Path) -> None:
        found = [path for path in place.iterdir() if path.name.startswith("table.json")]
        lines = [line for path in found for line in path.read_text().splitlines() if '"key"' in line]
        kept.append(len(lines))

    done = check_every_operation(tmp_path / "trials", prepare, command, after_kill=after_kill, most=3)
    assert max(kept) == 2 and len(done) >= 4


def test_what_was_measured_before_replaces_no_table_of_somebody(
    clip_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill left beside it is no leave to write over another file of that name."""
    monkeypatch.chdir(folder.parent)
    Path("table.json").write_text("mine")
    Journal(Path("table.json.unfinished")).keep("key", [])
    done = CliRunner().invoke(
        app, ["eval", "own", "--clip", str(clip_folder), "-o", "table.json", "--device", "cpu"]
    )
    assert done.exit_code == 2 and "table.json exists; wanted a name that is free" in done.stderr
    assert Path("table.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "wanted a run folder"),
        (["."], "wanted a story file"),
        (["own", "--clip", "no/such/thing/here"], "no/such/thing/here"),
        (["own", "--clip", "own"], "own"),
        (["own", "--clip", "owner/name", "--offline"], "--offline forbids downloading"),
        (["own", "-o", "missing/table.json"], "wanted a file in a folder that exists"),
        (["own", "-o", "table.csv"], "ends in .json, .md, .tex"),
        (["own", "--metrics", "beauty"], "--metrics: wanted"),
    ],
    ids=[
        "no folder",
        "no story",
        "no hub id",
        "no CLIP",
        "offline",
        "no folder for the table",
        "form",
        "metric",
    ],
)
def test_what_cannot_be_measured_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(folder.parent)
    done = CliRunner().invoke(app, ["eval", *arguments, "--device", "cpu"])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr
