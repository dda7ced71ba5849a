"""`pytest bench/ --benchmark-only`: each cell against every peer, on the CPU small shapes, on CUDA the full matrix."""

from __future__ import annotations

from typing import Any

import compare
import pytest
import torch
from cells import Cell, cpu_matrix, gpu_matrix
from measure import inputs_of, measure, ours

CELLS = gpu_matrix() if torch.cuda.is_available() else cpu_matrix()


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_against_peers(
    cell: Cell, benchmark: Any, device: str, rows: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    """Our operator and its peers in turn; the benchmark's own table repeats ours alone."""
    if request.config.getoption("--compare"):
        pytest.skip("--compare measures two commits instead")
    row = measure(cell, device)
    rows.append(row)
    benchmark.extra_info.update({name: row[name] for name in ("best_peer", "ratio")})
    call = ours(cell, inputs_of(cell, device))
    with torch.inference_mode():
        benchmark.pedantic(call, rounds=5, iterations=5, warmup_rounds=1)
    best = row["errors"].get(row["best_peer"])
    if best is not None:
        # Twice the best peer's error and one rounding of a number of the results' size (they are averages of normals).
        allowed = 2 * best + 4 * torch.finfo(inputs_of(cell, device)["q"].dtype).eps
        assert row["errors"]["fastory"] <= allowed


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_two_commits(cell: Cell, benchmark: Any, device: str, request: pytest.FixtureRequest) -> None:
    """--compare REV: this tree and REV call by call, in two processes that take turns."""
    revision = request.config.getoption("--compare")
    if not revision:
        pytest.skip("no --compare REV")
    here, there = compare.side_by_side(cell, device, revision)
    benchmark.extra_info.update({"here": here, revision: there, "ratio": there["p50"] / here["p50"]})
    with torch.inference_mode():
        benchmark.pedantic(ours(cell, inputs_of(cell, device)), rounds=3, iterations=1)
    print(
        f"\n{cell.name}: here {here['p50']:.4g} us, {revision} {there['p50']:.4g} us, {there['p50'] / here['p50']:.3f}"
    )
