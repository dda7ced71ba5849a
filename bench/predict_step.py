"""Predicted time of a whole UNet call, eager and with compiled blocks, where there is no GPU: `python bench/predict_step.py`.

A prediction, never a measurement. The call of a full-size UNet is traced on the meta device: what each operator reads and
writes, and its floating-point operations. It takes the longest of its bytes at the memory's rate, its operations at a share of
the matrix units' rate, and the shortest kernel in a CUDA graph; grca takes what predict.py says of its machine code. A call is
the sum: nothing overlaps, the host is not waited for (graphs are on).

eager     an operator is a kernel; a convolution in nchw has three further passes, two for its layouts and one for its bias
compiled  channels_last, so no passes for layouts; between products, convolutions and attention a block's operators are one
          kernel, which reads what comes from outside and writes what goes there, and a group norm's input once more
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import results
import torch
from cells import RATES
from random_models import random_model
from step import loaded
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastory import StoryModel
from fastory.processors.compiled import regions_of
from fastory.runtime import Placement

RATE = RATES["H100"]
MATRIX = 750e12  # operations a second, as in predict.py
# Shares of it that are assumed: matrix products of these shapes, convolutions, self-attention.
SHARES = {"linear": 0.8, "convolution": 0.65, "attention": 0.45}
LINEAR, CONVOLUTION = ("mm", "addmm", "bmm", "baddbmm"), ("convolution",)
NO_KERNEL = ("empty", "empty_like", "new_empty", "_unsafe_view", "_reshape_alias", "detach", "lift_fresh")


@dataclass
class Kernel:
    """A launch. kind: linear, convolution, attention, grca or other. block: of the compiled region it is in, None outside.

    read, written: bytes by tensor. seconds: where they are known otherwise.
    """

    name: str
    kind: str
    read: dict[int, int]
    written: dict[int, int]
    operations: float = 0.0
    block: int | None = None
    seconds: float | None = None

    @property
    def bytes(self) -> int:
        """That pass."""
        return sum(self.read.values()) + sum(self.written.values())


@dataclass
class Trace(TorchDispatchMode):
    """The kernels of what runs within it, in order. Every tensor is kept, so that none has another's number."""

    grca: Callable[[Tensor], float]
    kernels: list[Kernel] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    block: int | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def number(self, tensor: Tensor) -> int:
        """Of a tensor's memory: views have the same."""
        return tensor.untyped_storage()._cdata

    def note(self, name: str, kind: str, inputs: Any, outputs: Any, operations: float = 0.0) -> Kernel:
        tensors = [(x for x in tree_leaves(side) if isinstance(x, Tensor)) for side in (inputs, outputs)]
        sides = []
        for side in tensors:
            held = list(side)
            self.kept += held
            sides.append({self.number(x): x.numel() * x.element_size() for x in held})
        kernel = Kernel(name, kind, sides[0], sides[1], operations, self.block)
        self.kernels.append(kernel)
        return kernel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = any(
            value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns
        )
        if views or name in NO_KERNEL or func.namespace == "prim":
            return made
        kind, operations = "other", 0.0
        if name in LINEAR:
            kind, left = "linear", args[-2]
            operations = 2.0 * left.numel() * made.shape[-1]
        elif name in CONVOLUTION:
            kind, weight = "convolution", args[1]
            operations = 2.0 * made.numel() * weight[0].numel()
        kernel = self.note(name, "grca" if name == "grca" else kind, args, made, operations)
        if name == "grca":
            kernel.seconds = self.grca(args[0])
        return made


