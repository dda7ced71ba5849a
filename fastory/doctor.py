"""`fastory doctor`: what a bug report should hold."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

import psutil
import torch

from fastory import __version__, packages, threads
from fastory.kernels import backends

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


def report() -> Iterator[str]:
    """Lines of text: versions, devices, and which kernels would run and why not others. No path, no host name."""
    yield f"fastory {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield ""
    yield "packages"
    for package in PACKAGES:
        yield f"  {package.removesuffix('-cu13-bindings'):<13} {packages.installed(package) or 'not installed'}"
    yield from _trouble()
    yield ""
    yield "devices"
    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    count = threads.choose(torch.get_num_threads())
    yield f"  cpu           {psutil.cpu_count()} cores, {count} threads, {free:.1f} of {total:.1f} GiB free"
    yield from _cuda_lines()
    yield ""
    yield "kernels"
    for chosen in backends.describe():
        yield f"  {chosen.device:<13} {chosen.implementation} ({chosen.reason})"
        for name, why in chosen.others.items():
            yield f"  {'':<13} not {name}: {why}"


def _trouble() -> Iterator[str]:
    """A section of what is installed and known not to work; nothing where all is well."""
    lines = list(packages.known_not_to_work())
    if lines:
        yield ""
        yield "known not to work"
        yield from (f"  {line}" for line in lines)


def _cuda_lines() -> Iterator[str]:
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        yield f"  cuda          none: PyTorch is {build}{'' if sys.platform == 'linux' else ', and Triton needs Linux'}"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield (
            f"  cuda:{index}        {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}"
        )
