"""Threads wait without spinning, are no more than the machine has free, and the caller's number stays the caller's."""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastory
from fastory import Story, StoryModel, generate, threads
from fastory.events import StepDone
from fastory.runtime import release_memory

PACKAGE = Path(fastory.__file__).parent
# Stops a process where PyTorch is first looked for, and says how its threads would wait.
PROBE = """
import os, sys

class Probe:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch is looked for, waiting:", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Probe())
"""
STORY = Story.from_captions(["a fox", "a cat"])
SHORT: dict[str, Any] = {"steps": 2, "iterations": 0, "batch_size": 1}


def entry_modules() -> list[str]:
    """Every module that `python -m` is meant for."""
    main = 'if __name__ == "__main__":'
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if main in file.read_text(encoding="utf-8")]
    return [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]


def waiting(tmp_path: Path, command: list[str], said: str = "", **environment: str) -> str:
    """What stands in OMP_WAIT_POLICY when this Python command comes to load PyTorch. said: to its standard input."""
    (tmp_path / "sitecustomize.py").write_text(PROBE)
    clean = {name: value for name, value in os.environ.items() if name not in threads.WAITING}
    with subprocess.Popen(
        [sys.executable, *command],
        env={**clean, "PYTHONPATH": str(tmp_path), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(said)
        process.stdin.flush()  # and not closed: the page's worker ends with its standard input
        process.wait(timeout=60)
        out, err = process.stdout.read(), process.stderr.read()
    # The worker of the page keeps its standard output for events: what is printed goes to the other.
    probed, _, value = (out or err).strip().partition(": ")
    assert probed == "torch is looked for, waiting", err
    return value


@pytest.mark.parametrize("module", entry_modules())
def test_modules_set_it_before_pytorch_is_loaded(module: str, tmp_path: Path) -> None:
    arguments = ["doctor"] if module in ("fastory.cli.__main__", "fastory.__main__") else []
    # The page's worker is told on its standard input where it works.
    told = [{"root": str(tmp_path), "model": {}}, {"kind": "draw", "id": "story"}]
    said = "".join(json.dumps(line) + "\n" for line in told)
    assert waiting(tmp_path, ["-m", module, *arguments], said) == "PASSIVE"


def test_command_sets_it_before_pytorch_is_loaded(tmp_path: Path) -> None:
    script = "import sys; from fastory.cli import main; sys.argv = ['fastory', 'doctor']; main()"
    assert waiting(tmp_path, ["-c", script]) == "PASSIVE"


def test_what_the_user_said_counts(tmp_path: Path) -> None:
    module = ["-m", "fastory.cli", "doctor"]
    assert waiting(tmp_path, module, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    assert waiting(tmp_path, module, GOMP_SPINCOUNT="1000") == "None"


def test_a_library_leaves_its_users_process_alone(tmp_path: Path) -> None:
    assert waiting(tmp_path, ["-c", "import fastory.cli.commands; fastory.generate"]) == "None"
    (tmp_path / "theirs.py").write_text("import fastory; fastory.generate")
    assert waiting(tmp_path, ["-m", "theirs"]) == "None"


@pytest.mark.parametrize(
    ("default", "cores", "quota", "idle", "expected"),
    [
        (8, 8, math.inf, 8.0, 8),
        (8, 8, math.inf, 7.3, 8),  # quiet but for a little
        (8, 8, math.inf, 7.0, 7),
        (8, 8, math.inf, 2.9, 2),  # the third would find its core busy
        (2, 2, math.inf, 1.0, 1),
        (2, 2, math.inf, 0.0, 1),
        (8, 3, math.inf, 3.0, 3),  # affinity
        (8, 8, 2.0, 8.0, 2),  # quota
        (8, 8, 1.5, 8.0, 2),
        (8, 8, 0.2, 8.0, 1),
        (8, 8, 100.0, 8.0, 8),  # a quota above what there is
        (8, 8, 4.0, 3.0, 3),
        (4, 64, math.inf, 64.0, 4),  # never more than PyTorch's own
        (1, 64, math.inf, 64.0, 1),
    ],
)
def test_no_more_threads_than_find_a_core(
    default: int, cores: int, quota: float, idle: float, expected: int
) -> None:
    assert threads.threads_for(default, cores, quota, idle) == expected


def test_a_users_number_counts_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.COUNT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "allowed_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "cpu_quota", lambda: math.inf)
    monkeypatch.setattr(threads, "idle_cores", lambda cores: 1.2)
    assert threads.choose(4) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.choose(3) == 3


def test_idle_cores_are_between_none_and_all() -> None:
    cores = threads.allowed_cores()
    assert 0 <= threads.idle_cores(cores) <= len(cores)


def write_groups(tmp_path: Path, lines: str, limits: dict[str, str]) -> float:
    """The quota where /proc/self/cgroup holds `lines` and control groups these files."""
    for name, text in limits.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    (tmp_path / "self").write_text(lines)
    return threads.cpu_quota(tmp_path / "cgroup", tmp_path / "self")


def test_quota_of_version_2_is_the_least_of_the_groups_above(tmp_path: Path) -> None:
    limits = {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000", "other/cpu.max": "50000 100000"}
    assert write_groups(tmp_path, "0::/a/b\n", limits) == 2.5


def test_quota_of_version_2_in_a_container_that_sees_only_its_root(tmp_path: Path) -> None:
    assert write_groups(tmp_path, "0::/../..\n0::/not/there\n", {"cpu.max": "150000 100000"}) == 1.5


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_quota_of_version_1(mount: str, tmp_path: Path) -> None:
    lines = "9:name=systemd:/x\n4:memory:/m\n1:cpu,cpuacct:/a\n0::/\n"
    limits = {f"{mount}/a/cpu.cfs_quota_us": "300000", f"{mount}/a/cpu.cfs_period_us": "100000"}
    limits |= {f"{mount}/cpu.cfs_quota_us": "-1", f"{mount}/cpu.cfs_period_us": "100000"}
    assert write_groups(tmp_path, lines, limits) == 3.0


@pytest.mark.parametrize("text", ["max 100000", "", "0 0", "words", "-1 100000"])
def test_no_quota_and_unreadable_ones_limit_nothing(text: str, tmp_path: Path) -> None:
    assert write_groups(tmp_path, "0::/\n", {"cpu.max": text}) == math.inf


def test_no_control_groups_at_all(tmp_path: Path) -> None:
    assert threads.cpu_quota(tmp_path, tmp_path / "missing") == math.inf


@pytest.fixture(scope="module")
def opened() -> StoryModel:
    return StoryModel.open("builtin", device="cpu")


@pytest.fixture
def callers() -> Iterator[int]:
    """The caller's own number of threads, which is neither of the runs'."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def with_threads(opened: StoryModel, count: int) -> StoryModel:
    """The opened model where this many threads were chosen."""
    return StoryModel(opened.checkpoint, replace(opened.placement, threads=count), "builtin")


@contextmanager
def watched(model: StoryModel) -> Iterator[list[int]]:
    """How many threads each UNet call really had."""
    seen: list[int] = []
    with model.unet.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads())):
        yield seen


class Failed(Exception):
    """What the UNet of a test raises."""


def fails(*_: object) -> None:
    raise Failed


@pytest.mark.parametrize("ending", ["drawn to the end", "closed", "failed"])
def test_a_caller_keeps_its_threads_between_events(
    ending: str, opened: StoryModel, callers: int, tmp_path: Path
) -> None:
    model = with_threads(opened, 1)
    with watched(model) as seen, ExitStack() as stack:
        events: Any = generate(STORY, model=model, output=tmp_path, **SHORT)
        if ending == "failed":
            stack.enter_context(pytest.raises(Failed))
        for event in events:
            assert torch.get_num_threads() == callers, event
            if isinstance(event, StepDone) and ending == "closed":
                events.close()
            if isinstance(event, StepDone) and ending == "failed":
                stack.enter_context(model.unet.register_forward_pre_hook(fails))
    assert set(seen) == {1}
    assert torch.get_num_threads() == callers
    assert list(generate(STORY, model=model, output=tmp_path, **SHORT)), "the folder was not released"


def test_two_runs_that_take_turns_each_have_their_own(opened: StoryModel, callers: int) -> None:
    runs = {count: generate(STORY, model=with_threads(opened, count), **SHORT) for count in (1, 2)}
    seen: dict[int, list[int]] = {1: [], 2: []}
    while runs:
        for count, events in list(runs.items()):
            with watched(opened) as now:
                event = next(events, None)
            assert torch.get_num_threads() == callers
            seen[count] += now
            if event is None:
                del runs[count]
    assert set(seen[1]) == {1} and set(seen[2]) == {2}


def test_a_run_goes_on_with_the_threads_it_began_with(
    opened: StoryModel, callers: int, tmp_path: Path
) -> None:
    events: Any = generate(STORY, model=with_threads(opened, 2), output=tmp_path, **SHORT)
    next(event for event in events if isinstance(event, StepDone))
    events.close()
    with watched(opened) as seen:
        list(generate(STORY, model=with_threads(opened, 1), output=tmp_path, **SHORT))
    assert set(seen) == {2}


# The fields of glibc's struct mallinfo2; hblks counts the blocks that were mapped one by one.
MALLINFO2 = [
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_giving_memory_back_leaves_the_process_allocator_as_it_is() -> None:
    """After a freed block of 24 MiB glibc serves 4 MiB from its heap; a threshold once set would stop that for good."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("no mallinfo2: glibc before 2.33, or another C library")

    class Counts(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO2]

    libc.mallinfo2.restype = Counts
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    release_memory(torch.device("cpu"))
    libc.free(libc.malloc(24 * 2**20))
    before = libc.mallinfo2().hblks
    block = libc.malloc(4 * 2**20)
    mapped = libc.mallinfo2().hblks - before
    libc.free(block)
    assert mapped == 0
