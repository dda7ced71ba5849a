"""Which implementation of the operators runs on a device, and why not another.

FASTORY_KERNELS=reference|sdpa|xformers|triton|auto forces a choice; it is read once per process. `auto` takes
Triton on CUDA devices of compute capability 8.0 and above and PyTorch's attention elsewhere.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from dataclasses import dataclass

import torch

VARIABLE = "FASTORY_KERNELS"
NAMES = ("auto", "reference", "sdpa", "xformers", "triton")
OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Choice:
    """What runs on `device` ("cpu", "cuda:0"), the reason, and why each other implementation does not."""

    device: str
    implementation: str
    reason: str
    others: dict[str, str]


@functools.cache
def requested() -> str:
    """The value of FASTORY_KERNELS, "auto" where it is not set. Raises ValueError for any other name."""
    name = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if name not in NAMES:
        raise ValueError(f"{VARIABLE}: wanted one of {', '.join(NAMES)}, got {name!r}")
    return name


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU (TRITON_INTERPRET=1 before Triton is imported)."""
    return importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; wheels exist for Linux)"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"Triton compiles for CUDA devices, this is {device.type}"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA, and the kernels are compiled for NVIDIA devices only"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        wanted = ".".join(map(str, OLDEST_CAPABILITY))
        return f"wanted compute capability {wanted} or above, got {capability[0]}.{capability[1]}"
    return None


def _why_not_xformers(device: torch.device) -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install fastory[xformers])"
    return None if device.type == "cuda" else f"xformers runs on CUDA devices, this is {device.type}"


def _why_not(name: str, device: torch.device) -> str | None:
    if name == "triton":
        return _why_not_triton(device)
    return _why_not_xformers(device) if name == "xformers" else None


@functools.cache
def choose(device: torch.device) -> Choice:
    """The implementation for tensors on `device`.

    Raises RuntimeError where FASTORY_KERNELS asks for one that cannot run there. Warns, once
    per device, where `auto` has to leave Triton on a CUDA device.
    """
    wanted, refusals = requested(), {name: _why_not(name, device) for name in NAMES[1:]}
    if wanted != "auto":
        if refusals[wanted] is not None:
            raise RuntimeError(f"{VARIABLE}={wanted} cannot run on {device}: {refusals[wanted]}")
        name, reason = wanted, f"{VARIABLE}={wanted}"
    elif device.type == "cuda" and refusals["triton"] is None:
        name, reason = "triton", "the default on CUDA devices"
    else:
        name, reason = "sdpa", f"the default on {device.type} devices"
        if device.type == "cuda":
            reason = f"fallback: {refusals['triton']}"
            warnings.warn(f"the Triton kernels do not run on {device}: {refusals['triton']}", stacklevel=2)
    others = {other: refusals[other] or f"not chosen ({reason})" for other in NAMES[1:] if other != name}
    return Choice(str(device), name, reason, others)


def describe() -> list[Choice]:
    """One Choice for the CPU and one for each CUDA device of this process, for `fastory doctor`.

    Raises ValueError for a bad FASTORY_KERNELS. A device on which the forced choice cannot run is listed with
    implementation "none" and the reason instead of raising.
    """
    requested()
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    choices = []
    for device in map(torch.device, devices):
        try:
            choices.append(choose(device))
        except RuntimeError as error:
            choices.append(Choice(str(device), "none", str(error), {}))
    return choices


def runs_in_triton(q: torch.Tensor) -> bool:
    """Whether the Triton kernels take this query (..., d): d a multiple of 8, up to 256 (float32: up to 160).

    Wider heads in float32 do not fit the registers: the compiled kernel would spill.
    """
    widest = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 160}
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= widest.get(q.dtype, 0)


def pick(q: torch.Tensor) -> str:
    """The implementation that computes this call: the device's, or "sdpa" for what Triton does not take."""
    name = choose(q.device).implementation
    return "sdpa" if name == "triton" and not runs_in_triton(q) else name
