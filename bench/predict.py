"""Predicted cost of the kernels from their machine code, where there is no GPU: `python bench/predict.py`.

A prediction, never a measurement: the largest of what one multiprocessor's issue slots, exponent units and matrix
units, and the chip's L2 and memory, need for the instructions the compiler emitted, at the rates below, and of the latency
that occupancy leaves: how often a multiprocessor is filled with blocks, times the loads that a block waits for one after
another. Loops are weighted by the trips the shape gives them.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from typing import Any

import results
import torch
import triton
from cells import DTYPES, RATES, TOKENS, Cell, gpu_matrix, group_bounds
from torch import Tensor

from fastory.kernels.banded import triton as banded
from fastory.kernels.grca import triton as grca
from fastory.kernels.offline import ARCHITECTURES, Compiled, compile_for
from fastory.kernels.tiles import SLOT


@dataclass(frozen=True)
class Chip:
    """Multiprocessors, clock in Hz, matrix operations per clock and multiprocessor, L2 bytes a second."""

    name: str
    multiprocessors: int
    clock: float
    matrix: float
    l2: float


# Multiprocessors and clock: NVIDIA's H100 SXM data sheet; the matrix rate is the 750 TFLOP/s of RATES; L2 is assumed.
H100 = Chip("H100", 132, 1.755e9, 750e12 / 132 / 1.755e9, 5.5e12)
# Cycles from a load to its use, when it misses L1: assumed. How many loads of a program wait for one another: read from the
# machine code of grca at SDXL 4096x10x64, where ranges then took the place of offsets and flags, one load of two; nobody has
# counted banded's, whose latency is left out.
LATENCY, DEPENDENT_LOADS = 700, {"grca": 7}
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "IMMA")


@dataclass
class Loop:
    first: int
    last: int


def parse(sass: str) -> tuple[list[str], list[Loop], list[Loop]]:
    """Operation codes in order, loops (from a label to the last branch back to it), what conditional branches jump over."""
    codes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str, bool]] = []
    for line in sass.splitlines():
        if label := re.match(r"^\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(codes)
        elif found := INSTRUCTION.match(line):
            if found[1].startswith("BRA") and (target := re.search(r"\.L_x_\d+", found[2])):
                branches.append((len(codes), target[0], "@" in line))
            codes.append(found[1])
    # A branch to itself ends every program: not a loop.
    ends = {labels[to]: at for at, to, _ in branches if labels[to] < at - 1}
    loops = [Loop(first, at) for first, at in ends.items()]
    return (
        codes,
        loops,
        [
            Loop(at + 1, labels[to] - 1)
            for at, to, conditional in branches
            if conditional and labels[to] > at + 1
        ],
    )


# How often loops run, in the order of the code; a pair is a loop and the loops in it.
Trips = list[Any]  # of int or tuple[int, Trips]


def weights(
    codes: list[str], loops: list[Loop], skips: list[Loop], trips: Trips, masked: float, searched: bool
) -> list[float]:
    """How often each instruction runs.

    The loops with matrix instructions take the trips given, others run once for each time they are reached. What the
    innermost of them jump over is the masking of a tile, which the share `masked` of the tiles needs. What jumps over
    another loop and that loop's own guard is the search for unseen keys in a range of a tile or more: `searched`.
    """
    busy = [loop for loop in loops if any(c.startswith(MATRIX) for c in codes[loop.first : loop.last])]
    weight = [1.0] * len(codes)

    def within(outer: Loop, inside: list[Loop]) -> list[Loop]:
        return [o for o in inside if o is not outer and outer.first <= o.first and o.last <= outer.last]

    def scale(loop: Loop, by: float) -> None:
        for index in range(loop.first, loop.last + 1):
            weight[index] *= by

    def enter(inside: list[Loop], trips: Trips) -> None:
        outermost = [loop for loop in inside if not any(loop in within(o, inside) for o in inside)]
        for loop, trip in zip(sorted(outermost, key=lambda loop: loop.first), trips, strict=True):
            count, nested = trip if isinstance(trip, tuple) else (trip, [])
            scale(loop, count)
            if nested:
                enter(within(loop, inside), nested)

    enter(busy, trips)
    plain = [
        skip
        for skip in skips
        if not any(c.startswith((*MATRIX, "MUFU.EX2")) for c in codes[skip.first : skip.last + 1])
    ]
    for loop in busy:
        for skip in [] if within(loop, busy) else within(loop, plain):
            scale(skip, masked)
    for skip in plain:
        if any(within(guard, loops) for guard in within(skip, plain)):
            scale(skip, searched)
    return weight


def _masked_share(cell: Cell, block_m: int, block_n: int) -> float:
    """The share of a loop's whole tiles that is masked: none unless keys are padded at random or a band has edges."""
    if not cell.self_attention or cell.padded:
        return float(cell.self_attention)
    edges = tiles = 0
    for start in range(0, cell.queries, block_m):
        low, high = start // cell.group_size, (min(start + block_m, cell.queries) - 1) // cell.group_size
        oldest = [
            max(group - cell.window + 1, 0) * cell.group_size if cell.window else 0 for group in (low, high)
        ]
        newest = [min((group + 1) * cell.group_size, cell.text) for group in (low, high)]
        for key in range(oldest[0], newest[1] - block_n + 1, block_n):
            tiles += 1
            edges += key < oldest[1] or key + block_n > newest[0]
    return edges / tiles


