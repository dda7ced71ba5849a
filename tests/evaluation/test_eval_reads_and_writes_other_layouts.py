"""Risk: stories are read in the order of letters, an export leaves half of itself, `all` stops at the first missing weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastory.cli import app
from fastory.errors import InputError
from fastory.evaluation.stories import read_drawn
from fastory.evaluation.vistory import export

YAML = """characters:
  Mia: {prompt: a fox, references: [mia.png]}
frames:
  - {caption: Mia is sleeping in the snow., boxes: {Mia: [0.1, 0.1, 0.6, 0.9]}}
  - Mia is jumping in the forest.
  - a bear is reading in the house
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A story with a character and random pictures, as a folder that is no run."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    (own / "story.yaml").write_text(YAML)
    noise = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise[:3]):
        Image.fromarray(pixels).save(own / f"frame-{i:03d}.png")
    Image.fromarray(noise[3]).save(own / "mia.png")
    return own


def invoke(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])
    return done.exit_code, done.stdout, done.stderr


def test_what_a_story_annotates_is_read(folder: Path) -> None:
    (drawn,) = read_drawn(folder)
    (mia,) = drawn.characters
    assert (mia.frames, mia.noun, mia.boxes) == ((0, 1), "fox", {0: (0.1, 0.1, 0.6, 0.9)})
    assert mia.references == ((folder / "mia.png").resolve(),)
    (folder / "story.yaml").unlink()
    (folder / "story.txt").write_text("a vixen sleeps\nthe cub and a fox jump\na fox\n")
    (drawn,) = read_drawn(folder)
    assert [(c.name, c.frames) for c in drawn.characters] == [("fox", (0, 1, 2)), ("bear", (1,))]


def test_an_export_for_vistorybench_is_read_back_in_the_order_of_numbers(
    folder: Path, tmp_path: Path
) -> None:
    stories = read_drawn(folder) * 11
    written = export(stories, tmp_path / "outputs", when="20261126_120000")
    assert written == tmp_path / "outputs" / "fastory" / "base" / "en" / "20261126_120000"
    assert sorted(p.name for p in written.iterdir()) == [f"{n:02d}" for n in range(1, 12)]
    assert (written / "11" / "shots" / "02.png").read_bytes() == (folder / "frame-002.png").read_bytes()
    back = read_drawn(written)
    assert [story.folder.name for story in back] == [f"{n:02d}" for n in range(1, 12)]
    assert [story.captions for story in back] == [stories[0].captions] * 11
    assert back[0].characters[0].references[0].read_bytes() == (folder / "mia.png").read_bytes()
    (written / "9").mkdir()
    shutil.move(written / "09" / "shots", written / "9" / "shots")
    shutil.move(written / "09" / "story.yaml", written / "9" / "story.yaml")
    shutil.move(written / "09" / "references", written / "9" / "references")
    assert [story.folder.name for story in read_drawn(written)][7:10] == ["08", "9", "10"]
    with pytest.raises(InputError, match="exists"):
        export(stories, tmp_path / "outputs", when="20261126_120000")


def test_an_export_that_cannot_be_whole_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "frame-001.png").unlink()
    with pytest.raises(InputError, match=r"frame-001\.png is missing"):
        export(read_drawn(folder), tmp_path / "outputs", when="20261126_120000")
    assert not (tmp_path / "outputs").exists()


def test_pictures_whose_captions_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    """ViStoryBench's outputs hold pictures alone."""
    shots = tmp_path / "run" / "01" / "shots"
    shots.mkdir(parents=True)
    for i in range(2):
        shutil.copy(folder / f"frame-{i:03d}.png", shots / f"{i:02d}.png")
    with pytest.raises(InputError, match="--captions"):
        read_drawn(tmp_path / "run")
    (tmp_path / "said").mkdir()
    (tmp_path / "said" / "01.txt").write_text("a\nb\n")
    (story,) = read_drawn(tmp_path / "run", tmp_path / "said")
    assert story.captions == ("a", "b") and [p.is_file() for p in story.pictures] == [True, True]


def test_all_that_can_be_measured_without_a_download(folder: Path, tmp_path: Path) -> None:
    """What is missing is a line that names it; every row of the table says what measured it."""
    (tmp_path / "truth").mkdir()
    for i in range(3):
        shutil.copy(folder / f"frame-{(i + 1) % 3:03d}.png", tmp_path / "truth" / f"frame-{i:03d}.png")
    code, _, err = invoke(
        *("eval", "own", "--encoder", "builtin", "--metrics", "all", "--offline", "--truth", "truth"),
        *("--detector", "boxes", "-o", "table.json", "--export-vistorybench", "bench"),
    )
    assert code == 0, err
    assert "not measured: DINO" in err and "facebook/dinov2-small" in err and "insightface" in err
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    means = {row["metric"]: row for row in rows if row["kind"] == "mean"}
    assert {name for name, row in means.items() if row["value"] is not None} == {
        *(
            "clip_t",
            "clip_i_self",
            "clip_i",
            "accs",
            "fid",
            "kid",
            "cids_cross",
            "cids_self",
            "copy_paste",
            "occm",
        )
    }
    assert means["fid"]["value"] == pytest.approx(0.0, abs=1e-5) and means["fid"]["count"] == 3
    assert means["accs"]["notes"] == {"crops": 1, "expected": 2, "misses": 1, "characters seen once": 0}
    assert means["accs"]["value"] == 0.0
    assert all(len(row["by"]["sha256"]) == 64 and row["by"]["versions"] for row in rows)
    assert len(list((tmp_path / "bench").rglob("shots/*.png"))) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metrics", "fid"], "--truth"),
        (["--metrics", "clip_i", "--truth", "nowhere"], "--truth nowhere"),
        (["--metrics", "afid", "--features", "none.pth"], "pt_inception-2015-12-05-6726825d.pth"),
        (["--metrics", "afid", "--features", "inception", "--offline"], "fastory[inception]"),
        (["--metrics", "accs", "--detector", "no/such/thing/here", "--offline"], "no/such"),
        (["--metrics", "dino", "--dino", "own"], "holds no weights"),
        (["--metrics", "fid", "--truth", "empty"], "without any"),
    ],
)
def test_what_a_measure_misses_is_one_line(folder: Path, arguments: list[str], said: str) -> None:
    Path("empty").mkdir()
    if "fastory[inception]" in said and __import__("importlib.util").util.find_spec("torch_fidelity"):
        pytest.skip("torch-fidelity is installed")
    code, out, err = invoke("eval", "own", "--encoder", "builtin", *arguments, "-o", "t.json")
    assert (code, out) == (2, "") and err.count("\n") == 1 and said in err, err
    assert not Path("t.json").exists()
