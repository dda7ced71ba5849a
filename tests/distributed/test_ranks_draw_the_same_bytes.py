"""A story drawn by several processes is that of one process, byte for byte, whatever number of them, killed or resumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killed import contents
from ranks import FEW, run_ranks

from fastory.distributed import share
from fastory.distributed.channel import Channel
from fastory.distributed.messages import Drawn

CAPTIONS = [
    "a cat is sleeping in the snow",
    "a cat is jumping",
    "a cat and a fox are standing",
    "a fox is reading a book",
    "a bear",
    "a rabbit in the forest",
    "a fox on the beach",
    "a cat is reading a book",
]


def story(folder: Path, frames: int, name: str = "story") -> Path:
    path = folder / f"{name}.txt"
    path.write_text("\n".join(CAPTIONS[:frames]) + "\n", encoding="utf-8")
    return path


def pictures(run: Path) -> dict[str, str]:
    """Every file of a run but its manifest, which holds seconds."""
    found = contents(run)
    assert found.pop("manifest.json")
    return found


def processes(run: Path) -> Any:
    return json.loads((run / "manifest.json").read_text(encoding="utf-8")).get("processes")


def drawn(out: str) -> list[tuple[int, int]]:
    events = [json.loads(line) for line in out.splitlines()]
    return [(e["round"], e["frame"]) for e in events if e["event"] == "FrameDrawn"]


def kill_at(rank: int, picture: int) -> Any:
    """Process `rank` is killed when it has drawn its picture of this number, from 1, and has not sent it."""

    def prepare(own: int) -> None:
        send, sent = Channel.send, [0]

        def counted(channel: Channel, message: object) -> None:
            sent[0] += isinstance(message, Drawn)
            if sent[0] == picture:
                os.kill(os.getpid(), signal.SIGKILL)
            send(channel, message)

        if own == rank:
            Channel.send = counted  # type: ignore[method-assign]

    return prepare


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of one process, by the number of frames."""
    kept: dict[int, dict[str, str]] = {}

    def of(frames: int) -> dict[str, str]:
        if frames not in kept:
            folder = tmp_path_factory.mktemp("alone")
            (ended,) = run_ranks(1, ["generate", story(folder, frames), "-o", folder / "run", *FEW], folder)
            assert ended.status == 0, ended.err
            assert processes(folder / "run") is None
            kept[frames] = pictures(folder / "run")
        return kept[frames]

    return of


CASES = [(3, 5), (2, 1)]
MORE = [(size, frames) for size in (2, 3) for frames in (1, 5, 8) if (size, frames) not in CASES]


