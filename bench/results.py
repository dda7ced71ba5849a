"""The results as JSON: what was measured, on what, with which versions, when."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("results")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions, enough to repeat the measurement."""
    known = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "xformers": _version("xformers"),
    }
    if device == "cuda":
        return known | {
            "device": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return known | {
        "device": f"CPU, {_cpu()}, {torch.get_num_threads()} threads",
        "load": round(os.getloadavg()[0], 1),
    }


def slug(device: str) -> str:
    """The file's name: cpu, or the GPU's."""
    if device != "cuda":
        return "cpu"
    return torch.cuda.get_device_name().lower().replace("nvidia", "").strip().replace(" ", "-")


def write(rows: list[dict[str, Any]], device: str, kind: str = "kernels", note: str | None = None) -> Path:
    """Writes results/<kind>-<device>.json and returns its path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{kind}-{slug(device)}.json"
    head = {"kind": "measured", "environment": environment(device)} | ({"note": note} if note else {})
    path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    return path
