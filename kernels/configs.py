"""Tile sizes per architecture, read from the JSON files beside a kernel."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

SIZES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")


@functools.cache
def _rules(folder: Path, capability: int) -> tuple[dict[str, Any], ...]:
    named = folder / f"sm_{capability}.json"
    files = [named] if named.exists() else []
    return tuple(
        rule for path in [*files, folder / "default.json"] for rule in json.loads(path.read_text())["rules"]
    )


@functools.cache
def lookup(
    folder: Path, capability: int, bits: int, width: int, queries: int, groups: int = 1
) -> dict[str, Any]:
    """The launch settings of the first rule that fits, the architecture's file before default.json.

    capability: 80, 89, 90, ...; bits: of the element type; width: the head's; queries: L; groups: of references. A rule
    may say bits, up_to_width, from_queries and from_groups; what it leaves out fits all. It may set maxnreg, the most registers
    of a thread, of which more blocks fit a multiprocessor. default.json has a rule for
    everything.
    """
    for rule in _rules(folder, capability):
        if (
            rule.get("bits", bits) == bits
            and width <= rule.get("up_to_width", width)
            and queries >= rule.get("from_queries", queries)
            and groups >= rule.get("from_groups", groups)
        ):
            # Triton 3.10 turns the fusion of multiply and add off unless asked; the exponents count on it.
            sizes = {name: rule[name] for name in (*SIZES, "maxnreg") if name in rule}
            return {**sizes, "PRECISION": rule.get("PRECISION", "ieee"), "enable_fp_fusion": True}
    raise LookupError(
        f"{folder}: no rule for {bits}-bit heads of {width}; default.json must have one for all"
    )


@functools.cache
def capability(device: torch.device) -> int:
    """80, 90, ... for a CUDA device; the oldest for any other, on which the interpreter runs."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
