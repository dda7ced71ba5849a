"""`fastory doctor`: what a bug report should hold. No path, no host name."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import typer

from fastory import __version__, packages
from fastory.cli.progress import show_json
from fastory.cli.reporting import quiet_libraries, reported, say, stdout_for_results
from fastory.errors import InputError

NEAREST = "auto"  # the cluster of RAY_ADDRESS, or of this machine
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "numpy",
    "safetensors",
    "pillow",
    "xformers",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "ray",
)


@dataclass(frozen=True)
class Machine:
    """What runs."""

    fastory: str
    python: str
    system: str
    machine: str


@dataclass(frozen=True)
class Package:
    """A package that matters here; version: None where it is not installed."""

    name: str
    version: str | None


@dataclass(frozen=True)
class KnownNotToWork:
    """Installed packages that are known not to work together, and what mends it."""

    message: str


@dataclass(frozen=True)
class Processor:
    """The CPU. threads: that a run would take now. free, total: bytes of memory."""

    cores: int | None
    threads: int
    free: int
    total: int


@dataclass(frozen=True)
class Cuda:
    """A CUDA device. capability: such as 9.0. free, total: bytes of its memory. cuda: the version PyTorch is built for."""

    device: str
    name: str
    capability: str
    free: int
    total: int
    cuda: str


@dataclass(frozen=True)
class NoCuda:
    """Why PyTorch sees no CUDA device."""

    reason: str


@dataclass(frozen=True)
class Kernels:
    """Which kernels run on a device and why; others: why not those."""

    device: str
    implementation: str
    reason: str
    others: Mapping[str, str]


@dataclass(frozen=True)
class Rank:
    """This process among those of torchrun; device: of --device auto."""

    rank: int
    processes: int
    device: str


@dataclass(frozen=True)
class BatchWorker:
    """A process that `fastory batch` would start. threads: None for PyTorch's own choice."""

    device: str
    threads: int | None


@dataclass(frozen=True)
class RayNode:
    """A machine of the Ray cluster. actors: that `fastory batch --ray` would have there, one a GPU or else one a CPU core."""

    number: int
    resources: Mapping[str, float]
    actors: int


@dataclass(frozen=True)
class NoRay:
    """Why there is no cluster."""

    reason: str


Finding = (
    Machine
    | Package
    | KnownNotToWork
    | Processor
    | Cuda
    | NoCuda
    | Kernels
    | Rank
    | BatchWorker
    | RayNode
    | NoRay
)


def doctor(
    json_lines: Annotated[bool, typer.Option("--json", help="Print findings as JSON lines.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:PORT]", help="Ask a Ray cluster, too: this one, RAY_ADDRESS, or this machine's."
        ),
    ] = None,
) -> None:
    """Print versions, devices, which kernels would run and why not others, and what would draw where, for a bug report."""
    with reported(), stdout_for_results():
        quiet_libraries()
        address = ray or (NEAREST if "RAY_ADDRESS" in os.environ else None)
        if json_lines:
            show_json(findings(address))
        else:
            say("\n".join(lines(findings(address))))


def findings(ray: str | None = None) -> Iterator[Finding]:
    """Versions, devices, kernels and what would draw where, in this order. ray: a cluster's address, None to ask none.

    Raises ValueError for a FASTORY_KERNELS that is none.
    """
    from fastory.kernels import backends

    yield Machine(__version__, platform.python_version(), platform.system(), platform.machine())
    for package in PACKAGES:
        yield Package(package.removesuffix("-cu13-bindings"), packages.installed(package))
    yield from (KnownNotToWork(line) for line in packages.known_not_to_work())
    yield from devices()
    for chosen in backends.describe():
        yield Kernels(chosen.device, chosen.implementation, chosen.reason, dict(chosen.others))
    yield from ranks()
    yield from batch_workers()
    if ray is not None:
        yield from nodes(ray)


def ranks() -> Iterator[Rank]:
    """What torchrun says of this process, where it started it."""
    from fastory.distributed.launch import launched

    if launch := launched():
        device = launch.device("auto")
        if device == "auto":
            device = f"cuda:{launch.local_rank}" if launch_has_cuda() else "cpu"
        yield Rank(launch.rank, launch.size, device)