def _views(cell: Cell, rows: int, tokens: int) -> list[Tensor]:
    wide = torch.empty(rows, tokens, 4 * cell.heads * cell.width, dtype=DTYPES[cell.dtype], device="meta")
    return [x.unflatten(-1, (cell.heads, cell.width)) for x in wide.chunk(4, -1)[1:3]]


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _trips(keys: int, block: int) -> list[int]:
    """Whole tiles, and tiles of 16 for the rest."""
    return [keys // block, -(-(keys % block) // 16)]


def _columns(trips: list[int], block: int) -> int:
    return block * trips[0] + 16 * trips[1]


def build_grca(cell: Cell, capability: int) -> tuple[Compiled, dict[str, Any], Trips, int]:
    """(kernel, launch settings, trips of its loops, columns of scores) of a row that sees every picture.

    The call is the runtime's, as grca_inputs makes it: offsets, visibility, ranges and null blocks always.
    """
    dtype, blocks = DTYPES[cell.dtype], group_bounds(cell)[-1]
    q = _empty(cell.rows, cell.queries, cell.heads, cell.width, dtype=dtype)
    text, refs = _views(cell, cell.rows, cell.text), _views(cell, 1, blocks * TOKENS)
    arguments, divisor = grca.arguments(
        q, *text, *refs, _empty(cell.groups, dtype=torch.float32), _empty(cell.groups + 1, dtype=torch.int32),
        _empty(cell.rows, blocks, dtype=torch.bool), _empty(cell.rows, cell.groups, 4, dtype=torch.int32),
        _empty(1, cell.groups, cell.queries, dtype=torch.float32) if cell.masked else None, q,
    )  # fmt: skip
    launch = grca.settings(capability, 8 * dtype.itemsize, cell.width, cell.queries, cell.groups)
    slots = grca.slots(cell.groups, dtype, launch["BLOCK_N"])
    fixed = grca.constants(cell.width, TOKENS, dtype, divisor, slots)
    built = compile_for(capability, grca.grca_kernel, arguments, fixed | launch)
    block, per_group = launch["BLOCK_N"], -(-cell.references * TOKENS // cell.groups)
    text, group = _trips(cell.text, block), _trips(per_group, block)
    columns, group_columns = _columns(text, block), _columns(group, block)
    if slots == 0:
        return built, launch, [*text, (cell.groups, group)], columns + cell.groups * group_columns
    tiles = -(-cell.groups // slots)
    if per_group <= SLOT.value:
        return built, launch, [*text, tiles, (0, [0, 0])], columns + tiles * SLOT.value * slots
    return built, launch, [*text, 0, (cell.groups, group)], columns + cell.groups * group_columns


def build_banded(cell: Cell, capability: int) -> tuple[Compiled, dict[str, Any], Trips, int]:
    dtype = DTYPES[cell.dtype]
    q = _empty(cell.rows, cell.queries, cell.heads, cell.width, dtype=dtype)
    k = _empty(cell.rows, cell.text, cell.heads, cell.width, dtype=dtype)
    padding = _empty(cell.rows, cell.text, dtype=torch.bool) if cell.padded else None
    one_group = None if cell.self_attention else 0
    arguments, divisor = banded.arguments(
        q, k, k, cell.group_size, cell.window, 0, one_group, padding, cell.prefix, q
    )
    launch = banded.settings(capability, 8 * dtype.itemsize, cell.width, cell.queries)
    fixed = banded.constants(cell.width, not cell.self_attention, dtype, divisor)
    built = compile_for(capability, banded.banded_kernel, arguments, fixed | launch)
    band = round(cell.keys_read()) - cell.prefix
    if cell.self_attention:
        # The queries of a program reach further back than one query does.
        band = min(band + launch["BLOCK_M"], cell.text)
    block = launch["BLOCK_N"]
    prefix, history = _trips(cell.prefix, block), _trips(band, block)
    return built, launch, [*prefix, *history], _columns(prefix, block) + _columns(history, block)


def resources(cell: Cell, capability: int) -> dict[str, Any]:
    """What the compiler says of one cell's kernel."""
    built, launch, trips, columns = (build_grca if cell.operator == "grca" else build_banded)(
        cell, capability
    )
    codes, loops, skips = parse(built.sass())
    masked = _masked_share(cell, launch["BLOCK_M"], launch["BLOCK_N"])
    searched = cell.operator == "banded" or cell.references * TOKENS // cell.groups >= launch["BLOCK_N"]
    weight = weights(codes, loops, skips, trips, masked, searched)
    tiles = -(-cell.queries // launch["BLOCK_M"]) * cell.heads * cell.rows
    exps = sum(w for c, w in zip(codes, weight, strict=True) if c.startswith("MUFU.EX2"))
    return {
        "cell": cell.name,
        "capability": capability,
        "launch": {name: launch[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")},
        "registers": built.registers,
        "spilled_bytes": built.spilled_bytes,
        "shared_bytes": built.shared_bytes,
        "blocks_per_multiprocessor": built.blocks_per_multiprocessor,
        "matrix_instructions_in_ptx": built.matrix_instructions,
        "global_loads_by_bytes": {str(size): n for size, n in sorted(built.global_loads().items())},
        "instructions_per_warp": round(sum(weight)),
        "exponents_per_warp": round(exps),
        "score_columns_computed": columns,
        "programs": tiles,
    }


def predict(cell: Cell, chip: Chip) -> dict[str, Any]:
    """Microseconds that each unit of `chip` needs, and the largest next to the floor."""
    row = resources(cell, 90)
    launch, programs = row["launch"], row["programs"]
    waves = -(-programs // chip.multiprocessors)  # programs on the busiest multiprocessor
    warps = launch["num_warps"]
    first, second = grca.split(cell.width)
    flops = 4 * launch["BLOCK_M"] * row["score_columns_computed"] * (first + second)
    size = DTYPES[cell.dtype].itemsize
    through_l2 = programs * (2 * launch["BLOCK_M"] + 2 * cell.keys_read()) * cell.width * size
    memory = 2 * cell.rows * cell.queries * cell.heads * cell.width * size
    floor = cell.floor(chip.name)
    assert floor is not None
    units = {
        "issue": waves * row["instructions_per_warp"] * warps / 4 / chip.clock,
        "exponents": waves * row["exponents_per_warp"] * warps * 2 / chip.clock,
        "matrix": waves * flops / chip.matrix / chip.clock,
        "l2": through_l2 / chip.l2,
        "memory": memory / RATES[chip.name].bytes,
        "launch": RATES[chip.name].launch,
    }
    without_latency = max(units.values())
    if row["blocks_per_multiprocessor"] and cell.operator in DEPENDENT_LOADS:
        fillings = -(-programs // (chip.multiprocessors * row["blocks_per_multiprocessor"]))
        units["latency"] = fillings * DEPENDENT_LOADS[cell.operator] * LATENCY / chip.clock
    bound = max(units, key=lambda unit: units[unit])
    return row | {
        "without_latency_us": round(1e6 * without_latency, 2),
        "units_us": {unit: round(1e6 * seconds, 2) for unit, seconds in units.items()},
        "bound_by": bound,
        "predicted_us": round(1e6 * units[bound], 2),
        "floor_us": round(1e6 * floor, 2),
        "floor_over_predicted": round(floor / units[bound], 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of predict()'s rows."""
    head = [
        "cell",
        "predicted, us",
        "without latency, us",
        "bound by",
        "floor, us",
        "floor / predicted",
        "registers",
        "blocks per SM",
    ]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    names = (
        "cell",
        "predicted_us",
        "without_latency_us",
        "bound_by",
        "floor_us",
        "floor_over_predicted",
        "registers",
        "blocks_per_multiprocessor",
    )
    lines += [" | ".join(str(row[name]) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write bench/results/predicted.json")
    parser.add_argument(
        "--all", action="store_true", help="with the registers and spills of the other architectures"
    )
    options = parser.parse_args()
    cells = [cell for cell in gpu_matrix() if cell.dtype == "fp16"]
    rows = [predict(cell, H100) for cell in cells]
    print(table(rows), flush=True)
    head = {
        "kind": "predicted from compiled code, not measured on any GPU",
        "chip": vars(H100) | {"rates": vars(RATES["H100"])},
        "triton": triton.__version__,
        "date": results.environment("cpu")["date"],
        "rows": rows,
    }
    if options.all:
        others = [c for c in ARCHITECTURES if c != 90]
        head["other_architectures"] = [resources(cell, c) for c in others for cell in cells if cell.rows == 2]
    if options.save:
        results.FOLDER.mkdir(exist_ok=True)
        (results.FOLDER / "predicted.json").write_text(json.dumps(head, indent=1) + "\n")


if __name__ == "__main__":
    main()
