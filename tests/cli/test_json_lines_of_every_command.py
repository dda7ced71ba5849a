"""With --json a program reads every line of stdout: one object a line, with its schema and its kind, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stories import write_stories
from typer.testing import CliRunner

from fastory import __version__
from fastory.cli import app
from fastory.events import as_json


def events(*arguments: object) -> list[dict[str, Any]]:
    """What a command with --json prints."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    read = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(event.pop("schema") == 1 for event in read)
    return read


def test_tune(sd15_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    small = "--steps=2 --batch-size=1 --frames=3 --rank=2 --validation=1 --validate-every=2 --device=cpu --offline"
    told = events(
        "tune", write_stories(tmp_path / "stories"), f"--model={sd15_folder}", *small.split(), "-o", output
    )
    kinds = [event.pop("event") for event in told]
    assert list(dict.fromkeys(kinds)) == ["Encoded", "Stepped", "Validated", "Tuned"]
    assert told[0].keys() == {"done", "frames"} and told[kinds.index("Stepped")].keys() == {
        "step",
        "steps",
        "loss",
    }
    assert isinstance(told[kinds.index("Validated")]["loss"], float)
    assert told[-1] == {"adapter": str(output), "step": 2} and output.exists()


def test_export(export_folder: Path, causal_builtin_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(export_folder, tmp_path / "copy")
    told = events("export", "--model", causal_builtin_folder, "--groups", 2, "--bind", "portable", "-o", copy)
    assert told == [{"event": "Rebound", "binding": "portable"}, {"event": "Finished", "folder": str(copy)}]


def test_events_within_events() -> None:
    from fastory.export.onnx import Compared, Exported
    from fastory.export.parity import Parity
    from fastory.export.tensorrt import Built

    worst = Parity("unet", {"batch": 2}, 1e-6, 1e-7, 2e-7, 1e-5)
    assert json.loads(as_json(Compared(3, worst))) == {
        "schema": 1,
        "event": "Compared",
        "comparisons": 3,
        "worst": {"component": "unet", "sizes": {"batch": 2}, "max_abs": 1e-6, "relative": 1e-7, "error": 2e-7,
                  "allowed": 1e-5},
    }  # fmt: skip
    assert json.loads(as_json(Exported("unet", 1.5, 10))) == {
        "schema": 1, "event": "Exported", "component": "unet", "seconds": 1.5, "bytes": 10
    }  # fmt: skip
    assert (
        json.loads(as_json(Built("unet", Path("e/unet.engine"), 1.5, 10, None)))["engine"] == "e/unet.engine"
    )


def test_convert(tmp_path: Path) -> None:
    pickle, written = tmp_path / "a.bin", tmp_path / "a.safetensors"
    torch.save({"image_proj": {"proj": torch.ones(2, 2)}}, pickle)
    told = events("convert", pickle)
    assert (
        told == [{"event": "Converted", "checkpoint": str(pickle), "output": str(written)}]
        and written.exists()
    )


def test_doctor() -> None:
    told = events("doctor")
    assert told[0] == {"event": "Machine", **{name: told[0][name] for name in ("python", "system", "machine")},
                       "fastory": __version__}  # fmt: skip
    versions = {event["name"]: event["version"] for event in told if event["event"] == "Package"}
    assert versions["torch"] == torch.__version__ and "xformers" in versions
    (cpu,) = (event for event in told if event["event"] == "Processor")
    assert 0 < cpu["free"] <= cpu["total"] and cpu["threads"] >= 1
    kernels = {event["device"]: event for event in told if event["event"] == "Kernels"}
    assert kernels["cpu"]["implementation"] not in kernels["cpu"]["others"]
    cuda = [event["event"] for event in told if event["event"] in ("Cuda", "NoCuda")]
    assert cuda == ["Cuda"] * torch.cuda.device_count() or cuda == ["NoCuda"]
    workers = [event["device"] for event in told if event["event"] == "BatchWorker"]
    assert workers == [f"cuda:{i}" for i in range(torch.cuda.device_count())] or workers == ["cpu"]


def test_doctor_says_what_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torchrun's processes, and of a cluster that is not there, without ending for it."""
    launched = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    pytest.importorskip("ray", reason="the cluster is Ray's: pip install 'fastory[ray]'")
    told = events("doctor", "--ray", "127.0.0.1:9")
    ranks = [event for event in told if event["event"] == "Rank"]
    assert [(event["rank"], event["processes"]) for event in ranks] == [(1, 2)]
    (none,) = (event for event in told if event["event"] == "NoRay")
    assert "no cluster answers there" in none["reason"]


@pytest.mark.parametrize("command", ["generate", "tune", "export", "convert", "doctor"])
def test_what_goes_wrong_is_no_line_of_stdout(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = {"tune": ["nowhere", "-o", "a.safetensors"], "doctor": ["--no-such-option"]}
    arguments = wrong.get(command, [*(["nowhere.bin"] if command == "convert" else []), "-o", "\0"])
    result = CliRunner().invoke(app, [command, *arguments, "--json"])
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr
