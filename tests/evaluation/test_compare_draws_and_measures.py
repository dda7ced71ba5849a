"""Risk: a comparison draws again what is finished, counts calls wrong after an interruption, or compares something else."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed import check_every_operation
from PIL import Image
from typer.testing import CliRunner

from fastory import Story, StoryModel
from fastory.builtin.evaluation.iterative import held_out_stories
from fastory.builtin.world.reading import UnreadableCaption, read_tale
from fastory.cli import app
from fastory.cli.compare import write
from fastory.errors import InputError
from fastory.evaluation.choices import BUILTIN
from fastory.evaluation.clip import open_encoder
from fastory.evaluation.compare import Comparison
from fastory.evaluation.costs import Cost
from fastory.evaluation.journal import Journal, key_of
from fastory.evaluation.judged import JudgeMeasure
from fastory.evaluation.measures import ClipMeasure, Opened, measure
from fastory.evaluation.methods import Method, parse_rounds, read_methods
from fastory.evaluation.plots import available, plots
from fastory.evaluation.rows import Measured, Source, means
from fastory.evaluation.tables import METRICS, as_latex, as_markdown
from fastory.events import Event, FrameDrawn, StepDone
from fastory.pictures import open_picture
from fastory.presets import PRESETS
from fastory.settings import MODES
from fastory.story import read_stories

CAPTIONS = ("a fox is sleeping in the snow", "a fox is jumping in the forest")
METHODS = [
    Method("iterative", "iterative", None, {"iterations": 2}, (0, 2)),
    Method("causal+drafts=1", "causal", None, {"drafts": 1}),
]
FEW = {"steps": 2}


@pytest.fixture(scope="module")
def model() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


@pytest.fixture(scope="module")
def story() -> Story:
    return Story.from_captions(CAPTIONS, title="fox & snow")


@pytest.fixture(scope="module")
def compared(
    model: StoryModel, story: Story, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Comparison, list[Measured]]:
    """One finished comparison, which tests read."""
    comparison = Comparison(model, [story], METHODS, FEW, tmp_path_factory.mktemp("compared") / "dir")
    with comparison:
        list(comparison.draw())
        rows = list(comparison.measure([ClipMeasure(open_encoder(BUILTIN)), JudgeMeasure()]))
        write(comparison, rows)
    return comparison, rows


def mean_of(rows: list[Measured], metric: str, method: str, round: int | None) -> Measured:
    (found,) = (
        r for r in rows if r.kind == "mean" and (r.metric, r.method, r.round) == (metric, method, round)
    )
    return found


def test_calls_are_those_of_the_rounds_up_to_the_measured_one(
    compared: tuple[Comparison, list[Measured]],
) -> None:
    """Two steps a picture: round 0 costs 2, rounds 0 to 2 cost 6; of causal mode frame 0 is drawn twice, 3 calls a frame."""
    rows = compared[1]
    assert mean_of(rows, "unet_calls", "iterative", 0).value == 2.0
    assert mean_of(rows, "unet_calls", "iterative", 2).value == 6.0
    assert mean_of(rows, "unet_calls", "causal+drafts=1", None).value == 3.0
    seconds = [mean_of(rows, "seconds", "iterative", k).value for k in (0, 2)]
    assert 0 < (seconds[0] or 0) < (seconds[1] or 0)


def test_each_round_is_measured_by_its_own_pictures(compared: tuple[Comparison, list[Measured]]) -> None:
    comparison, rows = compared
    encoder = open_encoder(BUILTIN)
    for k in (0, 2):
        folder = comparison.cells[0].folder / f"iteration-{k:02d}"
        features = encoder.pictures([open_picture(folder / f"frame-00{i}.png") for i in range(2)])
        found = mean_of(rows, "clip_i_self", "iterative", k)
        assert found.value == pytest.approx(float(features[0] @ features[1]), abs=1e-6)
        assert found.by.sha256 == encoder.sha256 and found.by.versions["fastory"]


def test_clip_t_is_of_the_raw_captions_by_the_built_in_pair(
    compared: tuple[Comparison, list[Measured]],
) -> None:
    comparison, rows = compared
    encoder = open_encoder(BUILTIN)
    seen = encoder.pictures([open_picture(path) for path in comparison.cells[0].drawn(2).pictures])
    wanted = float((seen * encoder.captions(CAPTIONS)).sum(1).mean())
    assert mean_of(rows, "clip_t", "iterative", 2).value == pytest.approx(wanted, abs=1e-6)
    assert "CLIP-T" in as_markdown(rows)


def test_what_is_finished_is_neither_drawn_nor_measured_again(
    compared: tuple[Comparison, list[Measured]], model: StoryModel, story: Story
) -> None:
    comparison, rows = compared
    before = {p: p.read_bytes() for p in comparison.output.rglob("*") if p.is_file()}

    class Never(ClipMeasure):
        def rows(self, opened: Opened) -> Any:
            raise AssertionError("measured again")

    Never.__name__ = ClipMeasure.__name__  # what is kept goes by the measure's name
    with Comparison(model, [story], METHODS, FEW, comparison.output) as again:
        events = [event for _, event in again.draw()]
        assert not [event for event in events if isinstance(event, StepDone | FrameDrawn)]
        found = list(again.measure([Never(open_encoder(BUILTIN)), JudgeMeasure()]))
        assert found == rows
        write(again, found)
    assert {p: p.read_bytes() for p in comparison.output.rglob("*") if p.is_file()} == before


def test_an_interrupted_comparison_counts_every_call_once(
    compared: tuple[Comparison, list[Measured]], model: StoryModel, story: Story, tmp_path: Path
) -> None:
    """It is ended after each of its first pictures, in the middle of a micro-batch too."""
    for stop in (1, 3):
        folder, drawn = tmp_path / str(stop), 0
        with Comparison(model, [story], METHODS[:1], FEW, folder) as begun:
            events = begun.draw(batch_size=2)
            for _, event in events:
                drawn += isinstance(event, FrameDrawn)
                if drawn == stop:
                    break
            events.close()
        with Comparison(model, [story], METHODS[:1], FEW, folder) as again:
            steps = Counter[int]()
            for _, event in again.draw(batch_size=2):
                if isinstance(event, StepDone):
                    steps.update(event.frames)
            assert 0 < steps.total() < 12
            assert Cost.read(again.cells[0].cost).calls == {k: {0: 2, 1: 2} for k in range(3)}
            wanted = [path.read_bytes() for path in compared[0].cells[0].drawn(2).pictures]
            assert [path.read_bytes() for path in again.cells[0].drawn(2).pictures] == wanted


def test_an_interrupted_measurement_goes_on(
    compared: tuple[Comparison, list[Measured]], tmp_path: Path
) -> None:
    """A kill leaves half a line: what is whole is taken, the rest is measured."""
    story, by = compared[0].cells[0].drawn(0), ClipMeasure(open_encoder(BUILTIN))
    whole = list(measure([story], [by], Journal(tmp_path / "j")))
    text = (tmp_path / "j").read_text()
    for cut in range(len(text.split("\n")[0]) + 1, len(text), 97):
        (tmp_path / "j").write_text(text[:cut])
        assert list(measure([story], [by], Journal(tmp_path / "j"))) == whole
        assert Journal(tmp_path / "j").get(key_of(story, "ClipMeasure", by.sources)) is not None
    (tmp_path / "j").write_text("a user's notes\n")
    with pytest.raises(InputError, match="in the way"):
        Journal(tmp_path / "j")


def test_tables_and_page_have_every_method_and_say_what_is_missing(
    compared: tuple[Comparison, list[Measured]],
) -> None:
    comparison, rows = compared
    data = json.loads((comparison.output / "table.json").read_text())
    assert data["schema"] == 1 and data["rows"] == [row.as_data() for row in rows]
    assert data["methods"]["causal+drafts=1"]["drafts"] == 1 and data["models"]
    markdown, latex = as_markdown(rows), as_latex(rows)
    columns = {line.count("|") for line in markdown.split("\n") if line.startswith("|")}
    assert len(columns) == 1
    assert {line.count(" & ") for line in latex.split("\n") if line.endswith(r"\\")} == {columns.pop() - 2}
    page = (comparison.output / "page.html").read_text()
    assert len(re.findall(r'<img src="data:image/webp', page)) == 2 * 2
    assert "fox &amp; snow" in page and "iterative, round 2" in page


def row(metric: str, value: float | None, story: str, **more: Any) -> Measured:
    return Measured(metric, value, Source("x"), story, story, **more)


def test_means_count_every_story_once_and_only_those_with_a_figure() -> None:
    rows = [row("accs", 0.2, "a", notes={"misses": 1}), row("accs", 0.6, "b", notes={"misses": 2})]
    rows += [row("accs", None, "c", missing="nobody", notes={"misses": 4}), row("accs", 9.0, "a", frame=0)]
    (mean,) = means(rows)
    assert mean.value == pytest.approx(0.4) and (mean.count, mean.of) == (2, 3)
    assert mean.notes == {"misses": 7} and mean.missing is None
    assert mean.low == pytest.approx(0.2) and mean.high == pytest.approx(0.6)
    assert "misses 7" in as_markdown([mean]) and "of 2 of 3 stories" in as_markdown([mean])


def test_curves_lie_where_their_values_are() -> None:
    """Rounds at their true distances, a method without rounds as a level, and UNet calls under what they bring."""
    pytest.importorskip("matplotlib", reason="plots: pip install .[plots]")
    lines = [("it", 0, 0.0), ("it", 1, 0.1), ("it", 3, 0.3), ("flat", None, 0.15)]
    rows = [row("accs", value, "a", method=m, round=k) for m, k, value in lines]
    rows += [row("unet_calls", 15.0 * (1 + (k or 0)), "a", method=m, round=k) for m, k, _ in lines]
    found = [one for m, k, _ in lines for one in means([r for r in rows if (r.method, r.round) == (m, k)])]
    curves, costs = plots(found)
    it, flat = (points(curves.svg, f"var(--c{n})") for n in range(2))
    (x0, y0), (x1, y1), (x3, y3) = it
    assert x3 - x0 == pytest.approx(3 * (x1 - x0), rel=1e-4) and x3 > x0
    assert y0 - y3 == pytest.approx(3 * (y0 - y1), rel=1e-4) and y0 > y3  # SVG counts from above
    assert [y for _, y in flat] == pytest.approx([(y0 + y3) / 2] * 2, rel=1e-4)
    assert costs.title == "aCCS and UNet calls a frame" and len(points(costs.svg, "var(--c0)")) == 3
    assert plots(found[-2:]) == []
    assert plots(found) == [curves, costs]  # the same rows, the same bytes


def points(svg: str, colour: str) -> list[tuple[float, float]]:
    """Of the line in a colour."""
    (line,) = re.findall(rf'<path d="([^"]*)"[^>]*fill="none"[^>]*stroke="{re.escape(colour)}"', svg)
    numbers = [float(number) for number in re.findall(r"-?[0-9.]+", line)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_a_page_needs_neither_style_attributes_nor_addresses(
    compared: tuple[Comparison, list[Measured]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its policy admits its one style sheet; ids are no other plot's; without matplotlib it says what is wanted."""
    comparison, rows = compared
    page = (comparison.output / "page.html").read_text()
    if available():
        ids = re.findall(r' id="([^"]*)"', page)
        assert "var(--c0)" in page and len(set(ids)) == len(ids)
    assert ' style="' not in page and "://" not in re.sub(r'content="[^"]*"|data:[^"]*', "", page)
    monkeypatch.setattr("fastory.evaluation.page.available", lambda: False)
    write(comparison, rows)
    bare = (comparison.output / "page.html").read_text()
    assert "pip install &#39;fastory[plots]&#39;" in bare and 'id="plots"' not in bare
    assert "iterative, round 2" in bare
    (comparison.output / "page.html").write_text(page)


