"""Which launch settings are the fastest: `python bench/sweep.py --out OUT`. What is timed is the runtime's own call.

A cell is a shape with one setting. With a CUDA device candidates are compiled by several processes into Triton's cache, then
timed cold in CUDA graphs; the fastest of each shape become OUT/configs/KERNEL/sm_XX.json, the shipped rules behind them.
Without one each candidate is compiled for --capability, and its row says registers, spills and occupancy, and no time.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import DTYPES, SD15, SDXL, Cell
from measure import inputs_of, ours
from predict import resources
from report import Report, arguments
from timing import copies_for, time_cuda

from fastory.kernels.configs import SIZES, capability

Launch = dict[str, Any]
BLOCK_M, BLOCK_N, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64), (4, 8), (1, 2)


def shapes() -> list[Cell]:
    """The layers of both UNets in the order of their share of a step: one group, four masked groups, the band."""
    layers = [*SDXL, *SD15, ("SD1.5", 64, 160, 8)]
    single = [Cell("grca", model, length, width, heads, 77, 8) for model, length, width, heads in layers]
    four = [
        Cell("grca", model, length, width, heads, 77, 8, groups=4, masked=True)
        for model, length, width, heads in layers
    ]
    band = [
        Cell("banded", model, length, width, heads, 91 * 5, group_size=91, window=4, padded=True, prefix=91)
        for model, length, width, heads in layers
        if model == "SD1.5"
    ]
    return [*single, *band, *four]


def candidates(cell: Cell, most: int) -> list[Launch]:
    """At most `most` settings; first the shipped ones, then those of which several blocks fit a multiprocessor."""
    shipped = shipped_settings(cell, 90)
    grid = [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
        for m, n, warps, stages in itertools.product(BLOCK_M, BLOCK_N, WARPS, STAGES)
        if m >= 16 * warps // 4 or m == 16  # a warp of a matrix product has 16 rows
    ]
    # Blocks of 8 warps of which two fit a multiprocessor, where the compiler would take more registers.
    grid += [{**launch, "maxnreg": 128} for launch in grid if launch["num_warps"] == 8]
    grid.sort(key=lambda launch: abs(launch["BLOCK_M"] * launch["BLOCK_N"] * cell.width - 64 * 32 * 64))
    first = {name: shipped[name] for name in (*SIZES, "maxnreg") if name in shipped}
    return [first, *(launch for launch in grid if launch != first)][:most]


def kernel_module(cell: Cell) -> Any:
    """The file of the operator that launches it."""
    return importlib.import_module(f"fastory.kernels.{cell.operator}.triton")


def shipped_settings(cell: Cell, architecture: int) -> Launch:
    """What the runtime launches this cell with."""
    shape = [architecture, 8 * DTYPES[cell.dtype].itemsize, cell.width, cell.queries]
    return kernel_module(cell).settings(*shape, *([cell.groups] if cell.operator == "grca" else []))


@contextmanager
def launched_with(cell: Cell, launch: Launch) -> Iterator[None]:
    """The operator launches with `launch`, whatever its files say."""
    module = kernel_module(cell)
    before = module.settings

    def settings(*shape: int) -> Launch:
        return {**before(*shape), **launch}

    module.settings = settings
    try:
        yield
    finally:
        module.settings = before


@torch.inference_mode()
def compile_here(cell: Cell, launch: Launch) -> str:
    """Runs the call once, in a process of its own, so that its binary is in Triton's cache; says why it cannot."""
    try:
        with launched_with(cell, launch):
            ours(cell, inputs_of(cell, "cuda"))()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:200]}"
    return ""


@torch.inference_mode()
def timed(cell: Cell, launch: Launch) -> dict[str, Any]:
    """Microseconds of the call, cold."""
    size = 2 * cell.rows * cell.queries * cell.heads * cell.width * DTYPES[cell.dtype].itemsize
    with launched_with(cell, launch):
        chain = [ours(cell, inputs_of(cell, "cuda", seed)) for seed in range(min(copies_for(size), 16))]
        times, failed = time_cuda({"it": chain}, samples=15)
    if failed:
        raise RuntimeError(failed["it"])
    return {"cold_us": times["it"]}


