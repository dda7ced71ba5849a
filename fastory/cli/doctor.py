"""`fastory doctor`: what a bug report should hold. No path, no host name."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import typer

from fastory import __version__, packages
from fastory.cli.progress import show_json
from fastory.cli.reporting import quiet_libraries, reported, say

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


Finding = Machine | Package | KnownNotToWork | Processor | Cuda | NoCuda | Kernels


def doctor(
    json_lines: Annotated[bool, typer.Option("--json", help="Print findings as JSON lines.")] = False,
) -> None:
    """Print versions, devices, and which kernels would run and why not others, to paste in a bug report."""
    with reported():
        quiet_libraries()
        if json_lines:
            show_json(findings())
        else:
            say("\n".join(lines(findings())))


def findings() -> Iterator[Finding]:
    """Versions, devices and kernels, in this order. Raises ValueError for a FASTORY_KERNELS that is none."""
    from fastory.kernels import backends

    yield Machine(__version__, platform.python_version(), platform.system(), platform.machine())
    for package in PACKAGES:
        yield Package(package.removesuffix("-cu13-bindings"), packages.installed(package))
    yield from (KnownNotToWork(line) for line in packages.known_not_to_work())
    yield from devices()
    for chosen in backends.describe():
        yield Kernels(chosen.device, chosen.implementation, chosen.reason, dict(chosen.others))


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


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