@pytest.mark.parametrize(
    ("size", "frames"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_frames_of_a_round_are_dealt_over_ranks(size: int, frames: int, alone: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = run_ranks(size, ["generate", story(tmp_path, frames), "-o", run, *FEW], tmp_path)
    assert [e.status for e in ended] == [0] * size, ended
    assert pictures(run) == alone(frames)
    assert processes(run) == [size]
    assert sorted(drawn(ended[0].out)) == [(k, i) for k in (0, 1) for i in range(frames)]  # none twice
    assert [e.out + e.err for e in ended[1:]] == [""] * (size - 1)  # progress stands in one place


def test_later_frames_are_dealt_with_the_bank_of_their_references(tmp_path: Path) -> None:
    few = ["--mode=reference", "--bank=2", "--steps=2", "--batch-size=1", "--noise=per-frame", "--json"]
    for size in (1, 2):
        command = ["generate", story(tmp_path, 4), "-o", tmp_path / f"by-{size}", *few]
        ended = run_ranks(size, command, tmp_path)
        assert [e.status for e in ended] == [0] * size, ended
    assert pictures(tmp_path / "by-2") == pictures(tmp_path / "by-1")
    assert processes(tmp_path / "by-2") == [2]


def killed_then_resumed(size: int, rank: int, picture: int, then: int, tmp_path: Path) -> dict[str, str]:
    run = tmp_path / "run"
    command = ["generate", story(tmp_path, 5), "-o", run, *FEW]
    ended = run_ranks(size, command, tmp_path, kill_at(rank, picture))
    assert ended[rank].status == -signal.SIGKILL
    assert ended[0].status == 1
    assert f"rank {rank}" in ended[0].err and "the same command goes on" in ended[0].err
    assert len(ended[0].err.splitlines()) == 1 and "Traceback" not in ended[0].err
    assert not any(e.err for e in ended[1:])  # one message in all
    kept = {(int(k), int(i)) for k, frames in recorded(run).items() for i in frames}
    (*_, first) = resumed = run_ranks(then, command, tmp_path)[::-1]
    assert [e.status for e in resumed] == [0] * then
    assert not kept & set(drawn(first.out))  # nothing finished is drawn again
    assert processes(run) == [size, then][0 if kept else 1 :]  # only those of whom there is a picture
    return pictures(run)


def recorded(run: Path) -> dict[str, dict[str, Any]]:
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return manifest["pictures"]  # type: ignore[no-any-return]


def test_a_killed_rank_and_a_resume_with_another_number(alone: Any, tmp_path: Path) -> None:
    assert killed_then_resumed(3, 1, 3, 1, tmp_path) == alone(5)


@pytest.mark.slow
@pytest.mark.parametrize("picture", [1, 2, 3, 4])
@pytest.mark.parametrize(("size", "rank", "then"), [(2, 1, 3), (3, 1, 2), (3, 2, 1)])
def test_any_rank_killed_at_any_picture(
    size: int, rank: int, then: int, picture: int, alone: Any, tmp_path: Path
) -> None:
    if rank == 2 and picture > 2:
        pytest.skip("rank 2 of 3 draws one micro-batch of this story in all")
    assert killed_then_resumed(size, rank, picture, then, tmp_path) == alone(5)


@pytest.mark.slow
def test_rank_0_killed_ends_the_others_with_one_message(alone: Any, tmp_path: Path) -> None:
    from fastory import files

    def prepare(rank: int) -> None:
        counted = [0]

        def before(operation: str, path: Path) -> None:
            counted[0] += 1
            if counted[0] == 60:
                os.kill(os.getpid(), signal.SIGKILL)

        if rank == 0:
            files.before_operation = before

    run = tmp_path / "run"
    command = ["generate", story(tmp_path, 5), "-o", run, *FEW]
    ended = run_ranks(3, command, tmp_path, prepare)
    assert [e.status for e in ended] == [-signal.SIGKILL, 1, 1]
    assert "rank 0 ended" in ended[1].err and not ended[2].err
    assert [e.status for e in run_ranks(2, command, tmp_path)] == [0, 0]
    assert pictures(run) == alone(5)


def test_memory_that_runs_out_on_one_rank_halves_them_all(tmp_path: Path) -> None:
    draw_batches = share.draw_batches

    def too_much(run: Any, round: Any, batches: Any) -> Iterator[Any]:
        if round.size > 1:
            raise MemoryError("12 MiB")
        yield from draw_batches(run, round, batches)

    def prepare(rank: int) -> None:
        if rank == 1:
            share.draw_batches = too_much

    runs = {name: ["generate", story(tmp_path, 5), "-o", tmp_path / name, *FEW] for name in ("two", "single")}
    ended = run_ranks(2, runs["two"], tmp_path, prepare)
    assert [e.status for e in ended] == [0, 0]
    assert [
        e["size"] for line in ended[0].out.splitlines() if (e := json.loads(line))["event"] == "BatchHalved"
    ] == [1]
    assert run_ranks(1, [*runs["single"], "--batch-size=1"], tmp_path)[0].status == 0
    assert pictures(tmp_path / "two") == pictures(tmp_path / "single")


def test_stories_of_causal_mode_are_dealt_over_ranks(causal_builtin_folder: Path, tmp_path: Path) -> None:
    stories = [story(tmp_path, frames, f"story-{frames}") for frames in (2, 3, 4)]
    causal = [
        "--mode=causal",
        f"--model={causal_builtin_folder}",
        "--steps=2",
        "--batch-size=1",
        "--json",
        "--window=2",
    ]
    for size in (1, 2):
        ended = run_ranks(size, ["generate", *stories, "-o", tmp_path / f"of-{size}", *causal], tmp_path)
        assert [e.status for e in ended] == [0] * size, ended
    names = [path.name for path in (tmp_path / "of-1").iterdir()]
    assert len(names) == 3
    for name in names:
        assert pictures(tmp_path / "of-2" / name) == pictures(tmp_path / "of-1" / name)


def test_what_cannot_be_drawn_is_said_once_and_writes_nothing(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text("\n", encoding="utf-8")
    ended = run_ranks(3, ["generate", bad, "-o", tmp_path / "run"], tmp_path)
    assert [e.status for e in ended] == [2, 0, 0]
    assert len(ended[0].err.splitlines()) == 1 and not any(e.err for e in ended[1:])
    assert not (tmp_path / "run").exists()


def test_a_rank_with_other_weights_is_refused_by_name(
    sd15_folder: Path, builtin_folder: Path, tmp_path: Path
) -> None:
    """As where one host has another file under the same name."""
    import shutil

    copy = shutil.copytree(builtin_folder, tmp_path / "model")

    def prepare(rank: int) -> None:
        if rank == 1:
            (tmp_path / "moved").symlink_to(sd15_folder)
            os.chdir(tmp_path)
            from fastory.cli import generate

            opened = generate.opened
            generate.opened = lambda requested: opened({**requested, "model": str(sd15_folder)})

    command = ["generate", story(tmp_path, 2), "-o", tmp_path / "run", f"--model={copy}", *FEW]
    ended = run_ranks(2, command, tmp_path, prepare)
    assert ended[0].status == 2 and "rank 1" in ended[0].err and "weights" in ended[0].err
    assert not (tmp_path / "run").exists()
