"""Two commits side by side: a process for each, taking turns, so that both meet the same machine."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from cells import Cell

ROOT = Path(__file__).parent.parent
PARTS = ("kernels", "export")  # folders that setup.py maps into the package
ROUNDS = 15


def checkout(revision: str | None) -> Path:
    """A folder in which `import fastory` finds the revision, or this tree for None, kernels and export included.

    This tree is copied too: what is installed may be another version of it.
    """
    folder = Path(tempfile.mkdtemp(prefix="fastory-compare-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if revision is None:
        shutil.copytree(ROOT / "fastory", folder / "fastory")
        for name in PARTS:
            shutil.copytree(ROOT / name, folder / "fastory" / name)
        return folder
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    for name in PARTS:
        (folder / name).rename(folder / "fastory" / name)
    return folder


def _enter(folder: str) -> None:
    sys.path.insert(0, folder)


@functools.cache
def _call(cell: Cell, device: str):
    from measure import inputs_of, ours

    return ours(cell, inputs_of(cell, device))


def _turn(cell: Cell, device: str) -> float:
    """Median microseconds of one turn."""
    import torch
    from timing import time_cpu, time_cuda

    call = _call(cell, device)
    with torch.inference_mode():
        if device == "cuda":
            times, failed = time_cuda({"it": [call] * 20}, samples=5)
            if failed:
                raise RuntimeError(f"{cell.name}: {failed['it']}")
            return times["it"]["p50"]
        return time_cpu({"it": call}, budget=0.05, samples=5)["it"]["p50"]


def _origin() -> str:
    import fastory.kernels.grca

    return fastory.kernels.grca.__file__


def _process(revision: str | None) -> ProcessPoolExecutor:
    folder = str(checkout(revision))
    context = multiprocessing.get_context("spawn")
    process = ProcessPoolExecutor(1, mp_context=context, initializer=_enter, initargs=(folder,))
    origin = process.submit(_origin).result()
    if not origin.startswith(folder):
        raise RuntimeError(f"{revision or 'this tree'}: wanted its own kernels, imported {origin}")
    return process


@functools.cache
def _processes(revision: str) -> tuple[ProcessPoolExecutor, ProcessPoolExecutor]:
    return _process(None), _process(revision)


def side_by_side(cell: Cell, device: str, revision: str) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds (p50 and the extremes of the turns) of this tree and of the revision."""
    turns: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for pool, taken in zip(_processes(revision), turns, strict=True):
            taken.append(pool.submit(_turn, cell, device).result())
    here, there = ({"p50": median(t), "least": min(t), "most": max(t)} for t in turns)
    return here, there
