"""What is measured: one cell is an operator at one shape, with its inputs and its floor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOKENS = 4


@dataclass(frozen=True)
class Rates:
    """What a device can do: bytes, matrix operations and exponents a second, and the shortest kernel in a graph."""

    bytes: float
    flops: float
    exps: float
    launch: float


# The design's measured rates; a device that is not listed gets no floor.
RATES = {"H100": Rates(3.0e12, 750e12, 3.9e12, 2.5e-6)}


@dataclass(frozen=True)
class Cell:
    """One row of a table. `references` counts pictures (4 keys each); `groups` > 1 has a mask and a scale each.

    The first half of `rows` is unconditional and sees a null block in place of each group's pictures, as in the runtime.
    """

    operator: str
    model: str
    queries: int
    width: int
    heads: int
    text: int
    references: int = 0
    rows: int = 2
    groups: int = 1
    masked: bool = False
    dtype: str = "fp16"
    group_size: int = 1
    window: int = 0
    padded: bool = False
    prefix: int = 0
    self_attention: bool = False

    @property
    def name(self) -> str:
        shape = (
            f"{self.operator} {self.model} {self.rows}x{self.queries}x{self.width}x{self.heads} {self.dtype}"
        )
        if self.operator == "grca":
            marks = f" {self.groups} groups" * (self.groups > 1) + " masked" * self.masked
            return f"{shape} {self.text}+{self.references * TOKENS}{marks}"
        marks = f" prefix {self.prefix}" * (self.prefix > 0) + " padded" * self.padded
        return f"{shape} keys {self.text} S={self.group_size} window {self.window}{marks}"

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def keys_read(self) -> float:
        """Keys that a query's softmax sees, on average."""
        if self.operator == "grca":
            unconditional = self.rows // 2 / self.rows
            pictures = self.references * (1 - unconditional) + self.groups * unconditional
            return self.text + pictures * TOKENS
        if not self.self_attention:
            return self.text if not self.padded else self.text - self.group_size
        frames = self.queries // self.group_size
        window = self.window or frames
        return self.group_size * sum(min(t + 1, window) for t in range(frames)) / frames

    def floor(self, device_name: str) -> float | None:
        """Seconds below which no kernel on this device can be: bytes, matrix operations, exponents, launch."""
        rates = next((rates for name, rates in RATES.items() if name in device_name), None)
        if rates is None:
            return None
        scores = self.rows * self.heads * self.queries * self.keys_read()
        size = DTYPES[self.dtype].itemsize
        kv_rows = 1 + (self.rows if self.operator == "grca" else 0)
        stored = 2 * self.rows * self.queries + 2 * kv_rows * self.keys_read() / 2
        return max(
            stored * self.heads * self.width * size / rates.bytes,
            4 * scores * self.width / rates.flops,
            scores / rates.exps,
            rates.launch,
        )


def group_bounds(cell: Cell) -> list[int]:
    """Where the groups begin and end, in blocks: each has its pictures and, last, its null block."""
    pictures = [cell.references * g // cell.groups for g in range(cell.groups + 1)]
    return [count + g for g, count in enumerate(pictures)]


def visible_blocks(cell: Cell) -> Tensor:
    """(rows, blocks) bool: unconditional rows see the null blocks, the others see the pictures."""
    bounds = group_bounds(cell)
    null = torch.zeros(bounds[-1], dtype=torch.bool)
    null[[bound - 1 for bound in bounds[1:]]] = True
    half = cell.rows // 2
    return torch.cat([null.expand(half, -1), ~null.expand(cell.rows - half, -1)])


def grca_inputs(cell: Cell, device: str, seed: int = 0) -> dict[str, Any]:
    """The operator's arguments as the runtime gives them, so that the binary that runs is the runtime's.

    K and V are views of tensors that hold other layers beside them; text is a row's own, references are shared; offsets,
    visibility and null blocks are there in every call (fastory.conditioning.references).
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[cell.dtype]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    heads, bounds = (cell.heads, cell.width), group_bounds(cell)
    layers = 4 * cell.heads * cell.width
    text, refs = draw(cell.rows, cell.text, layers), draw(1, bounds[-1] * TOKENS, layers)
    (k_text, v_text), (k_ref, v_ref) = (
        [part.unflatten(-1, heads) for part in wide.chunk(4, -1)[1:3]] for wide in (text, refs)
    )
    offsets = torch.tensor(bounds, dtype=torch.int32) * TOKENS
    inputs: dict[str, Any] = {
        "q": draw(cell.rows, cell.queries, *heads),
        "k_text": k_text,
        "v_text": v_text,
        "k_ref": k_ref,
        "v_ref": v_ref,
        "scale": torch.full((cell.groups,), 0.4, device=device),
        "ref_offsets": offsets.to(device),
        "ref_visible": visible_blocks(cell).to(device),
    }
    from fastory.kernels import grca  # not at the top: bench/compare.py says first which version it is

    if hasattr(grca, "visible_ranges"):  # the versions before look for the ranges themselves
        inputs["ref_ranges"] = grca.visible_ranges(inputs["ref_visible"], inputs["ref_offsets"], TOKENS)
    if cell.masked:
        inputs["mask"] = torch.rand(1, cell.groups, cell.queries, generator=generator).to(device)
    return inputs


def banded_inputs(cell: Cell, device: str, seed: int = 0) -> dict[str, Any]:
    """The operator's arguments: the history module's self-attention, or the UNet's call over caption and ring."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[cell.dtype]
    q, k, v = (
        torch.randn(cell.rows, n, cell.heads, cell.width, generator=generator).to(device, dtype)
        for n in (cell.queries, cell.text, cell.text)
    )
    padding = torch.zeros(cell.rows, cell.text, dtype=torch.bool)
    padding[:, cell.text - cell.group_size :] = True
    if cell.self_attention:
        padding[:] = torch.rand(cell.rows, cell.text, generator=generator) > 0.8
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "group_size": cell.group_size,
        "window": cell.window,
        "prefix": cell.prefix,
    }
    inputs["key_padding"] = padding.to(device) if cell.padded else None
    if not cell.self_attention:
        groups = (cell.text - cell.prefix) // cell.group_size
        inputs |= {"query_group": groups - 1, "query_group_size": 0}
    return inputs


