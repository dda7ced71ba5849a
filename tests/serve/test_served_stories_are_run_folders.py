"""Risk: what the page draws is not what the command line draws, or a redraw, a pause or a kill changes other pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from run_folders import contents
from served import SETTINGS, STORY, Server

from fastory import Character, Story, StoryModel, generate
from fastory.serve.shelf import Shelf
from fastory.serve.worker import generate_arguments

pytest.importorskip("fastapi", reason="the server's extra: pip install .[serve]")

CAST = ["Mia is sleeping in the snow", "a fox is jumping in the forest", "Mia is standing on the beach"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("served"))
    yield server
    said = server.close()
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def drawn(server: Server) -> str:
    story = server.create()
    server.until(story, "finished")
    return story


def pictures(folder: Path) -> dict[str, str]:
    found = contents(folder).items()
    return {
        name: digest for name, digest in found if name.endswith(".png") and not name.startswith("history/")
    }


def test_a_served_story_is_the_command_lines_run(server: Server, drawn: str, tmp_path: Path) -> None:
    file = server.folder / drawn / "story.yaml"
    story = Story.read(file)
    list(generate(story, model=StoryModel.open("builtin"), output=tmp_path / "run"))
    assert pictures(server.folder / drawn) == pictures(tmp_path / "run")
    assert story.settings == SETTINGS
    again = list(generate(story, model=StoryModel.open("builtin"), output=server.folder / drawn))
    assert not [event for event in again if type(event).__name__ == "FrameDrawn"]


def test_a_redraw_keeps_locked_frames(server: Server, drawn: str) -> None:
    before = pictures(server.folder / drawn)
    assert server.ask("PATCH", f"/stories/{drawn}", {"locked": [0]}).status == 200
    change = {"frames": [{"frame": 0, "caption": "a cat is sleeping in the house"}]}
    refused = server.ask("POST", f"/stories/{drawn}/redraw", change)
    assert (refused.status, "locked" in refused.json["error"]) == (409, True)
    change["frames"][0]["frame"] = 1
    assert server.ask("POST", f"/stories/{drawn}/redraw", {**change, "seed": 5}).status == 202
    shown = server.until(drawn, "finished")
    after = pictures(server.folder / drawn)
    other = {name for name in before if before[name] != after[name]}
    assert other == {
        "frames/frame-001.png",
        "iteration-00/frame-001.png",
        "iteration-01/frame-001.png",
        "sheet.png",
    }
    assert shown["story"]["frames"][1] == "a cat is sleeping in the house"
    assert shown["locked"] == [0] and shown["history"] == {"001": ["1"]}
    old = server.ask("GET", f"/stories/{drawn}/frames/1?round=1&take=001")
    assert old.status == 200 and old.body != server.ask("GET", f"/stories/{drawn}/frames/1").body
    assert server.ask("POST", f"/stories/{drawn}/take-back", {"number": "002"}).status == 422
    assert server.ask("POST", f"/stories/{drawn}/take-back", {"number": "001"}).status == 202
    shown = server.until(drawn, "finished")
    assert pictures(server.folder / drawn) == before
    assert shown["story"]["frames"] == STORY["frames"] and shown["undoable"] == ["001", "002"]


def test_a_run_of_the_command_line_is_redrawn_with_its_settings(server: Server) -> None:
    """They stand in its manifest alone: its story file says nothing of them."""
    folder = server.folder / "by-hand"
    story = Story.from_captions(STORY["frames"][:2], title="By hand")
    list(generate(story, model=StoryModel.open("builtin"), output=folder, steps=3, iterations=0, seed=4))
    before = pictures(folder)
    assert server.ask("POST", "/stories/by-hand/redraw", {"frames": [{"frame": 1}], "seed": 9}).status == 202
    assert server.until("by-hand", "finished")["settings"]["steps"] == 3
    after = pictures(folder)
    assert {name for name in before if before[name] != after[name] and "frame" in name} == {
        "frames/frame-001.png",
        "iteration-00/frame-001.png",
    }


def test_a_story_goes_on_and_the_command_line_sees_the_same(server: Server, tmp_path: Path) -> None:
    story = server.create({**STORY, "frames": STORY["frames"][:2]})
    server.until(story, "finished")
    before = pictures(server.folder / story)
    for captions in ([], [""], ["x"] * 10_001):
        assert server.ask("POST", f"/stories/{story}/append", {"captions": captions}).status == 422
    assert server.ask("POST", f"/stories/{story}/append", {"captions": STORY["frames"][2:]}).status == 202
    shown = server.until(story, "finished")
    assert shown["story"]["frames"] == STORY["frames"] and shown["appended"] == []
    assert shown["undoable"] == ["001"] and shown["appended_by"] == {"001": [2]}
    after = pictures(server.folder / story)
    assert {name for name in before if before[name] != after[name]} == {"sheet.png"}
    short = Story.read(server.folder / story / "story.yaml")
    short = replace(short, frames=short.frames[:2])
    long = Story.read(server.folder / story / "story.yaml")
    appended = {"after": 2, "captions": STORY["frames"][2:]}
    again = {"story": story, "kind": "redraw", "frames": {}, "appended": appended}
    # A kill after the new story.yaml was written and before the request was forgotten: nothing is appended twice.
    assert generate_arguments(Shelf(server.folder), again)["stories"].frames == long.frames
    for said, more in ((short, {}), (long, {"frames": [2]})):
        list(generate(said, model=StoryModel.open("builtin"), output=tmp_path / "run", **more))
    assert pictures(tmp_path / "run") == after
    locked = server.ask("PATCH", f"/stories/{story}", {"locked": [2]}).status
    assert (locked, server.ask("POST", f"/stories/{story}/take-back", {"number": "001"}).status) == (200, 409)
    server.ask("PATCH", f"/stories/{story}", {"locked": [0]})
    for number, frames, there in (("001", 2, before), ("002", 3, after)):  # taken back, and had again
        assert server.ask("POST", f"/stories/{story}/take-back", {"number": number}).status == 202
        shown = server.until(story, "finished")
        assert shown["story"]["frames"] == STORY["frames"][:frames]
        assert pictures(server.folder / story) == there


def test_a_drawn_story_is_given_pictures_and_the_command_line_sees_the_same(
    server: Server, tmp_path: Path
) -> None:
    said = {**STORY, "frames": CAST, "characters": {"Mia": {"prompt": "a cat"}}}
    story = server.create(said)
    path = f"/stories/{story}"
    server.until(story, "finished")
    before = pictures(server.folder / story)
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), "blue").save(buffer, "PNG")
    name = server.ask("POST", f"{path}/pictures", buffer.getvalue()).json["name"]

    def give(**given: Any) -> Any:
        return server.ask("PATCH", path, {"pictures": given})

    for wrong, status in (
        ({"references": {"Bo": [name]}}, 422),
        ({"references": {"Mia": ["inputs/none.bmp"]}}, 422),
        ({"references": {"Mia": ["../../story.yaml"]}}, 422),
        ({"first_frame": name}, 422),
    ):
        assert give(**wrong).status == status, wrong
    assert "read by causal mode alone" in give(first_frame=name).json["error"]
    boxed = {"frames": [{"frame": 0, "boxes": {"Mia": [0.1, 0.1, 0.5, 0.9]}}]}
    refused = server.ask("POST", f"{path}/redraw", boxed)
    assert (refused.status, "they want two named characters" in refused.json["error"]) == (422, True)
    assert give(references={"Mia": [name]}).status == 200
    shown = server.ask("GET", path).json
    assert shown["next_pictures"]["frames"] == [0, 2] and shown["recast"] == []
    assert server.ask("POST", f"{path}/redraw", {"frames": [{"frame": 0}]}).status == 202
    shown = server.until(story, "finished")
    after = pictures(server.folder / story)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"frames/frame-000.png", "iteration-01/frame-000.png", "sheet.png"}
    assert shown["next_pictures"] is None and shown["recast"] == [2]
    (kept,) = shown["story"]["characters"]["Mia"]["references"]
    assert server.ask("GET", f"{path}/{kept}").body == (server.folder / story / kept).read_bytes()
    mia = Character("Mia", "a cat", (Image.open(buffer),))
    plain = Story.from_captions(CAST, title=STORY["title"], characters=[Character("Mia", "a cat")])
    for told, more in ((plain, {}), (plain.with_characters([mia]), {"frames": [0]})):
        list(generate(told, model=StoryModel.open("builtin"), output=tmp_path / "run", **SETTINGS, **more))
    assert pictures(tmp_path / "run") == after
    assert server.ask("POST", f"{path}/take-back", {"number": "001"}).status == 202
    shown = server.until(story, "finished")
    assert pictures(server.folder / story) == before and shown["recast"] == []
    assert shown["story"]["characters"] == said["characters"]


def test_what_is_stopped_is_as_before(server: Server) -> None:
    """A story that was never finished is a draft again, a redraw is forgotten; what was drawn is in the trash."""
    slow = {**STORY, "title": "Stop", "settings": {"steps": 12, "iterations": 3}}
    story = server.create(slow)
    while not any(server.ask("GET", f"/stories/{story}").json["pictures"]):
        assert server.process.poll() is None
    assert server.ask("POST", f"/stories/{story}/stop").status == 202
    shown = server.until(story, "draft")
    assert shown["story"] == slow
    trash = server.folder / ".fastory" / "trash" / f"{story}-1" / "run"
    assert (trash / "iteration-00" / "frame-000.png").exists() and not (server.folder / story).exists()
    assert server.ask("POST", f"/stories/{story}/stop").status == 409
    assert server.ask("PUT", f"/stories/{story}", {"story": STORY}).status == 200
    assert server.ask("POST", f"/stories/{story}/draw", {}).status == 202
    server.until(story, "finished")
    before = pictures(server.folder / story)
    assert (
        server.ask("POST", f"/stories/{story}/append", {"captions": ["a fox in the city"] * 3}).status == 202
    )
    assert server.ask("POST", f"/stories/{story}/stop").status == 202
    shown = server.until(story, "finished")
    assert shown["story"]["frames"] == STORY["frames"] and pictures(server.folder / story) == before


def test_a_picture_says_what_it_was_drawn_from(server: Server, drawn: str) -> None:
    said = server.ask("GET", f"/stories/{drawn}/frames/1/drawn-from?round=1").json
    assert said["values"]["prompt"] == server.ask("GET", f"/stories/{drawn}").json["story"]["frames"][1]
    assert said["values"]["round"] == 1 and f"Seed: {said['values']['seed']}," in said["parameters"]
    assert server.ask("GET", f"/stories/{drawn}/frames/1/drawn-from?round=7").status == 404


@pytest.mark.slow
def test_paused_goes_on_to_the_same_bytes(server: Server, tmp_path: Path) -> None:
    story = {**STORY, "title": "Pause", "settings": {"steps": 12, "iterations": 3}}
    name = server.create(story)
    while not (server.folder / name / "iteration-01").exists():
        assert server.process.poll() is None
    assert server.ask("POST", f"/stories/{name}/cancel").status == 202
    shown = server.until(name, "paused")
    assert 0 < sum(map(len, shown["pictures"])) < 12
    assert server.ask("POST", f"/stories/{name}/cancel").status == 409
    assert server.ask("POST", f"/stories/{name}/draw", {}).status == 202
    server.until(name, "finished")
    list(
        generate(
            Story.read(server.folder / name / "story.yaml"),
            model=StoryModel.open("builtin"),
            output=tmp_path / "run",
        )
    )
    assert pictures(server.folder / name) == pictures(tmp_path / "run")


def test_a_killed_server_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    """Both the story that is being drawn and the one that waits."""
    server = Server(tmp_path / "served")
    slow = {**STORY, "settings": {"steps": 12, "iterations": 3}}
    names = [server.create(slow), server.create()]
    while not (server.folder / names[0] / "iteration-01").exists():
        assert server.process.poll() is None
    server.kill()
    assert not (server.folder / names[0] / "sheet.png").exists()
    again = Server(tmp_path / "served")
    for name in names:
        again.until(name, "finished")
    assert "Traceback" not in again.close()
    model = StoryModel.open("builtin")
    for name in names:
        list(generate(Story.read(server.folder / name / "story.yaml"), model=model, output=tmp_path / name))
        assert pictures(server.folder / name) == pictures(tmp_path / name)


def test_a_duplicate_says_the_same_and_trash_keeps_all(server: Server, drawn: str) -> None:
    copy = server.ask("POST", f"/stories/{drawn}/duplicate").json["id"]
    shown = server.ask("GET", f"/stories/{copy}").json
    assert (shown["state"], shown["story"]["settings"]) == ("draft", SETTINGS)
    assert server.ask("DELETE", f"/stories/{copy}").status == 200
    assert server.ask("GET", f"/stories/{copy}").status == 404
    assert (server.folder / ".fastory" / "trash" / f"{copy}-1" / "draft" / "story.json").exists()
    assert copy not in [row["id"] for row in server.ask("GET", "/stories").json]