def test_a_method_is_a_mode_or_a_preset_with_settings_that_its_mode_reads() -> None:
    found = read_methods("iterative+reference_scale=0.3:0.3,causal,paper", (0, 1, 5))
    assert [(m.mode, m.preset) for m in found] == [
        ("iterative", None),
        ("causal", None),
        ("iterative", "paper"),
    ]
    assert found[0].settings == {"reference_scale": (0.3, 0.3), "iterations": 5} and found[0].rounds == (
        0,
        1,
        5,
    )
    assert found[1].settings == {} and found[1].rounds == ()
    (own,) = read_methods("iterative+iterations=3", (0, 1, 5))
    assert own.rounds == (0, 1)
    for word in (*MODES, *PRESETS):
        assert read_methods(word)[0].name == word


def test_without_initialization_round_zero_is_given_and_costs_nothing(
    model: StoryModel, story: Story, tmp_path: Path
) -> None:
    """The ablation of Story-Adapter: rounds are those asked for without round 0, and begin from noise or from a picture."""
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    named = ("iterative+initial_pictures=noise", f"iterative+initial-pictures={tmp_path / 'red.png'}")
    methods = read_methods(",".join((*named, "reference+initial_pictures=noise")), (0, 1))
    assert [method.rounds for method in methods] == [(1,), (1,), ()]
    with Comparison(model, [story], methods, FEW, tmp_path / "dir") as comparison:
        list(comparison.draw())
        rows = list(comparison.measure([]))
    calls = [row.value for row in rows if (row.kind, row.metric) == ("mean", "unet_calls")]
    assert calls == [2.0, 2.0, 2.0]
    given = [open_picture(cell.drawn(0).pictures[1]) for cell in comparison.cells[:2]]
    assert np.asarray(given[0]).std() > 20 and np.asarray(given[1]).std((0, 1)).max() == 0
    drawn = [cell.drawn(1).pictures[0].read_bytes() for cell in comparison.cells[:2]]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("iterative,watercolour", "got 'watercolour'"),
        ("", "got none"),
        ("causal,causal", "named twice"),
        ("causal+iterations=3", "iterations is no setting of causal mode"),
        ("iterative+steps", "wanted SETTING=VALUE"),
        ("iterative+steps=0", "wanted 1 to 1000"),
        ("iterative+mode=causal", "no setting"),
        ("causal+initial_pictures=noise", "no setting of causal mode"),
        ("iterative+initial_pictures=nothing.png", "got no such file"),
    ],
)
def test_methods_that_cannot_be_are_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        read_methods(text)


