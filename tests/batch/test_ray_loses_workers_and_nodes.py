"""A worker and a whole machine are killed while a Ray cluster draws: every story is finished, with the bytes of one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
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


def drawn_alone(folder: Path, stories: list[Path]) -> dict[str, dict[str, str]]:
    """Every story drawn by `fastory generate`."""
    (ended,) = run_ranks(1, ["generate", *stories, "-o", folder / "alone", *FEW], folder)
    assert ended.status == 0, ended.err
    return {path.name: files_of(path) for path in sorted((folder / "alone").iterdir())}


def kill_an_actor(node: Node) -> None:
    until = time.monotonic() + 60
    while not (actors := node.actors()):
        assert time.monotonic() < until, "no actor on this node"
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
    kill_an_actor(first)
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
