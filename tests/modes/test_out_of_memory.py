"""When memory runs out the micro-batch is halved, in a process whose address space is really limited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastory import Settings, Story
from fastory.events import FrameDrawn
from fastory.runs.folder import RunFolder
from fastory.runs.identity import Identity
from fastory.runs.recording import write_png

# Pictures so large that a few frames at once need far more than one; the limit is set after the model is open.
SCRIPT = """
import json, resource, sys
from pathlib import Path
import psutil, torch
from fastory import Story, StoryModel, generate
from fastory.errors import FastoryError
from fastory.events import BatchHalved, FrameDrawn, as_json

folder, room, batch, side = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
model = StoryModel.open("builtin")
story = Story.from_captions(["a fox", "a cat", "a bear", "a turtle"] * 6)
options = {"steps": 1, "iterations": 0, "width": side, "height": side, "output": folder, "batch_size": batch}
list(generate(story, model=model, **{**options, "width": 64, "height": 64, "output": None}))
if room:
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + room * 2**20, used + room * 2**20))
try:
    for event in generate(story, model=model, **options):
        if isinstance(event, (BatchHalved, FrameDrawn)):
            print(as_json(event), flush=True)
except FastoryError as error:
    print(json.dumps({"event": "error", "message": str(error)}))
    sys.exit(error.exit_code)
"""


def run(folder: Path, room: int, batch: int, side: int = 384) -> tuple[int, list[dict[str, object]], str]:
    """Exit code, events and stderr of a process that may use `room` MiB more than the opened model (0: no limit)."""
    # glibc reserves address space for arenas and keeps freed blocks in it; without that, the limit is met where the
    # micro-batch's own size says and not by chance
    steady = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(room), str(batch), str(side)],
        env={**os.environ, **steady},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_micro_batch_is_halved_recorded_and_the_story_finished(tmp_path: Path) -> None:
    # measured at 320 pixels: 110 MiB are enough for 6 frames at once, 170 for 12, 210 for 24, one decoded picture takes 80
    code, events, err = run(tmp_path / "run", room=155, batch=24, side=320)
    assert code == 0, err
    halved = [event for event in events if event["event"] == "BatchHalved"]
    assert halved and halved[0]["round"] == 0 and halved[0]["size"] == 12
    assert {event["frame"] for event in events if event["event"] == "FrameDrawn"} == set(range(24))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    size = manifest["batch_sizes"][0]
    assert size == halved[-1]["size"]
    # equal sizes per round, equal bytes: a run that began with the smaller size draws the same
    assert run(tmp_path / "small", room=0, batch=size, side=320)[0] == 0
    assert (tmp_path / "run/sheet.png").read_bytes() == (tmp_path / "small/sheet.png").read_bytes()


def test_smaller_micro_batch_counts_from_its_round_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    story = Story.from_captions(["a fox", "a cat"])
    folder.begin(Identity.of(story, Settings(), {}, None), story, {}, {}, 8)
    for k in (0, 1):
        drawn = FrameDrawn(k, 0, Image.new("RGB", (8, 8)), 0, None)
        folder.record([(drawn, write_png(folder, folder.place_of(k, 0), drawn.image, {}), 0.0)])
    folder.halve(1, 4)
    folder.halve(3, 2)
    assert folder.batch_sizes() == [8, 4, 4, 2]
    assert folder.has(0, 0) and not folder.has(
        1, 0
    )  # round 1 was drawn with eight at once, so it starts anew


def test_one_frame_that_does_not_fit_ends_with_what_was_needed_and_what_helps(tmp_path: Path) -> None:
    code, events, err = run(tmp_path / "run", room=60, batch=2)
    assert code == 1, err
    message = str(events[-1]["message"])
    assert "one frame at a time" in message and "--width" in message
    assert any(character.isdigit() for character in message)
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("room", [30, 80, 120, 300])
def test_any_limit_ends_in_a_finished_story_or_a_clear_error(room: int, tmp_path: Path) -> None:
    """The allocation that fails is another one at every limit: convolution, attention, decoder."""
    code, events, err = run(tmp_path / "run", room=room, batch=8)
    assert code in (0, 1) and "Traceback" not in err
    assert code == 0 or events[-1]["event"] == "error"