def test_rounds_that_cannot_be_are_refused() -> None:
    assert parse_rounds("10,0,1,1") == (0, 1, 10) and parse_rounds(None) == ()
    for text in ("a", "", "-1", "1,,2", "2000"):
        with pytest.raises(InputError, match="--rounds"):
            parse_rounds(text)


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text("\n".join(CAPTIONS))
    Path("own").mkdir()
    Path("own/table.json").write_text("mine")
    for arguments, said in (
        (["story.txt", "--methods", "causal", "-o", "own"], "is no folder of comparisons"),
        (["story.txt", "story.txt", "--methods", "causal", "-o", "new"], "given twice"),
        (["story.txt", "--methods", "dance", "-o", "new"], "got 'dance'"),
        (["story.txt", "--methods", "causal", "--metrics", "beauty", "-o", "new"], "--metrics: wanted"),
        (["nothing.txt", "--methods", "causal", "-o", "new"], "but there is none"),
        (["story.txt", "--methods", "causal", "--encoder", "no/such/thing", "-o", "new"], "no/such/thing"),
    ):
        done = CliRunner().invoke(app, ["compare", *arguments, "--device", "cpu"])
        assert done.exit_code == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["own", "story.txt", "table.json"]
    assert Path("own/table.json").read_text() == "mine"


