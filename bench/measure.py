"""Measures one cell: our operator and every peer that runs here, interleaved, with the error of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import peers
import torch
from cells import DTYPES, Cell, banded_inputs, grca_inputs
from timing import copies_for, time_cpu, time_cuda
from torch import Tensor

Inputs = dict[str, Any]


def inputs_of(cell: Cell, device: str, seed: int = 0) -> Inputs:
    return (grca_inputs if cell.operator == "grca" else banded_inputs)(cell, device, seed)


def ours(cell: Cell, inputs: Inputs) -> Callable[[], Tensor]:
    """A call of our operator as the runtime makes it."""
    from fastory.kernels.banded import banded_causal_attention
    from fastory.kernels.grca import grca

    operator: Callable[..., Tensor] = grca if cell.operator == "grca" else banded_causal_attention
    return lambda: operator(**inputs)


def oracle(cell: Cell, inputs: Inputs) -> Tensor:
    """The definition in float64."""
    from fastory.kernels.banded import banded_causal_attention_reference
    from fastory.kernels.grca import grca_reference

    reference = grca_reference if cell.operator == "grca" else banded_causal_attention_reference
    double = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    return reference(**double)


def _builders(cell: Cell) -> dict[str, Callable]:
    if cell.operator == "banded":
        return {"fastory": ours, **peers.BANDED}
    return {"fastory": ours, **peers.GRCA, **peers.WHOLE}


def _build(cell: Cell, inputs: Inputs) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """What runs here, and why the rest does not. A way counts as running after it has run once."""
    calls, absent = {}, {}
    for name, build in _builders(cell).items():
        try:
            call = build(cell, inputs)
            call()
            calls[name] = call
        except peers.Absent as reason:
            absent[name] = str(reason)
        except (RuntimeError, ImportError, NotImplementedError) as error:
            absent[name] = str(error).strip().splitlines()[0][:160]
    return calls, absent


def _errors(cell: Cell, inputs: Inputs, calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Largest difference from float64 of every way that computes the same numbers."""
    exact = oracle(cell, inputs)
    same = [name for name in calls if name not in peers.OTHER_NUMBERS]
    return {name: float((calls[name]().double() - exact).abs().max()) for name in same}


def _cold(cell: Cell, names: list[str]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Every way over copies of its inputs that together are more than the cache."""
    size = 2 * cell.rows * cell.queries * cell.heads * cell.width * DTYPES[cell.dtype].itemsize
    chains: dict[str, list] = {name: [] for name in names}
    for seed in range(min(copies_for(size), 64)):
        inputs = inputs_of(cell, "cuda", seed)
        for name in names:
            chains[name].append(_builders(cell)[name](cell, inputs))
    return time_cuda(chains)


def measure(cell: Cell, device: str, budget: float = 0.3) -> dict[str, Any]:
    """One row of the results: times, absent peers, errors, ratio to the best peer, fraction of the floor.

    Times are microseconds. On CUDA `hot` repeats one call twenty times in a graph, `cold` walks over copies of
    the inputs; ratios are taken from the cold medians. A ratio above 1 means that fastory is faster.
    """
    torch._dynamo.reset()  # compiled peers would run this cell with another one's dynamic graph, or eagerly
    inputs = inputs_of(cell, device)
    with torch.inference_mode():
        calls, absent = _build(cell, inputs)
        errors = _errors(cell, inputs, calls)
        if device == "cuda":
            hot, uncaptured = time_cuda({name: [call] * 20 for name, call in calls.items()})
            deciding, failed = _cold(cell, list(hot))
            absent |= uncaptured | failed
            if "fastory" in absent:
                raise RuntimeError(f"{cell.name}: {absent['fastory']}")
            times = {"cold": deciding, "hot": hot}
        else:
            deciding = time_cpu(calls, budget)
            times = {"hot": deciding}
    return {"cell": cell.as_json(), "times": times, "absent": absent, "errors": errors} | _verdict(
        cell, deciding, device
    )


def _verdict(cell: Cell, times: dict[str, dict[str, float]], device: str) -> dict[str, Any]:
    core = {name: t["p50"] for name, t in times.items() if name != "fastory" and name not in peers.WHOLE}
    best = min(core, key=lambda name: core[name])
    row: dict[str, Any] = {"best_peer": best, "ratio": round(core[best] / times["fastory"]["p50"], 3)}
    if "diffusers layer" in times and "fastory layer" in times:
        row["layer_ratio"] = round(times["diffusers layer"]["p50"] / times["fastory layer"]["p50"], 3)
    floor = cell.floor(torch.cuda.get_device_name()) if device == "cuda" else None
    if floor is not None:
        row |= {"floor": round(1e6 * floor, 2), "of_floor": round(1e6 * floor / times["fastory"]["p50"], 3)}
    return row


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
