"""What is exported: a module, its inputs by name, and the sizes that it is traced, checked and built for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastory.conditioning.regions import SILENT
from fastory.models.export_folder import factored

Axis = int | str
"""A number, or a name of Component.ranges with an optional factor: `batch`, `4*references`."""

BEHIND_ALL = 2**30  # the group of queries that see every key

# Sizes of a run. Upsampling's guard allows the exporter no more than 63 rows.
RANGES = {
    "batch": (1, 63),
    "text": (1, 1024),
    "references": (1, 4096),
    "keys": (1, 65536),
}


@dataclass(frozen=True)
class Input:
    """An input of a component. make(generator, shape) gives values of the right kind; None is a normal distribution."""

    shape: tuple[Axis, ...]
    dtype: torch.dtype
    make: Callable[[torch.Generator, tuple[int, ...]], Tensor] | None = None

    def sample(self, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        """A tensor for these sizes, on the CPU."""
        shape = tuple(size_of(axis, sizes) for axis in self.shape)
        values = torch.randn(shape, generator=generator) if self.make is None else self.make(generator, shape)
        return values.to(self.dtype)


@dataclass(frozen=True)
class Component:
    """A module whose forward takes `inputs` in their order and gives `outputs`.

    ranges: least and most of every name in a shape. traced: sizes for the exporter, which takes 0 and 1 for constants.
    checks: sizes at which parity is measured. hot: those of most calls, for which engines are tuned.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Input]
    outputs: Mapping[str, tuple[Axis, ...]]
    ranges: Mapping[str, tuple[int, int]]
    traced: Mapping[str, int]
    checks: Sequence[Mapping[str, int]]
    dtype: torch.dtype
    hot: Mapping[str, int]

    def sample(self, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        """Inputs of these sizes."""
        generator = torch.Generator().manual_seed(seed)
        return {name: described.sample(sizes, generator) for name, described in self.inputs.items()}


def size_of(axis: Axis, sizes: Mapping[str, int]) -> int:
    """The length of an axis."""
    if isinstance(axis, int):
        return axis
    factor, name = factored(axis)
    return factor * sizes[name]


class Reads(nn.Module):
    """A function of tensors as a module, which holds the modules whose weights it reads."""

    def __init__(self, function: Callable[..., Any], holds: Sequence[nn.Module]) -> None:
        super().__init__()
        self.function, self.holds = function, nn.ModuleList(holds)

    def forward(self, *inputs: Tensor) -> Any:
        """What the function gives."""
        return self.function(*inputs)


def random_ids(vocabulary: int) -> Callable[[torch.Generator, tuple[int, ...]], Tensor]:
    return lambda generator, shape: torch.randint(vocabulary, shape, generator=generator)


def random_mask(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """True for about half, the first row all False: a row that sees nothing is checked everywhere."""
    chosen = torch.rand(shape, generator=generator) < 0.5
    if len(shape) > 1 and shape[0] > 1:
        chosen[0] = False
    return chosen


def random_shares(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Fractions, 0 and 1 among them: a third each."""
    return (3 * torch.rand(shape, generator=generator) - 1).clamp(0, 1)


def random_bias(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Logarithms of such fractions, as far down as a bias goes."""
    return random_shares(generator, shape).clamp(min=SILENT).log()


def some_padding(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """True for about half, never for the first: every row sees something."""
    hidden = random_padding(generator, shape)
    hidden[..., 0] = False
    return hidden


def random_padding(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """True for about half; the first of several rows all True: it sees nothing."""
    return ~random_mask(generator, shape)