def test_captions_of_the_drawn_world_are_read_as_they_were_written() -> None:
    for held_out in held_out_stories(40, seed=77, said=0.5):
        tale = read_tale(held_out.captions)
        for read, wanted in zip(tale.scenes, held_out.tale.scenes, strict=True):
            assert read.place == wanted.place
            assert [(tale.cast[r.member].species, r.action) for r in read.roles] == [
                (held_out.tale.cast[r.member].species, r.action) for r in wanted.roles
            ]
    for caption in ("a fox is sleeping", "a dog in the snow", "a fox, a cat and a bear in the snow"):
        with pytest.raises(UnreadableCaption):
            read_tale([caption])


def test_stories_in_bulk_are_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_text('{"frames": ["a"]}\n\n{"title": "two", "frames": ["b", "c"]}\n')
    (tmp_path / "z.txt").write_text("d")
    (tmp_path / "picture.png").write_bytes(b"")
    found = read_stories(tmp_path)
    assert [(s.title, len(s.frames)) for s in found] == [("many-1", 1), ("two", 2), ("z", 1)]
    write_: Callable[[str], object] = (tmp_path / "many.jsonl").write_text
    for text, said in (
        ('{"frames": ["a"]}\n{"frames": ["b"], "colour": 1}', "many.jsonl:2"),
        ('{"frames": ["a"]}\n{"frames": []}', "many.jsonl:2"),
        ("{", "many.jsonl:1"),
        ("\n", "got an empty file"),
    ):
        write_(text)
        with pytest.raises(InputError, match=re.escape(said)):
            read_stories(tmp_path / "many.jsonl")


