"""Compiling the kernels for an architecture without a device of it, and reading what came out.

Triton's wheel carries ptxas, cuobjdump and nvdisasm, so registers, spills, shared memory and machine code are known
on any Linux machine.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 89, 90, 100)
# The most shared memory a block may ask for, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS = 65536
MATRIX = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)")
_POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """A kernel in machine code: what it takes of a multiprocessor, and its text."""

    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    ptx: str
    cubin: bytes

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks fit one multiprocessor by registers, shared memory and threads."""
        threads = 32 * self.warps
        per_warp = -(-self.registers * 32 // 256) * 256
        most_threads = 1536 if self.capability in (86, 89, 120) else 2048
        whole = SHARED_LIMIT[self.capability] + 1024
        by_shared = whole // (self.shared_bytes + 1024)
        return max(0, min(REGISTERS // (per_warp * self.warps), by_shared, most_threads // threads, 32))

    @property
    def matrix_instructions(self) -> int:
        """Matrix instructions in the PTX."""
        return len(MATRIX.findall(self.ptx))

    def global_loads(self) -> dict[int, int]:
        """Global loads in the PTX by width in bytes: {16: 12, 4: 2}."""
        widths: dict[int, int] = {}
        for copy in re.findall(
            r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(?:0x)?([0-9a-f]+)\s*[,;]", self.ptx
        ):
            widths[int(copy, 16)] = widths.get(int(copy, 16), 0) + 1
        for vector, bits in re.findall(r"ld\.global(?:\.\w+)*?(?:\.(v\d))?\.b(\d+)", self.ptx):
            size = int(bits) // 8 * int(vector[1:] or 1 if vector else 1)
            widths[size] = widths.get(size, 0) + 1
        return widths

    def sass(self) -> str:
        """The machine code as nvdisasm prints it."""
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout


def _kind(argument: Any) -> str:
    if argument is None:
        return "constexpr"
    if isinstance(argument, Tensor):
        return _POINTER[argument.dtype]
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def compile_for(capability: int, kernel: Any, arguments: list, constants: dict[str, Any]) -> Compiled:
    """Compiles `kernel` as a call with these arguments (tensors may lie on "meta") and constants would.

    capability: 80, 89, 90, 100, ...; pointers are taken to be 16-byte aligned, as torch allocates them.
    """
    options = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
    launch = {name: constants[name] for name in options if name in constants}
    fixed = {name: value for name, value in constants.items() if name not in launch}
    names = kernel.arg_names[: len(arguments)]
    signature = {name: _kind(argument) for name, argument in zip(names, arguments, strict=True)}
    signature |= dict.fromkeys(fixed, "constexpr")
    fixed |= {name: None for name, kind in signature.items() if kind == "constexpr" and name not in fixed}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name][0] == "*"
    }
    source = ASTSource(kernel, signature, fixed, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    return _read(capability, launch["num_warps"], built)


def _read(capability: int, warps: int, built: Any) -> Compiled:
    """Registers and spills from the ELF's resource table, which cuobjdump prints."""
    cubin = built.asm["cubin"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    spilled = usage["STACK"] + usage["LOCAL"]
    return Compiled(capability, usage["REG"], spilled, built.metadata.shared, warps, built.asm["ptx"], cubin)
