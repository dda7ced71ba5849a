"""A device of shapes alone: tensors on it have no values, tensors on the CPU are real and are computed.

What passes between the two is counted, and what is launched on the device. No CUDA build of torch is wanted. A copy to
the CPU gives zeros, and a value that is read is True, 0 or 1, so that code goes on from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastory.sampling import tail

DEVICE = torch.device("cuda:0")
MEMORY = 80 * 2**30  # bytes, as an H100's
# What a host waits for, beside copies. The first is Tensor.item.
READS = ("_local_scalar_dense", "nonzero", "equal", "_linalg_check_errors", "masked_select")
# These launch nothing, and their schemas do not call them views.
NO_LAUNCH = (
    "_unsafe_view",
    "_reshape_alias",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "is_same_size",
)


@dataclass
class Counted:
    """What one stretch of work asked: launches by the name of the operator, values read, copies from and to the host.

    blocking: copies that make the host wait. mixed: operators that met tensors of both sides.
    """

    launches: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    blocking: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)

    def __sub__(self, earlier: Counted) -> Counted:
        return Counted(**{name: mine - getattr(earlier, name) for name, mine in vars(self).items()})

    def copy(self) -> Counted:
        """As it is now."""
        return self - Counted()


class ShapesAlone(TorchDispatchMode):
    """Within it, `there` is a device of shapes: "cuda" with torch's fake tensors, or "meta", which is quicker."""

    def __init__(self, there: str = "meta") -> None:
        super().__init__()
        self.there = there
        self.fake = FakeTensorMode(allow_non_fake_inputs=True) if there == "cuda" else nullcontext()
        self.counted = Counted()
        self.captures: list[Counted] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if name in ("pin_memory", "_pin_memory"):
            return args[0].clone()
        devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)] + [x.device for x in tensors]
        if all(device.type != self.there for device in devices):
            return func(*args, **kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if name in ONE_LAUNCH:
            with self.fake:
                made = ONE_LAUNCH[name](*args, **kwargs)
            self.counted.launches[name] += made is not args[0]
            return made
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode such an operator comes whole, with its copies inside
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if name in READS:
            self.counted.reads[name] += 1
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 0
        if name in ("_to_copy", "copy_"):
            return self._copy(name, func, args, kwargs)
        if any(tensor.dim() and tensor.device.type != self.there for tensor in tensors):
            self.counted.mixed[name] += 1
        return self._launch(name, func, args, kwargs)

    def _launch(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        with self.fake:
            made = func(*args, **kwargs)
        views = [value.alias_info for value in func._schema.returns if value.alias_info is not None]
        if name not in NO_LAUNCH and not any(not info.is_write for info in views):
            self.counted.launches[name] += 1
        return made

    def _copy(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        source, there = args[1 if name == "copy_" else 0], kwargs.get("device") or args[0].device
        if source.device.type == torch.device(there).type:
            return self._launch(name, func, args, kwargs)
        way = "to the device" if source.device.type == "cpu" else "to the host"
        self.counted.copies[way] += 1
        if not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
            self.counted.blocking[way] += 1
        if source.device.type == "cpu":
            if self.there == "cuda":
                args = [self.fake.from_tensor(value.detach()) if value is source else value for value in args]
            with self.fake:
                return func(*args, **kwargs)
        if name == "copy_":
            return args[0].zero_()
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    rows, heads, length, _ = query.shape  # laid out as CUDA's kernels leave it: (B, L, H, d)
    return query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)


def _nearest(picture: Tensor, size: Any, *scales: Any) -> Tensor:
    height, width = size or [int(side * scales[0][0]) for side in picture.shape[2:]]
    return picture.new_empty(*picture.shape[:2], height, width)


def _dropout(value: Tensor, share: float, train: bool) -> Tensor:
    assert not train
    return value


def _filled(weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return weight


# Operators that are one launch on CUDA, or none, and that torch would take apart here; a weight's first values are none.
ONE_LAUNCH = {
    "scaled_dot_product_attention": _attention,
    "upsample_nearest2d": _nearest,
    "dropout": _dropout,
    "uniform_": _filled,
    "normal_": _filled,
}


OPERATORS = {Tensor.copy_: torch.ops.aten.copy_, Tensor.contiguous: torch.ops.aten.contiguous}


class _Bindings(TorchFunctionMode):
    """Copying into a tensor and indexing it ask for a CUDA build before they dispatch; their operators do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OPERATORS and args[0].is_cuda:
            return OPERATORS[func](*args, **kwargs)
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.__getitem__ and args[0].is_cuda:
            return _indexed(*args)
        if func is Tensor.__setitem__ and args[0].is_cuda:
            there, value = _indexed(*args[:2]), args[2]
            return (
                torch.ops.aten.copy_.default(there, value)
                if isinstance(value, Tensor)
                else there.fill_(value)
            )
        return func(*args, **kwargs)


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    """tensor[index] for integers, slices, None, ... and tensors of indices."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not any(part is ... for part in parts):
        parts.append(...)
    place = next(n for n, part in enumerate(parts) if part is ...)
    missing = tensor.dim() - sum(part is not None for part in parts) + 1
    dim, gathered = 0, list[Tensor | None]()
    for part in [*parts[:place], *[slice(None)] * missing, *parts[place + 1 :]]:
        if isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice) and part != slice(None):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
        gathered.append(part if isinstance(part, Tensor) else None)
        dim += 1
    if all(part is None for part in gathered):
        return tensor
    return torch.ops.aten.index.Tensor(tensor, gathered)


def _move(module: Module, convert: Any, recurse: bool = True) -> Module:
    """nn.Module._apply, which cannot swap a fake parameter that something else refers to."""
    for child in module.children():
        _move(child, convert)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = Parameter(convert(parameter.detach()), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


class _AtOnce(Executor):
    """Another thread would not see the device of shapes, which is a mode of this one."""

    def submit(self, work: Any, *arguments: Any, **values: Any) -> Future[Any]:  # type: ignore[override]
        made = Future[Any]()
        made.set_result(work(*arguments, **values))
        return made


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        """On the current stream."""

    def synchronize(self) -> None:
        """The host waits for a step that was enqueued before the last one: what a clock does."""

    def elapsed_time(self, later: _Event) -> float:
        return 1.0


class _Stream:
    def __init__(self, *arguments: Any) -> None:
        pass

    def record_event(self, event: _Event) -> _Event:
        return event

    def wait_stream(self, other: _Stream) -> None:
        """Order on the device alone."""

    def wait_event(self, event: _Event) -> None:
        """Order on the device alone."""

    def synchronize(self) -> None:
        """The thread beside the steps waits for its own stream."""


@contextmanager
def fake_cuda() -> Iterator[ShapesAlone]:
    """cuda:0 as a device of shapes, with streams, events, and graphs that count what is captured and are one launch."""
    mode = ShapesAlone("cuda")

    def replay() -> None:
        mode.counted.launches["graph"] += 1

    @contextmanager
    def graph(made: Any, pool: Any = None, stream: Any = None) -> Iterator[None]:
        before = mode.counted.copy()
        yield
        mode.captures.append(mode.counted - before)
        mode.counted = before  # what is captured does not run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Module, "_apply", _move)
        patch.setattr(tail, "beside", lambda device: _AtOnce())
        patch.setattr(fake_tensor, "init_gpu_context", lambda device=None: None)
        stand_ins = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_capability": lambda device=None: (9, 0),
            "mem_get_info": lambda device=None: (MEMORY, MEMORY),
            "empty_cache": lambda: None,
            "synchronize": lambda device=None: None,
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: 0,
            "max_memory_reserved": lambda: 0,
            "Event": _Event,
            "Stream": _Stream,
            "current_stream": _Stream,
            "stream": nullcontext,
            "device": nullcontext,
            "CUDAGraph": lambda: SimpleNamespace(replay=replay),
            "graph": graph,
            "graph_pool_handle": lambda: (0, 1),
        }
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        with _Bindings(), mode:
            yield mode
