"""The bench is first run on a GPU that is there for half an hour: its rows, its errors and its limits, tried without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import ceilings
import pytest
import step
import story
import sweep
import timing
import torch
from cells import TOKENS, Cell, grca_inputs, group_bounds
from random_models import random_model
from report import Report
from shapes_alone import DEVICE, fake_cuda

from fastory import Story
from fastory.conditioning.references import Group, References
from fastory.kernels import configs
from fastory.runtime import Placement

ROOT = Path(__file__).parents[2]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_cell_that_fails_is_a_row_and_the_next_one_runs(tmp_path: Path) -> None:
    report = Report("x", Namespace(out=tmp_path, minutes=1, device="cpu"))
    report.cell({"n": 1}, lambda: {"us": 1})
    assert rows(tmp_path / "x.jsonl")[-1]["found"] == {"us": 1}  # written before the next cell begins
    report.cell({"n": 2}, lambda: {"us": [][0]})
    report.cell({"n": 3}, lambda: {"us": 3})
    assert report.close() == 1
    _, *cells = rows(tmp_path / "x.jsonl")
    assert [row["cell"]["n"] for row in cells] == [1, 2, 3]
    assert cells[1]["error"].startswith("IndexError") and "found" not in cells[1]
    assert not any(row["gpu"] for row in cells)  # what a CPU gave is no figure of a GPU


def test_what_time_does_not_suffice_for_is_said(tmp_path: Path) -> None:
    report = Report("x", Namespace(out=tmp_path, minutes=0, device="cpu"))
    report.cell({"n": 1}, lambda: pytest.fail("a cell was begun after its time"))
    assert "minutes had passed" in rows(tmp_path / "x.jsonl")[-1]["skipped"] and report.skipped == 1


def test_a_call_that_cannot_be_captured_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was timed eagerly, and the row said nothing of it."""
    with fake_cuda():
        assert set(timing.time_cuda({"it": [lambda: None]}, samples=3)[0]) == {"it"}

        def refuse(graph: Any, **options: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(torch.cuda, "graph", refuse)
        times, failed = timing.time_cuda({"it": [lambda: None]}, samples=3)
        assert times == {} and "not permitted" in failed["it"]


@pytest.mark.parametrize("groups", [1, 4])
def test_a_cell_is_the_call_that_the_runtime_makes(groups: int) -> None:
    cell = Cell("grca", "any", 16, 8, 2, text=5, references=8, rows=4, groups=groups, dtype="fp32")
    inputs, per_group, width = grca_inputs(cell, "cpu"), 8 // groups, 2 * 16
    picture = torch.zeros(1, TOKENS, 3)
    made = References.of(
        [Group([picture] * per_group, 0.4, lambda i, n: True)] * groups,
        lambda: picture,
        lambda tokens: torch.zeros(1, tokens.shape[1], width),
        tokens_per_ref=TOKENS,
        like=torch.zeros(1, 5, width),
    )
    text = torch.zeros(1, 5, width)
    visible = torch.cat([row(i, text).ref_visible for row in (made.null_row, made.row) for i in range(2)])
    assert inputs["ref_visible"].equal(visible) and inputs["k_ref"].shape[1] == made.ref_kv.shape[1]
    for ours, runtimes in ((inputs["ref_offsets"], made.offsets), (inputs["scale"], made.scale)):
        assert ours.equal(runtimes) and ours.dtype == runtimes.dtype
    assert group_bounds(cell)[-1] == 8 + groups
    # K and V stand in a tensor of all layers: a token is further from the next than its own heads are wide.
    assert inputs["k_ref"].stride(1) > 16 and inputs["k_text"].stride(1) > 16


def test_the_fastest_settings_of_a_sweep_are_what_the_runtime_reads(tmp_path: Path) -> None:
    one, grouped, *_ = [cell for cell in sweep.shapes() if cell.width == 64 and cell.queries == 4096]
    launches = [{"BLOCK_M": m, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1} for m in (32, 16)]
    sweep.write_configs({one: launches[0], grouped: launches[1]}, tmp_path, 90, "a card")
    folder = tmp_path / "configs" / "grca"

    def read(*shape: int) -> dict[str, Any]:
        return {name: configs.lookup(folder, 90, 16, *shape)[name] for name in configs.SIZES}

    (folder / "default.json").write_text((sweep.kernel_module(one).CONFIGS / "default.json").read_text())
    assert read(64, 4096, 1) == launches[0] and read(64, 4096, 4) == launches[1]
    shipped = sweep.shipped_settings(Cell("grca", "any", 256, 160, 8, 77), 90)
    assert read(160, 256, 1) == {name: shipped[name] for name in configs.SIZES}  # as it was


class TestOnShapesAlone:
    """What the scripts do where there is a CUDA device, on one without values: no figure, but every line runs."""

    def test_step(self) -> None:
        with fake_cuda() as device:
            model = random_model("small-sd15", Placement(DEVICE, torch.float16, 1, graphs=True))
            found = step.runtime_step(model, 2, 3, share=False)
            assert found["step_us"]["p50"] == 1000 and found["frame_steps_s"] == 2000
            assert len(device.captures) == 1 and "peak_gb" in found

    def test_story(self) -> None:
        with fake_cuda():
            model = random_model("small-sdxl", Placement(DEVICE, torch.float16, 1, graphs=True))
            captions = Story.from_captions(["a fox", "a rabbit"])
            found = story.tell(model, captions, steps=2, iterations=1, batch_size=2)
        assert found["pictures"] == 4 and {"steps", "decode", "files"} <= set(found["parts_s"])
        assert found["png_beside_s"] > 0

    def test_ceilings(self) -> None:
        with fake_cuda():
            assert ceilings.copy("cuda", 1)["tb_s"] > 0
            assert ceilings.matmul("cuda", 1024, torch.float16)["tflop_s"] > 0
            assert ceilings.launch("cuda", 10)["in_a_graph_us"] == 100.0


class TestGpuScript:
    """bench/gpu.sh itself, in a process of its own."""

    def call(self, out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROOT / "bench" / "gpu.sh", *words, out],
            env=os.environ | {"PYTHON": sys.executable, "CACHE": str(out / "cache")} | environment,
            capture_output=True,
            text=True,
        )

    def test_it_says_what_it_wants(self, tmp_path: Path) -> None:
        found = self.call(tmp_path)
        assert found.returncode == 2 and "wanted which call, 1, 2 or 3" in found.stderr

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_it_never_calls_a_cpu_a_gpu(self, tmp_path: Path) -> None:
        found = self.call(tmp_path, "1")
        assert found.returncode == 1 and "no CUDA device" in found.stderr
        assert not list(tmp_path.glob("*.jsonl"))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("number", "files"),
        [("1", {"ceilings", "step"}), ("2", {"step", "story"}), ("3", {"sweep", "kernels"})],
    )
    def test_each_call_is_rehearsed(self, tmp_path: Path, number: str, files: set[str]) -> None:
        found = self.call(tmp_path, number, REHEARSE="1", WORKERS="0")
        assert found.returncode == 0, found.stdout + found.stderr
        assert {file.stem for file in tmp_path.glob("*.jsonl")} == files
        for file in files:
            head, *cells = rows(tmp_path / f"{file}.jsonl")
            assert head["environment"]["device"].startswith("CPU")
            cells = [row for row in cells if "cell" in row]
            assert cells and all("found" in row and row["gpu"] is False for row in cells)

    def test_a_call_ends_with_its_seconds(self, tmp_path: Path) -> None:
        found = self.call(tmp_path, "3", REHEARSE="1", SECONDS_A_CALL="1")
        said = (tmp_path / "call-3.txt").read_text()
        assert "sweep: skipped, the call's 1 seconds are over" in said and found.returncode == 0