class OneAttention(TorchFunctionMode):
    """Self-attention is one kernel, which torch takes apart on the meta device."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key = args[:2]
        rows, heads, length, width = query.shape
        with torch.utils._python_dispatch._disable_current_modes():
            made = query.new_empty(rows, length, heads, width).transpose(1, 2)
        self.trace.note("attention", "attention", args[:3], made, 4.0 * query.numel() * key.shape[2])
        return made


def grca_seconds() -> Callable[[Tensor], float]:
    """Of a call with this query, by the cells of results/predicted.json with 80 keys of references, in which B = 2."""
    rows = json.loads((results.FOLDER / "predicted.json").read_text())["rows"]
    known = {}
    for row in rows:
        if found := re.fullmatch(r"grca \S+ 2x(\d+)x(\d+)x(\d+) fp16 77\+80", row["cell"]):
            known[tuple(map(int, found.groups()))] = row["predicted_us"] / 1e6

    def seconds(query: Tensor) -> float:
        count, length, heads, width = query.shape
        return max(known.get((length, width, heads), 0.0) * count / 2, RATE.launch)

    return seconds


@contextmanager
def by_block(model: StoryModel, trace: Trace) -> Iterator[None]:
    """Within it, kernels know the block that launches them."""
    handles = []
    for n, region in enumerate(regions_of(model.unet)):
        handles.append(region.block.register_forward_pre_hook(lambda *_, n=n: setattr(trace, "block", n)))
        handles.append(region.block.register_forward_hook(lambda *_: setattr(trace, "block", None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def traced(name: str, frames: int) -> list[Kernel]:
    """The kernels of an eager UNet call of `frames` frames under guidance, each with 8 references or more."""
    model = random_model(name, Placement(torch.device("meta"), torch.float16, 1))
    sampler, _ = loaded(model, frames, 1)
    trace = Trace(grca_seconds())
    assert sampler.inputs is not None
    with by_block(model, trace), OneAttention(trace), trace:
        model.unet(
            sampler.inputs.latents.clone(),
            sampler.inputs.timestep.clone(),
            encoder_hidden_states=None,
            added_cond_kwargs=sampler.inputs.added,
            cross_attention_kwargs={"context": sampler.inputs.context},
        )
    return trace.kernels


def seconds(kernel: Kernel) -> float:
    """Of one kernel by itself."""
    if kernel.seconds is not None:
        return kernel.seconds
    by_matrix = kernel.operations / MATRIX / SHARES.get(kernel.kind, 1.0)
    return max(kernel.bytes / RATE.bytes, by_matrix, RATE.launch)


def eager(kernels: list[Kernel]) -> dict[str, float]:
    """Seconds by kind, in the layout nchw."""
    found = dict.fromkeys((*SHARES, "grca", "other"), 0.0)
    for kernel in kernels:
        found[kernel.kind] += seconds(kernel)
        if kernel.name == "native_group_norm":  # two kernels: its mean and variance come before its values
            found["other"] += max(max(kernel.read.values()) / RATE.bytes, RATE.launch)
        if kernel.kind == "convolution":
            activations = [max(side.values()) for side in (kernel.read, kernel.written)]
            passes = (2 * activations[0], 2 * activations[1], 2 * activations[1])
            found["other"] += sum(max(size / RATE.bytes, RATE.launch) for size in passes)
    return found


def fused(kernels: list[Kernel]) -> list[Kernel]:
    """With what a block launches between its products, convolutions and attention as one kernel."""
    readers: dict[int, list[int]] = {}
    for n, kernel in enumerate(kernels):
        for tensor in kernel.read:
            readers.setdefault(tensor, []).append(n)
    groups: list[list[int]] = []
    for n, kernel in enumerate(kernels):
        joins = kernel.kind == "other" and kernel.block is not None
        before = kernels[groups[-1][-1]] if groups else None
        if joins and before and before.kind == "other" and before.block == kernel.block:
            groups[-1].append(n)
        else:
            groups.append([n])
    found = []
    for group in groups:
        if len(group) == 1:
            found.append(kernels[group[0]])
            continue
        parts = [kernels[n] for n in group]
        made = {tensor: size for part in parts for tensor, size in part.written.items()}
        read = {tensor: size for part in parts for tensor, size in part.read.items() if tensor not in made}
        written = {
            tensor: size
            for tensor, size in made.items()
            if tensor in parts[-1].written or any(n > group[-1] for n in readers.get(tensor, []))
        }
        for part in parts:  # its mean and variance come before its values
            if part.name == "native_group_norm":
                read[-1] = read.get(-1, 0) + max(part.read.values())
        found.append(Kernel("fused", "other", read, written, block=parts[0].block))
    return found


def compiled(kernels: list[Kernel]) -> dict[str, float]:
    """Seconds by kind with compiled blocks, channels_last."""
    found = dict.fromkeys((*SHARES, "grca", "other"), 0.0)
    for kernel in fused(kernels):
        found[kernel.kind] += seconds(kernel)
    return found


def predict(name: str, frames: int) -> dict[str, Any]:
    """Milliseconds of a call before and after, by kind, and launches."""
    kernels = traced(name, frames)
    before, after = eager(kernels), compiled(kernels)
    return {
        "model": name,
        "frames": frames,
        "teraflop": round(sum(kernel.operations for kernel in kernels) / 1e12, 2),
        "launches": [len(kernels), len(fused(kernels))],
        "eager_ms": {kind: round(1e3 * value, 2) for kind, value in before.items()},
        "compiled_ms": {kind: round(1e3 * value, 2) for kind, value in after.items()},
        "eager_total_ms": round(1e3 * sum(before.values()), 2),
        "compiled_total_ms": round(1e3 * sum(after.values()), 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of predict()'s rows."""
    kinds = list(rows[0]["eager_ms"])
    names = ["model, frames", "TFLOP", *kinds, "call, ms", "frame-steps/s", "launches"]
    lines = [" | ".join(names), "|".join(["---"] * len(names))]
    for row in rows:
        for n, way in enumerate(("eager", "compiled")):
            total = row[f"{way}_total_ms"]
            parts = [f"{row['model']}, {row['frames']}, {way}", row["teraflop"]]
            parts += [row[f"{way}_ms"][kind] for kind in kinds]
            parts += [total, round(1e3 * row["frames"] / total, 1), row["launches"][n]]
            lines.append(" | ".join(map(str, parts)))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Prints the table, and writes results/predicted-step.json with --save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write bench/results/predicted-step.json")
    options = parser.parse_args()
    rows = [predict(name, frames) for name in ("sd15", "sdxl") for frames in (1, 8)]
    print(table(rows), flush=True)
    if options.save:
        head = {
            "kind": "predicted from a trace on the meta device, not measured on any GPU",
            "rates": {"matrix": MATRIX, "shares": SHARES, "bytes": RATE.bytes, "launch": RATE.launch},
            "date": results.environment("cpu")["date"],
            "torch": torch.__version__,
            "rows": rows,
        }
        (results.FOLDER / "predicted-step.json").write_text(json.dumps(head, indent=1) + "\n")


if __name__ == "__main__":
    main()
