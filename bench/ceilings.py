"""What the device can do at most: `python bench/ceilings.py --out OUT`.

copy: bytes read and written a second, of a large tensor. matmul: operations a second of a square product. launch: seconds
of a small kernel among many in a CUDA graph, and of one that Python launches.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from report import Report, arguments
from timing import capture, time_one

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def copy(device: str, mebibytes: int) -> dict[str, Any]:
    """Terabytes a second, read and written, of a device copy."""
    source = torch.zeros(mebibytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_one(lambda: target.copy_(source), device)
    return {"us": times, "tb_s": round(2 * source.numel() / times["p50"] / 1e6, 3)}


def matmul(device: str, side: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tera-operations a second of a product of two matrices of side x side random numbers."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = time_one(lambda: torch.mm(left, right, out=out), device)
    return {"us": times, "tflop_s": round(2 * side**3 / times["p50"] / 1e6, 2)}


def launch(device: str, count: int) -> dict[str, Any]:
    """Microseconds of a kernel that adds one number: called by Python, and in a CUDA graph."""
    number = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(count):
            number.add_(1)

    found: dict[str, Any] = {"called_us": round(time_one(many, device)["p50"] / count, 3)}
    if device == "cuda":
        found["in_a_graph_us"] = round(time_one(capture([many]), device)["p50"] / count, 3)
    return found


@torch.inference_mode()
def main() -> int:
    """Writes ceilings.jsonl."""
    options = arguments(__doc__, minutes=1).parse_args()
    report = Report("ceilings", options)
    mebibytes, side = (2048, 8192) if report.gpu else (16, 128)
    for kind, dtype in TYPES.items():
        cell = {"what": "matmul", "side": side, "dtype": kind}
        report.cell(cell, lambda dtype=dtype: matmul(report.device, side, dtype))  # type: ignore[misc]
    report.cell({"what": "copy", "mebibytes": mebibytes}, lambda: copy(report.device, mebibytes))
    report.cell({"what": "launch", "kernels": 1000}, lambda: launch(report.device, 1000))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
