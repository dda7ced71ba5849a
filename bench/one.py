"""One call of one kernel, for a profiler: `ncu -k regex:grca_kernel -c 1 python bench/one.py`. The call is the runtime's.

Without a CUDA device it computes the call on the CPU, which shows that the cell exists and nothing else.
"""

from __future__ import annotations

import argparse
import sys

import torch
from cells import Cell, gpu_matrix
from measure import inputs_of, ours

DEFAULT = "grca SDXL 2x4096x64x10 fp16 77+80"


@torch.inference_mode()
def main() -> int:
    """Runs the call once to compile it, and `--calls` times more."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cells: dict[str, Cell] = {cell.name: cell for cell in gpu_matrix()}
    named = parser.add_argument("name", nargs="?", default=DEFAULT, help=f"of a cell; default: {DEFAULT}")
    named.choices = list(cells)
    parser.add_argument("--calls", type=int, default=3)
    options = parser.parse_args()
    cell = cells[options.name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = ours(cell, inputs_of(cell, device))
    for _ in range(1 + options.calls):
        out = call()
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{cell.name}: {options.calls} calls on {device}, finite {bool(out.isfinite().all())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
