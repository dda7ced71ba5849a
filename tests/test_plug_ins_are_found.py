"""A mode, a scheduler and a backend of someone else work from the command line, with no line of ours changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUG_IN = '''
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fastory.kernels import backends
from fastory.modes.iterative import Iterative, iterative
from fastory.modes.mode import register
from fastory.settings import SCHEDULERS, ModeTraits, Scheduler


class CaptionsAlone(Iterative):
    """Every frame from its caption, once."""

    name = "captions-alone"

    def draw(self, model, plans, *, batch_sizes, size):
        (plan,) = plans
        once = replace(plan, settings=replace(plan.settings, mode="iterative", iterations=0))
        yield from iterative(model, once, batch_sizes=batch_sizes, size=size)

    def check(self, model, story, settings):
        pass

    def unused(self, story, settings):
        return {}

    def notices(self, model, story, settings):
        yield "this is a plug-in's mode"

    def method(self, settings):
        return {"Rounds": "none"}

    def picture_values(self, settings, round):
        return {}


def counted(run):
    def call(*arguments, **options):
        Path(os.environ["CALLS"]).open("a").write("x")
        return run(*arguments, **options)

    return call


register(CaptionsAlone(), ModeTraits(()))
SCHEDULERS["euler-karras"] = Scheduler("EulerDiscreteScheduler", {"use_karras_sigmas": True})
sdpa = backends.BACKENDS["sdpa"]
backends.register(replace(sdpa, name="mine", run={name: counted(run) for name, run in sdpa.run.items()}))
'''


def installed(folder: Path, source: str, points: str = "[fastory]\nstories = story_plug_in\n") -> Path:
    """A package beside its metadata, as pip lays them out."""
    (folder / "story_plug_in.py").write_text(source, encoding="utf-8")
    metadata = folder / "story_plug_in-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: story-plug-in\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(points)
    return folder


def fastory(place: Path, site: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "CALLS": str(place / "calls"), **more}
    command = [sys.executable, "-m", "fastory", "generate", *arguments]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)


def test_a_plug_in_s_mode_scheduler_and_backend_draw(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    site = installed(tmp_path / "site", PLUG_IN)
    (tmp_path / "story.txt").write_text("a fox is sleeping in the snow\na cat is jumping on the beach\n")
    flags = ("--mode", "captions-alone", "--scheduler", "euler-karras", "--steps", "2", "-o", "run")
    done = fastory(tmp_path, site, "story.txt", *flags, FASTORY_KERNELS="mine")
    assert done.returncode == 0, done.stderr
    assert "this is a plug-in's mode" in done.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"]["mode"] == "captions-alone" and list(manifest["pictures"]) == ["0"]
    assert len((tmp_path / "calls").read_text()) > 0
    drawn = (tmp_path / "run" / "frames" / "frame-001.png").stat()
    again = fastory(tmp_path, site, "story.txt", *flags)
    assert again.returncode == 0 and (tmp_path / "run" / "frames" / "frame-001.png").stat() == drawn


@pytest.mark.parametrize("flag", ["--mode", "--scheduler"])
def test_a_plug_in_that_cannot_be_imported_is_named(flag: str, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    site = installed(tmp_path / "site", "import nothing_of_this_name\n")
    refused = fastory(tmp_path, site, flag, "other")
    assert refused.returncode == 2
    assert "the plug-in stories of story-plug-in cannot be imported" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_without_a_plug_in_a_wrong_name_is_met_as_before(tmp_path: Path) -> None:
    refused = fastory(tmp_path, tmp_path, "--mode", "captions-alone")
    assert refused.returncode == 2 and "wanted one of iterative, causal" in refused.stderr


def test_names_of_the_metadata_are_in_the_help_and_draw(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    points = (
        "[fastory.mode]\ncaptions-alone = story_plug_in\n[fastory.scheduler]\neuler-karras = story_plug_in\n"
    )
    site = installed(tmp_path / "site", PLUG_IN, points)
    helped = fastory(
        tmp_path, site, "--help", COLUMNS="250", TERMINAL_WIDTH="250", PYTHONPROFILEIMPORTTIME="1"
    )
    assert (
        "[iterative|causal|" in helped.stdout
        and "|captions-alone]" in helped.stdout
        and "|pndm|euler-karras]" in helped.stdout
    )
    assert "story_plug_in" not in helped.stderr and "| torch" not in helped.stderr
    assert "fastory.settings" in helped.stderr  # imports are told of
    (tmp_path / "story.txt").write_text("a fox is sleeping in the snow\n")
    flags = ("--mode", "captions-alone", "--scheduler", "euler-karras", "--steps", "1", "-o", "run")
    done = fastory(tmp_path, site, "story.txt", *flags)
    assert done.returncode == 0 and "this is a plug-in's mode" in done.stderr
