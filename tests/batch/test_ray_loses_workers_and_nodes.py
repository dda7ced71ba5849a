"""A worker and a whole machine are killed while a Ray cluster draws: every story is finished, with the bytes of one process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from batches import FEW, events_of, files_of, runs_of, start, states, wait_for, write_batch
from ranks import run_ranks

pytest.importorskip("ray", reason="the cluster is Ray's: pip install 'fastory[ray]'")
from ray_nodes import Node, two_nodes

Cluster = tuple[str, Node, Node]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with two_nodes() as nodes:
        yield nodes


def drawn_alone(folder: Path, stories: list[Path], options: Sequence[str] = FEW) -> dict[str, dict[str, str]]:
    """Every story drawn by `fastory generate`."""
    runs = {}
    for story in stories:
        (ended,) = run_ranks(1, ["generate", story, "-o", folder / "alone" / story.stem, *options], folder)
        assert ended.status == 0, ended.err
        runs[story.stem] = files_of(folder / "alone" / story.stem)
    return runs


def kill_an_actor(title: str, *nodes: Node) -> None:
    until = time.monotonic() + 60
    while not (actors := [actor for node in nodes for actor in node.actors(title)]):
        assert time.monotonic() < until, f"no {title} on these nodes"
        time.sleep(0.05)
    actors[0].kill()


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_worker_and_a_node_are_killed(count: int, cluster: Cluster, tmp_path: Path) -> None:
    address, first, second = cluster
    out, err = start("doctor", "--json", RAY_ADDRESS=address).communicate(timeout=120)
    assert [event["actors"] for event in events_of(out, "RayNode")] == [1, 1], err
    stories = write_batch(tmp_path / "stories", count, frames=3)
    command = ["batch", tmp_path / "stories", "-o", tmp_path / "out", "--ray", address, *FEW, "--json"]
    process = start(*command)
    seen = [wait_for(process, "BatchProgress") for _ in range(3)]
    kill_an_actor("Drawer", first)
    seen.append(wait_for(process, "WorkerLost"))
    seen.append(wait_for(process, "StoryDone"))
    second.kill()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, (events_of(out, "StoryFailed", "WorkerLost"), err)
    lost = [*(event for event in seen if event["event"] == "WorkerLost"), *events_of(out, "WorkerLost")]
    assert len({event["worker"] for event in lost}) == 2
    assert runs_of(tmp_path / "out") == drawn_alone(tmp_path, stories)
    assert states(tmp_path / "out") == ["done"] * count
    assert nothing_finished_was_drawn_again([*seen, *events_of(out, "BatchProgress", "StoryDone")])


@pytest.mark.slow
def test_an_actor_that_draws_frames_for_another_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    address, *nodes = cluster
    stories = write_batch(tmp_path / "stories", 1, frames=8)
    longer = [*FEW, "--steps=8", "--iterations=4"]
    command = ["batch", *stories, "-o", tmp_path / "out", "--ray", address, "--actors-per-story=2", *longer]
    process = start(*command, "--json")
    seen = [wait_for(process, "BatchProgress")]
    kill_an_actor("Frames.draw", *nodes)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "which another draws again" in events_of(out, "BatchNotice")[0]["message"]
    assert not events_of(out, "WorkerLost")
    assert runs_of(tmp_path / "out") == drawn_alone(tmp_path, stories, longer)
    (run,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert json.loads((run / "manifest.json").read_text())["processes"] == [2]
    assert nothing_finished_was_drawn_again([*seen, *events_of(out, "BatchProgress", "StoryDone")])


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """Its actors end with it; what had arrived is not drawn again."""
    address, *nodes = cluster
    stories = write_batch(tmp_path / "stories", 6, frames=3)
    command = ["batch", tmp_path / "stories", "-o", tmp_path / "out", "--ray", address, *FEW, "--json"]
    process = start(*command)
    done = wait_for(process, "StoryDone")["story"]
    progress = wait_for(process, "BatchProgress")
    process.kill()
    process.communicate()
    until = time.monotonic() + 60
    while any(node.actors() for node in nodes):
        assert time.monotonic() < until, "actors go on without the command"
        time.sleep(0.1)
    process = start(*command)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    again = events_of(out, "BatchProgress")
    assert done not in {event["story"] for event in again}
    assert nothing_finished_was_drawn_again([progress, *again])
    assert runs_of(tmp_path / "out") == drawn_alone(tmp_path, stories)
    assert states(tmp_path / "out") == ["done"] * 6


def nothing_finished_was_drawn_again(events: list[dict[str, Any]]) -> bool:
    """Pictures of a story that were finished stay so, whoever goes on with it; a finished story is not begun again."""
    finished: dict[str, int] = {}
    for event in events:
        if event["event"] == "BatchProgress":
            if event["finished"] < finished.get(event["story"], 0):
                return False
            finished[event["story"]] = event["finished"]
        elif event["event"] == "StoryDone":
            finished[event["story"]] = 10**6
    return True
