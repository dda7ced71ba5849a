"""The attention backends: what each needs, which calls it takes, what it runs, and which one a device gets.

A backend is one `register` call. `auto` takes Triton on CUDA devices of compute capability 8.0 and above and PyTorch's
attention elsewhere; FASTORY_KERNELS names another default, and `backend=` of an operator one for that call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VARIABLE = "FASTORY_KERNELS"
AUTO = "auto"
OLDEST_CAPABILITY = (8, 0)

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to compute the operators.

    why_not: the reason why it cannot run on a device, or None. takes: whether it computes a call with this query. run: by
    operator, "grca" and "banded_causal_attention", a function of the operator's own arguments but `backend`, and but
    ref_ranges where it does not say that it reads them: the flags say the same.
    """

    name: str
    why_not: Callable[[torch.device], str | None]
    takes: Callable[[Tensor], bool]
    run: Mapping[str, Run]
    reads_ranges: bool = False


BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend, or replace the one of its name; devices are chosen for anew."""
    BACKENDS[backend.name] = backend
    choose.cache_clear()
    requested.cache_clear()


@dataclass(frozen=True)
class Choice:
    """What runs on `device` ("cpu", "cuda:0"), the reason, and why each other backend does not."""

    device: str
    implementation: str
    reason: str
    others: dict[str, str]


@functools.cache
def requested() -> str:
    """The value of FASTORY_KERNELS, "auto" where it is not set. Raises ValueError for any other name."""
    name = os.environ.get(VARIABLE, "").strip().lower() or AUTO
    if name != AUTO and name not in BACKENDS:
        from fastory import plugins  # asked for what only others can have brought

        plugins.load()
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"{VARIABLE}: wanted one of {', '.join((AUTO, *BACKENDS))}, got {name!r}")
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
        return "xformers is not installed (pip install 'fastory[xformers]')"
    return None if device.type == "cuda" else f"xformers runs on CUDA devices, this is {device.type}"


@functools.cache
def choose(device: torch.device) -> Choice:
    """The backend for tensors on `device`.

    Raises RuntimeError where FASTORY_KERNELS asks for one that cannot run there. Warns, once
    per device, where `auto` has to leave Triton on a CUDA device.
    """
    wanted, refusals = requested(), {name: backend.why_not(device) for name, backend in BACKENDS.items()}
    if wanted != AUTO:
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
    others = {other: refusals[other] or f"not chosen ({reason})" for other in BACKENDS if other != name}
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


def anything(q: Tensor) -> bool:
    """Every query, of any width and type."""
    return True


def pick(q: Tensor, name: str | None = None) -> Backend:
    """The backend that computes this call: `name`, else the device's, or "sdpa" for what that does not take.

    Raises ValueError for an unknown name and for a call that the named backend does not take, RuntimeError where it cannot
    run on the query's device.
    """
    if name is None:
        chosen = BACKENDS[choose(q.device).implementation]
        return chosen if chosen.takes(q) else BACKENDS["sdpa"]
    if name not in BACKENDS:
        raise ValueError(f"backend: wanted one of {', '.join(BACKENDS)}, got {name!r}")
    backend = BACKENDS[name]
    if (refusal := backend.why_not(q.device)) is not None:
        raise RuntimeError(f"backend {name} cannot run on {q.device}: {refusal}")
    if not backend.takes(q):
        raise ValueError(f"backend {name} does not take a query of {tuple(q.shape)} in {q.dtype}")
    return backend


def _late(module: str, function: str, **options: Any) -> Run:
    """`function` of a module under fastory.kernels, imported when it is first called: Triton takes long to import."""

    found = functools.cache(lambda: getattr(importlib.import_module(f"fastory.kernels.{module}"), function))

    def run(*arguments: Any, **keywords: Any) -> Tensor:
        return found()(*arguments, **keywords, **options).contiguous()

    return run


def _attention(name: str) -> Run:
    """One softmax attention of attend.py, imported when it is first called."""
    found = functools.cache(lambda: getattr(importlib.import_module("fastory.kernels.attend"), name))
    return lambda *arguments: found()(*arguments)


def _composed(attend: str) -> dict[str, Run]:
    """The operators as compositions of one softmax attention."""
    return {
        "grca": _late("grca.composed", "grca_composed", attend=_attention(attend)),
        "banded_causal_attention": _late("banded.composed", "banded_composed", attend=_attention(attend)),
    }


register(
    Backend(
        "reference",
        why_not=lambda device: None,
        takes=anything,
        run={
            "grca": _late("grca.reference", "grca_reference"),
            "banded_causal_attention": _late("banded.reference", "banded_causal_attention_reference"),
        },
    )
)
register(Backend("sdpa", why_not=lambda device: None, takes=anything, run=_composed("sdpa")))
register(Backend("xformers", why_not=_why_not_xformers, takes=anything, run=_composed("xformers")))
register(
    Backend(
        "triton",
        why_not=_why_not_triton,
        takes=runs_in_triton,
        run={
            "grca": _late("grca.triton", "grca_triton"),
            "banded_causal_attention": _late("banded.triton", "banded_triton"),
        },
        reads_ranges=True,
    )
)
