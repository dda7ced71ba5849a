"""Risk: a batch of hundreds of stories ends in the middle of the night for what could have been told before it began."""

from __future__ import annotations

from pathlib import Path

import pytest
from batches import FEW, runs_of, write_batch
from ranks import Ended, run_ranks
from typer.testing import CliRunner

from fastory.cli import app


def refused(*arguments: object) -> str:
    """What the command says; it writes nothing to stdout, and ends with exit code 2."""
    result = CliRunner().invoke(app, ["batch", *map(str, arguments)])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert "Traceback" not in result.stderr
    return result.stderr


def test_every_bad_story_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    stories = tmp_path / "stories"
    write_batch(stories, 3)
    (stories / "story-1.txt").write_text("\n")
    (stories / "twice.txt").write_text("title-less\n")
    (stories / "bad.yaml").write_text("frames: [a cat]\nsettings: {steps: none}\n")
    (stories / "many.jsonl").write_text(
        '{"frames": ["a cat"]}\n\n{"frames": []}\n{"frames": ["a"], "frames": ["b"]}\n[1'
    )
    said = refused(stories, "-o", tmp_path / "out").splitlines()
    assert said[0].startswith("error: 5 of 9 stories cannot be drawn")
    named = ["bad.yaml:2", "many.jsonl:3", "many.jsonl:4", "many.jsonl:5", "story-1.txt:1"]
    assert [name for name in named if not any(name in line for line in said[1:])] == []
    assert len(said) == 6
    assert not (tmp_path / "out").exists()


def test_what_the_model_says_is_known_before_anything_is_drawn(tmp_path: Path) -> None:
    good, bad = write_batch(tmp_path / "stories", 2)
    bad.rename(bad.with_suffix(".yaml")).write_text("frames: [a cat]\nsettings: {mode: causal, width: 72}\n")
    ended = run_one(tmp_path, good, bad.with_suffix(".yaml"))
    assert ended.status == 2 and "story-1.yaml" in ended.err
    assert runs_of(tmp_path / "out") == {}


def run_one(folder: Path, *stories: Path) -> Ended:
    def forks(rank: int) -> None:
        from fastory.batch import local

        local.START = "fork"

    (ended,) = run_ranks(1, ["batch", *stories, "-o", folder / "out", *FEW], folder, forks)
    return ended


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["-o", "/proc/batch"], "/proc/batch"),
        (["-o", "taken"], "holds 'mine.txt'"),
        (["-o", "out", "--workers", "0"], "--workers: wanted 1"),
        (["-o", "out", "--steps", "0"], "--steps"),
        (["-o", "out", "--model", "nowhere"], "nowhere"),
        (["-o", "out", "story-0.txt"], "give it once"),
        (["-o", "out", "--gpus-per-worker", "0.5"], "--gpus-per-worker is for --ray"),
        (["-o", "out", "--ray", "--gpus-per-worker", "1.5"], "--gpus-per-worker: wanted"),
        (["-o", "out", "empty"], "wanted a folder with story files"),
        (["-o", "out", "--actors-per-story", "2"], "--actors-per-story is for --ray"),
        (["-o", "out", "--ray", "--workers", "2", "--actors-per-story", "3"], "--workers 2 are fewer"),
        (["-o", "nowhere://bucket/batch"], "wanted a folder, or a URL"),
        (["-o", "memory://"], "wanted a folder behind memory://"),
        (["-o", "file://taken"], "wanted file:///"),
    ],
    ids=[
        "read-only",
        "a user's folder",
        "workers",
        "setting",
        "model",
        "twice",
        "no ray",
        "gpus",
        "empty folder",
        "together",
        "too few together",
        "no store",
        "no folder of a store",
        "half a path",
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    arguments: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_batch(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    for name in ("taken", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine\n")
    before = sorted(tmp_path.rglob("*"))
    said = refused("story-0.txt", *arguments)
    assert wanted in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        (["--ray", "127.0.0.1:9"], "--ray 127.0.0.1:9: no cluster answers there"),
        (["--ray", "ray://127.0.0.1:9"], "run this on a machine of the cluster"),
        (["--ray"], "no cluster can be joined here"),
    ],
    ids=["closed port", "client", "none"],
)
def test_a_cluster_that_is_not_there_is_one_line(
    address: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the cluster is Ray's: pip install 'fastory[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where Ray looks for the cluster of this machine
    said = refused(*write_batch(tmp_path / "stories", 1), "-o", tmp_path / "out", *address)
    assert wanted in said and len(said.splitlines()) == 1


def test_ray_takes_an_address_and_no_story() -> None:
    from fastory.cli.commands import with_ray_address

    cases = {
        "--ray a.yaml": "--ray=auto a.yaml",
        "a.yaml --ray": "a.yaml --ray=auto",
        "--ray 10.0.0.1:6379 a.yaml": "--ray 10.0.0.1:6379 a.yaml",
        "--ray head:6379": "--ray head:6379",
        "--ray ray://head:1": "--ray ray://head:1",
        "--ray=head:6379": "--ray=head:6379",
        "--ray --steps 2": "--ray=auto --steps 2",
        "-- --ray": "-- --ray",
    }
    assert {said: " ".join(with_ray_address(said.split())) for said in cases} == cases


def test_another_batch_is_not_mixed_in(tmp_path: Path) -> None:
    (story,) = write_batch(tmp_path / "stories", 1)
    assert run_one(tmp_path, story).status == 0
    said = refused(story, "-o", tmp_path / "out", *FEW, "--seed", 7)
    assert "--seed: None there, 7 here" in said


def test_every_setting_of_generate_is_one_of_batch() -> None:
    from inspect import signature

    from fastory.cli.batch import batch
    from fastory.cli.generate import generate

    of_a_run = {"first_frame", "overwrite", "frames", "redraw_seed"}
    assert set(signature(generate).parameters) - of_a_run <= set(signature(batch).parameters)