def _unet(cells: tuple[tuple[str, int, int, int], ...], **changes: Any) -> list[Cell]:
    return [Cell("grca", model, length, width, heads, 77, **changes) for model, length, width, heads in cells]


SD15 = (("SD1.5", 4096, 40, 8), ("SD1.5", 1024, 80, 8), ("SD1.5", 256, 160, 8))
SDXL = (("SDXL", 4096, 64, 10), ("SDXL", 1024, 64, 20))


def gpu_matrix() -> list[Cell]:
    """The table of the design: both UNets, 1, 20 and 100 references, one frame and five; masks; two characters; the band."""
    cells = [
        cell
        for references in (1, 20, 100)
        for rows in (2, 10)
        for cell in _unet((*SD15, *SDXL), references=references, rows=rows)
    ]
    cells += _unet((*SD15[:1], *SDXL[:1]), references=20, dtype="bf16")
    cells += [
        cell for groups in (4, 20) for cell in _unet(SDXL, references=2 * groups, groups=groups, masked=True)
    ]
    cells += _unet(SDXL, references=8, groups=4)
    # A story of 8 frames without characters, and with two: 8 pictures of each, in a group and a mask of their own.
    cells += _unet((*SD15, *SDXL), references=8)
    cells += _unet((*SD15, *SDXL), references=24, groups=3, masked=True)
    for window in (1, 4):
        history = 91 * window
        cells += [
            Cell(
                "banded",
                "AR-LDM UNet",
                4096,
                40,
                8,
                91 + history,
                group_size=91,
                window=window,
                padded=padded,
                prefix=91,
            )
            for padded in (False, True)
        ]
    for size, frames, window in ((1, 1024, 64), (91, 5, 2), (91, 16, 4)):
        cells += [
            Cell(
                "banded",
                "history",
                size * frames,
                64,
                12,
                size * frames,
                group_size=size,
                window=window,
                padded=padded,
                self_attention=True,
            )
            for padded in (False, True)
        ]
    return cells


def cpu_matrix() -> list[Cell]:
    """Small shapes: the built-in model's layers, and SD1.5's two smallest."""
    small = (("built-in", 64, 32, 2), ("built-in", 16, 32, 4))
    cells = [
        Cell("grca", model, length, width, heads, 24, references=8, rows=rows, dtype="fp32")
        for model, length, width, heads in small
        for rows in (2, 16)
    ]
    cells += _unet(SD15[2:], references=4, dtype="fp32")
    cells += _unet(SD15[2:], references=8, groups=4, masked=True, dtype="fp32")
    cells += [
        Cell(
            "banded",
            "AR-LDM UNet",
            64,
            160,
            8,
            91 + 364,
            group_size=91,
            window=4,
            padded=True,
            prefix=91,
            dtype="fp32",
        ),
        Cell(
            "banded",
            "history",
            364,
            64,
            12,
            364,
            group_size=91,
            window=2,
            padded=True,
            self_attention=True,
            dtype="fp32",
        ),
    ]
    return cells