def test_every_row_has_its_place_in_tables(compared: tuple[Comparison, list[Measured]]) -> None:
    assert {r.metric for r in compared[1]} <= set(METRICS)


def test_events_pass_unchanged(
    compared: tuple[Comparison, list[Measured]], tmp_path: Path, model: StoryModel
) -> None:
    events: list[Event] = [StepDone(0, (0, 1), 1, 1, 0.1)]
    assert list(Cost(tmp_path / "c").counted(iter(events), model.placement.device)) == events


def finished_but_for_time(folder: Path) -> dict[str, str]:
    """What a comparison wrote, without seconds and memory: pictures, calls, figures, and the page's pictures."""
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("frame-*.png")
    }
    timed = ("seconds", "peak_memory")
    rows = json.loads((folder / "table.json").read_text())["rows"]
    found["rows"] = json.dumps([row for row in rows if row["metric"] not in timed]).replace(str(folder), "")
    for path in (folder / "costs").rglob("*.json"):
        found[path.name] = json.dumps(json.loads(path.read_text())["calls"])
    found["names"] = str(sorted(path.name for path in folder.iterdir()))
    return found


@pytest.mark.slow
def test_a_comparison_that_is_killed_anywhere_goes_on(
    model: StoryModel, story: Story, tmp_path: Path
) -> None:
    method = Method("iterative", "iterative", None, {"iterations": 1}, (0, 1))

    def command(folder: Path) -> None:
        with Comparison(model, [story], [method], FEW, folder / "dir") as comparison:
            list(comparison.draw(batch_size=1))
            write(comparison, list(comparison.measure([ClipMeasure(open_encoder(BUILTIN)), JudgeMeasure()])))

    def look(folder: Path) -> dict[str, str]:
        return finished_but_for_time(folder / "dir")

    operations = check_every_operation(tmp_path, lambda folder: None, command, most=20, look=look)
    assert {"append to", "replace"} <= {what for what, _ in operations}


def test_a_frame_that_stays_as_it_is_costs_no_call(model: StoryModel, story: Story, tmp_path: Path) -> None:
    """With --until converged and any tolerance the last round draws nothing."""
    method = read_methods("iterative+until=converged+tolerance=2.0", (0, 3))
    with Comparison(model, [story], method, FEW, tmp_path / "dir") as comparison:
        list(comparison.draw())
        rows = list(comparison.measure([]))
    calls = [mean_of(rows, "unet_calls", method[0].name, k).value for k in (0, 3)]
    assert calls[0] == 2.0 and calls[1] is not None and calls[1] < 8.0
