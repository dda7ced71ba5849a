"""Where and how a run computes: device, type, threads, and how many frames at once."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch

from fastory import settings, threads
from fastory.errors import InputError
from fastory.wording import counted

DTYPES = {name: getattr(torch, name) for name in settings.DTYPES}

Passed = TypeVar("Passed")

# Beyond these a larger micro-batch was slower (CPU: 2 cores, built-in model) or brings little more (CUDA).
MOST_FRAMES = {"cpu": 4, "cuda": 16}


@dataclass(frozen=True)
class Placement:
    """How a run computes, resolved once and stored in the manifest.

    threads: torch's, on the CPU (see fastory.threads). graphs: whether a UNet call is captured in a CUDA graph.
    compiled: whether the UNet's blocks are compiled, which a run decides (see fastory.runs.compiling). attention: the backend
    of self-attention by its shape, where that was measured (see fastory.runs.attending).
    """

    device: torch.device
    dtype: torch.dtype
    threads: int
    graphs: bool = False
    compiled: bool = False
    attention: tuple[tuple[str, str], ...] = ()

    @property
    def dtype_name(self) -> str:
        """float32, float16 or bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    def as_dict(self) -> dict[str, Any]:
        """As the manifest holds it, which says nothing of `compiled` and `attention` where nothing is."""
        said: dict[str, Any] = {
            "device": str(self.device),
            "dtype": self.dtype_name,
            "threads": self.threads,
            "graphs": self.graphs,
        }
        said |= {"compiled": True} if self.compiled else {}
        return said | ({"attention": dict(self.attention)} if self.attention else {})


def choose_placement(device: str = "auto", dtype: str = "auto", graphs: str = "auto") -> Placement:
    """Resolve `auto`: CUDA with float16 and graphs where there is one, else the CPU with float32.

    Raises InputError for a device that is not there and for other names.
    """
    settings.check_placement(device, dtype, graphs)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: PyTorch sees no CUDA device here; run `fastory doctor`, or use --device cpu"
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    if dtype == "auto":
        dtype = "float16" if resolved.type == "cuda" else "float32"
    captured = graphs == "auto" and resolved.type == "cuda"
    return Placement(resolved, DTYPES[dtype], threads.choose(torch.get_num_threads()), captured)


def under_threads(count: int, events: Generator[Passed, None, None]) -> Generator[Passed, None, None]:
    """Pass `events` on; they are made with `count` of torch's threads, and the caller keeps its own number.

    The number is set while `events` runs and given back before each of them is passed on: the caller's code, another such
    generator among it, never runs under ours.
    """
    try:
        while True:
            callers = torch.get_num_threads()
            _set_threads(count)
            try:
                event = next(events)
            except StopIteration:
                return
            finally:
                _set_threads(callers)
            yield event
    finally:
        events.close()


def _set_threads(count: int) -> None:
    if torch.get_num_threads() != count:  # setting it empties oneDNN's cache
        torch.set_num_threads(count)


def choose_batch(
    placement: Placement, needed: int, count: int, unit: str = "frame", taken: int | None = None
) -> tuple[int, str]:
    """How many of `count` fit in one micro-batch, and the line that says why.

    needed: bytes of one. unit: frame, or story. taken: the most that the model takes at once, None for any number.
    """
    free, most = free_bytes(placement.device), MOST_FRAMES[placement.device.type]
    if taken is not None:
        most = min(most, taken)
    size = fewest_rows(count, max(1, min(count, most, int(0.7 * free / needed))))
    reason = (
        f"{size} of {counted(count, unit)} at once: about {_size(needed)} each, {_size(free)} free on {placement.device}, "
        f"at most {most} there"
    )
    return size, reason


def fewest_rows(count: int, most: int) -> int:
    """The micro-batch of at most `most` that computes the fewest rows for `count`, the last one being filled up.

    100 with at most 16 take 10 times 10, not 7 times 16. Never less than half of `most`: a smaller one computes more slowly.
    """
    return min(range(most, (most - 1) // 2, -1), key=lambda size: -(-count // size) * size)


def frame_bytes(first_channels: int, dtype: torch.dtype, width: int, height: int, guided: bool) -> int:
    """A cautious estimate of what one more frame takes while it is denoised. width, height: of the latents.

    The widest moment is the last up block: the skips still held (about 6 tensors of the first level's size in SD1.5),
    the concatenated input, the convolution's result and its workspace, and GEGLU's 8-fold width: 32 in all.
    first_channels: of the UNet's first level.
    """
    return 32 * first_channels * width * height * (2 if guided else 1) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`, in bytes.

    What PyTorch has reserved and does not use is given back first: of what remains reserved, a captured graph's own
    memory looks unused and is not.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return psutil.virtual_memory().available


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's OutOfMemoryError, the CPU allocator's RuntimeError, and what they turn into on the way.

    accelerate's should_reduce_batch_size knows two of these signs, and takes a refusal of cuDNN for memory as well.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in (
            "can't allocate memory",
            "not enough memory",
            "bad allocation",
            "std::bad_alloc",
            "out of memory",
            "could not create a primitive",  # these three: what oneDNN makes of a failed allocation
            "could not execute a primitive",
            "could not create a memory",
        )
    )


def release_memory(device: torch.device) -> None:
    """Give back what a failed micro-batch leaves behind, so that a smaller one finds it."""
    gc.collect()  # the frames of the failed call hold its tensors, in cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)  # glibc keeps freed blocks of up to 32 MiB


def _size(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