def compiled(cell: Cell, launch: Launch, architecture: int) -> dict[str, Any]:
    """What the compiler says of the candidate; nothing runs."""
    with launched_with(cell, launch):
        found = resources(cell, architecture)
    names = (
        "registers",
        "spilled_bytes",
        "shared_bytes",
        "blocks_per_multiprocessor",
        "instructions_per_warp",
    )
    return {name: found[name] for name in names} | {
        "warps_per_multiprocessor": found["blocks_per_multiprocessor"] * launch["num_warps"]
    }


def rules(best: dict[Cell, Launch], kernel: str) -> list[dict[str, Any]]:
    """Rules of the measured shapes, the narrowest first: a rule with groups before the one without."""
    cells = [cell for cell in best if cell.operator == kernel]
    cells.sort(key=lambda cell: (cell.width, -cell.groups, -cell.queries))
    return [
        {"bits": 8 * DTYPES[cell.dtype].itemsize, "up_to_width": cell.width, "from_queries": cell.queries}
        | ({"from_groups": 2} if cell.groups > 1 else {})
        | best[cell]
        for cell in cells
    ]


def write_configs(best: dict[Cell, Launch], folder: Path, architecture: int, device: str) -> None:
    """OUT/configs/KERNEL/sm_XX.json: the measured rules behind that for the narrowest heads, before the shipped ones."""
    for kernel in sorted({cell.operator for cell in best}):
        shipped = Path(kernel_module(next(cell for cell in best if cell.operator == kernel)).CONFIGS)
        named = shipped / f"sm_{architecture}.json"
        old = json.loads((named if named.exists() else shipped / "default.json").read_text())["rules"]
        narrow = [rule for rule in old if rule.get("up_to_width", 1024) <= 16 and rule.get("bits") == 16]
        rest = [rule for rule in old if rule not in narrow]
        lines = [json.dumps(rule) for rule in [*narrow, *rules(best, kernel), *rest]]
        source = f"bench/sweep.py on {device}; rules of other shapes as they were"
        target = folder / "configs" / kernel / named.name
        target.parent.mkdir(parents=True, exist_ok=True)
        body = ",\n    ".join(lines)
        target.write_text(f'{{\n  "source": {json.dumps(source)},\n  "rules": [\n    {body}\n  ]\n}}\n')


def main() -> int:
    """Writes sweep.jsonl, and with a CUDA device the settings files."""
    parser = arguments(__doc__, minutes=4)
    parser.add_argument("--candidates", type=int, default=16, help="settings a shape")
    parser.add_argument("--shapes", type=int, help="only the first so many")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--capability", type=int, default=90, help="what is compiled for without a device")
    options = parser.parse_args()
    report = Report("sweep", options)
    cells = shapes()[: options.shapes]
    if report.gpu:
        return sweep_on_gpu(report, cells, options)
    for cell in cells:
        for launch in candidates(cell, options.candidates):
            measure = partial(compiled, cell, launch, options.capability)
            report.cell({"shape": cell.name, **launch}, measure)
    return report.close()


def sweep_on_gpu(report: Report, cells: list[Cell], options: argparse.Namespace) -> int:
    """Shape after shape: compiled by the pool, timed here; what was the fastest so far is written after every shape."""
    best: dict[Cell, Launch] = {}
    architecture = capability(torch.device("cuda"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        for cell in cells:
            launches = candidates(cell, options.candidates)
            compiling = [pool.submit(compile_here, cell, launch) for launch in launches]
            times: dict[int, float] = {}
            for n, launch in enumerate(launches):
                measure = partial(timed_when_compiled, cell, launch, compiling[n], times, n)
                report.cell({"shape": cell.name, "shipped": n == 0, **launch}, measure)
            if times:
                best[cell] = launches[min(times, key=lambda n: times[n])]
                write_configs(best, options.out, architecture, torch.cuda.get_device_name())
    return report.close()


def timed_when_compiled(
    cell: Cell, launch: Launch, compiling: Future[str], times: dict[int, float], n: int
) -> dict[str, Any]:
    """timed() of a candidate that another process compiles; its median goes into times[n]."""
    if why := compiling.result():
        raise RuntimeError(why)
    found = timed(cell, launch)
    times[n] = found["cold_us"]["p50"]
    return found


if __name__ == "__main__":
    sys.exit(main())