def launch_has_cuda() -> bool:
    """Whether PyTorch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def batch_workers() -> Iterator[BatchWorker]:
    """What `fastory batch` would start on this machine."""
    from fastory.batch.local import devices_here, threads_each

    devices = devices_here("auto", None)
    for device in devices:
        yield BatchWorker("cpu" if device == "auto" else device, threads_each(devices))


def nodes(address: str) -> Iterator[RayNode | NoRay]:
    """The machines of a Ray cluster, or why none can be asked."""
    from fastory.batch.ray_workers import connected, how_many, needed_of, nodes_of

    try:
        ray = connected(address)
    except InputError as error:
        yield NoRay(str(error))
        return
    try:
        found = nodes_of(ray)
    finally:
        ray.shutdown()
    needed = needed_of(found, "auto", 1.0)
    for number, node in enumerate(found, start=1):
        known: dict[str, float] = {name: node[name] for name in ("CPU", "GPU", "memory") if name in node}
        yield RayNode(number, known, how_many([node], needed))


def devices() -> Iterator[Processor | Cuda | NoCuda]:
    """The CPU, and every CUDA device or why there is none."""
    import psutil
    import torch

    from fastory import threads

    memory = psutil.virtual_memory()
    yield Processor(
        psutil.cpu_count(), threads.choose(torch.get_num_threads()), memory.available, memory.total
    )
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        yield NoCuda(f"PyTorch is {build}{'' if sys.platform == 'linux' else ', and Triton needs Linux'}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        yield Cuda(f"cuda:{index}", properties.name, capability, free, total, str(torch.version.cuda))


def lines(found: Iterator[Finding]) -> Iterator[str]:
    """The findings for people, under a title for each kind."""
    title = ""
    for finding in found:
        wanted = TITLES[type(finding)]
        if wanted != title:
            title = wanted
            yield from ("", title)
        yield from described(finding)


TITLES: Mapping[type, str] = {
    Machine: "",
    Package: "packages",
    KnownNotToWork: "known not to work",
    Processor: "devices",
    Cuda: "devices",
    NoCuda: "devices",
    Kernels: "kernels",
    Rank: "what draws",
    BatchWorker: "what draws",
    RayNode: "what draws",
    NoRay: "what draws",
}


def described(finding: Finding) -> Iterator[str]:
    """A finding's lines."""
    match finding:
        case Machine():
            yield f"fastory {finding.fastory}, Python {finding.python}, {finding.system} {finding.machine}"
        case Package():
            yield f"  {finding.name:<13} {finding.version or 'not installed'}"
        case KnownNotToWork():
            yield f"  {finding.message}"
        case Processor():
            memory = f"{_gib(finding.free)} of {_gib(finding.total)} GiB free"
            yield f"  {'cpu':<13} {finding.cores} cores, {finding.threads} threads, {memory}"
        case NoCuda():
            yield f"  {'cuda':<13} none: {finding.reason}"
        case Cuda():
            sm = f"sm_{finding.capability.replace('.', '')}"
            memory = f"{_gib(finding.free)} of {_gib(finding.total)} GiB free"
            yield f"  {finding.device:<13} {finding.name}, {sm}, {memory}, CUDA {finding.cuda}"
        case Kernels():
            yield f"  {finding.device:<13} {finding.implementation} ({finding.reason})"
            yield from (f"  {'':<13} not {name}: {why}" for name, why in finding.others.items())
        case Rank():
            yield f"  {'torchrun':<13} rank {finding.rank} of {finding.processes}, on {finding.device}"
        case BatchWorker():
            threads = f", {finding.threads} threads" if finding.threads else ""
            yield f"  {'batch':<13} a process on {finding.device}{threads}"
        case RayNode():
            memory = f"{_gib(int(finding.resources.get('memory', 0)))} GiB"
            cores = (
                f"{finding.resources.get('CPU', 0):g} CPU, {finding.resources.get('GPU', 0):g} GPU, {memory}"
            )
            yield f"  {'ray':<13} machine {finding.number}: {cores}; batch --ray has {finding.actors} of its actors there"
        case NoRay():
            yield f"  {'ray':<13} none: {finding.reason}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
