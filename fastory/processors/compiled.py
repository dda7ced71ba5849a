"""A UNet's residual blocks and transformer blocks under torch.compile, each kind and width once.

A block is a region of its own, with sizes that may change: another number of frames, of references or of pixels, another weight
and another round compile nothing. A transformer block is handed what its cross-attention reads, cut out of the wide tensors, so
that blocks at other places of them are one graph. What a block computes between matrix products and convolutions (norms,
activations, sums, divisions by 1) is fused; the blocks are what launches most of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_config

BACKEND = "inductor"  # torch's own
# Graphs of one function: torch's own limit, 8, is below the widths that SD1.5's residual blocks have.
MOST_GRAPHS = 64


@dataclass(frozen=True, eq=False)
class Region:
    """A block, and what makes blocks one graph: class, shapes of weights, types of numbers, self-attention's backend."""

    block: nn.Module
    kind: tuple[Any, ...]


def regions_of(unet: nn.Module) -> list[Region]:
    """The blocks that are compiled, in the UNet's order."""
    blocks = [block for block in unet.modules() if isinstance(block, (BasicTransformerBlock, ResnetBlock2D))]
    return [Region(block, _kind(block)) for block in blocks]


def _kind(block: nn.Module) -> tuple[Any, ...]:
    shapes = tuple(tuple(parameter.shape) for parameter in block.parameters())
    number = type(getattr(block, "output_scale_factor", None))  # 1 in some blocks, 1.0 in others
    attn: Any = getattr(block, "attn1", None)
    backend = None if attn is None else attn.processor.backend
    return type(block), shapes, number, backend


class CompiledBlocks:
    """The blocks of a UNet. They are called compiled within `calls` alone: otherwise the UNet is as it was."""

    def __init__(self, unet: nn.Module, backend: str | Callable[..., Any] | None = None) -> None:
        """backend: of torch.compile, BACKEND where it is not given."""
        backend = backend or BACKEND
        self.regions = regions_of(unet)
        self.kinds = len({region.kind for region in self.regions})
        how: dict[str, Any] = {"fullgraph": True, "dynamic": True, "backend": backend}
        if backend == "inductor" and hasattr(torch._inductor.config, "deterministic"):
            # Nothing is chosen by a clock that changes what is computed: a resumed run has the same bytes.
            how["options"] = {"deterministic": True}
        classes = {type(region.block) for region in self.regions}
        self._forward = {kind: torch.compile(kind.forward, **how) for kind in classes}

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Within it a call of the UNet calls its blocks compiled."""
        with self._configured(), ExitStack() as stack:
            for region in self.regions:
                region.block.__dict__["forward"] = self._called(region.block)
                stack.callback(region.block.__dict__.pop, "forward")
            yield

    def _called(self, block: nn.Module) -> Callable[..., Any]:
        def forward(*arguments: Any, **values: Any) -> Any:
            return self._forward[type(block)](block, *arguments, **of_block(block, arguments, values))

        return forward

    def compile(self, call: Callable[[], object]) -> Iterator[int]:
        """Compile one block of each kind with what `call`, an eager call of the UNet, gives it.

        Yields how many kinds are done after each that was compiled: none where all have been for inputs like these.
        """
        seen: dict[tuple[Any, ...], tuple[nn.Module, Any, dict[str, Any]]] = {}
        with ExitStack() as stack:
            for region in self.regions:

                def keep(
                    block: nn.Module, arguments: Any, values: dict[str, Any], kind: Any = region.kind
                ) -> None:
                    seen.setdefault(kind, (block, arguments, values))

                stack.callback(region.block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            call()
        for done, (block, arguments, values) in enumerate(seen.values(), 1):
            before = graphs_compiled()
            with self._configured():
                self._called(block)(*arguments, **values)
            if graphs_compiled() > before:
                yield done

    @contextmanager
    def _configured(self) -> Iterator[None]:
        """Sizes that happen to be equal at first may differ later, and a function has more widths than torch expects."""
        with (
            shape_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]  # made by torch as it is imported
            torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS),
        ):
            yield


def of_block(block: nn.Module, arguments: tuple[Any, ...], values: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, with what this block's cross-attention reads in place of what all layers read."""
    passed = values.get("cross_attention_kwargs")
    if not passed or "context" not in passed:
        return values
    hidden: Tensor = arguments[0]
    layer = block.get_submodule("attn2").processor.layer  # type: ignore[union-attr]
    context = passed["context"].of_layer(layer, hidden.shape[1])
    return {**values, "cross_attention_kwargs": {**passed, "context": context}}


def graphs_compiled() -> int:
    """Graphs that this process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def cache_folder() -> str:
    """Where torch keeps what it has compiled, for the next process."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def channels_last(unet: nn.Module) -> None:
    """Convolution weights as compiled blocks read them. They are copies: a UNet that shares its weights keeps its own."""
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight, requires_grad=False)
