"""Risk: what the page draws is not what the command line draws, or a redraw, a pause or a kill changes other pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import contents
from served import SETTINGS, STORY, Server

from fastory import Story, StoryModel, generate

pytest.importorskip("fastapi", reason="the server's extra: pip install .[serve]")


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
