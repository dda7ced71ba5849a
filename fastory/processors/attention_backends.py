"""PyTorch's backends of self-attention, called by name, and which of them was the quickest for a shape.

scaled_dot_product_attention takes the first backend of a fixed order that can compute a shape, which need not be the quickest.
Its switches (torch.nn.attention.sdpa_kernel) belong to the whole process, in which a picture's CLIP encoder attends beside the
steps: a layer here calls the operator of its backend, and the switches only say, before any step, which backends take a shape.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

aten = torch.ops.aten


def _flash_cpu(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values)[0]


def _math(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return aten._scaled_dot_product_attention_math(query, keys, values)[0]


def _flash(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return aten._scaled_dot_product_flash_attention(query, keys, values)[0]


def _cudnn(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return aten._scaled_dot_product_cudnn_attention(query, keys, values, None, False)[0]


def _efficient(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return aten._scaled_dot_product_efficient_attention(query, keys, values, None, False)[0]


@dataclass(frozen=True)
class Backend:
    """switch: PyTorch's name of it. attend: query, keys, values (B, H, L, d) -> (B, H, L, d).

    most_scores: how many scores, B H L L, it is tried with; None for any number.
    """

    switch: SDPBackend
    attend: Attend
    most_scores: int | None = None


# By the type of the device. The first one stays where no other is clearly quicker.
BACKENDS: Mapping[str, Mapping[str, Backend]] = {
    "cuda": {
        "flash": Backend(SDPBackend.FLASH_ATTENTION, _flash),
        "cudnn": Backend(SDPBackend.CUDNN_ATTENTION, _cudnn),
        "efficient": Backend(SDPBackend.EFFICIENT_ATTENTION, _efficient),
    },
    "cpu": {
        "flash": Backend(SDPBackend.FLASH_ATTENTION, _flash_cpu),
        "math": Backend(SDPBackend.MATH, _math, most_scores=2**26),  # it holds them all, in float32: 256 MiB
    },
}
# A backend is taken for the first one's place where it needs less than this share of its time: two that are as quick stay in
# PyTorch's order, whatever a clock says of them.
CLEARLY = 0.97
SAMPLES, CALLS = 9, 10


@dataclass(frozen=True, order=True)
class Shape:
    """Self-attention of a layer: L tokens, H heads of d channels."""

    tokens: int
    heads: int
    width: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.heads}x{self.width}"


def level_of(unet: Any, name: str) -> int:
    """How often the latents' sides were halved where a UNet has the layer of this name."""
    deepest = len(unet.config.block_out_channels) - 1
    block = re.match(r"(down|up)_blocks\.(\d+)\.", name)
    if block is None:  # the middle block is the deepest
        return deepest
    return int(block[2]) if block[1] == "down" else deepest - int(block[2])


def self_attention_of(unet: Any) -> dict[str, tuple[Attention, int]]:
    """By its name each self-attention layer of a UNet, and how often the latents' sides were halved there."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {
        name: (unet.get_submodule(name), level_of(unet, name)) for name in names if name.endswith("attn1")
    }


def shapes_of(unet: Any, width: int, height: int) -> dict[str, Shape]:
    """The shape of each self-attention layer for latents of this size."""
    return {
        name: Shape(-(-width // 2**level) * -(-height // 2**level), attn.heads, attn.inner_dim // attn.heads)
        for name, (attn, level) in self_attention_of(unet).items()
    }


def use_backends(unet: Any, chosen: Mapping[str, str], width: int, height: int) -> None:
    """Let each self-attention layer be computed by the backend that `chosen` has for its shape, where it has one."""
    for name, shape in shapes_of(unet, width, height).items():
        unet.get_submodule(name).processor.backend = chosen.get(str(shape))


def quickest(seconds: Mapping[str, float]) -> str:
    """The backend to take, of those that were timed, in PyTorch's order."""
    first, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < CLEARLY * seconds[first] else first


@torch.inference_mode()
def time_backends(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a call of `rows` rows by each backend that takes this shape, in turn, the median of SAMPLES.

    On CUDA by events around CALLS calls that are captured in a graph, so that the host's time is no part of it.
    """
    options: Any = {"device": device, "dtype": dtype}
    # As a fused projection gives them: one tensor, of which each is a third.
    tensors = torch.randn(rows, shape.tokens, 3 * shape.heads * shape.width, **options).chunk(3, -1)
    inputs = [tensor.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for tensor in tensors]
    backends = BACKENDS[device.type].items()
    ready = {name: _ready(backend, inputs) for name, backend in backends if _takes(backend, inputs)}
    calls = {name: call for name, call in ready.items() if call is not None}
    samples = [{name: call() for name, call in calls.items()} for _ in range(SAMPLES)]
    return {name: statistics.median(sample[name] for sample in samples) for name in calls}


def _takes(backend: Backend, inputs: Sequence[Tensor]) -> bool:
    """Whether PyTorch would compute this by the backend, and its operator alone gives the same."""
    query, keys, values = inputs
    rows, heads, tokens, width = query.shape
    if backend.most_scores is not None and rows * heads * tokens**2 > backend.most_scores:
        return False
    if width % 8:  # which scaled_dot_product_attention pads
        return False
    try:
        with sdpa_kernel(backend.switch):
            wanted = scaled_dot_product_attention(query, keys, values)
    except RuntimeError:  # no kernel of this backend for the shape, the type or the device
        return False
    return torch.allclose(wanted, backend.attend(query, keys, values), rtol=0.0, atol=0.01)


def _ready(backend: Backend, inputs: Sequence[Tensor]) -> Callable[[], float] | None:
    """What gives the seconds of a call each time it is called; None for one that CUDA cannot capture."""
    device, call = inputs[0].device, partial(backend.attend, *inputs)
    if device.type != "cuda":
        return partial(_seconds_on_cpu, call)
    with torch.cuda.device(device):
        aside, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            call()
        torch.cuda.current_stream(device).wait_stream(aside)
        try:
            with torch.cuda.graph(graph, stream=aside):
                for _ in range(CALLS):
                    call()
        except RuntimeError:
            return None
        graph.replay()
    return partial(_seconds_on_cuda, graph, device)


def _seconds_on_cpu(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - before) / CALLS


def _seconds_on_cuda(graph: torch.cuda.CUDAGraph, device: torch.device) -> float:
    stream = torch.cuda.current_stream(device)
    start = stream.record_event(torch.cuda.Event(enable_timing=True))
    graph.replay()
    end = stream.record_event(torch.cuda.Event(enable_timing=True))
    end.synchronize()
    return start.elapsed_time(end) / 1000 / CALLS
