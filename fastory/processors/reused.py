"""Deep features of a UNet kept from one call for the next ones (DeepCache, arXiv 2312.00858, section 3.2).

From step to step the features of the deeper levels change little. A whole call keeps what the outermost up block takes from
below; a shallow call computes the input convolution, the outermost down and up block and the output, and takes that from the
last whole call. So a shallow call still sees its own latents, timestep and context where they matter most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from fastory.errors import InputError

Forward = Callable[..., Any]


class DeepFeatures:
    """What is kept of the whole calls of one UNet, by a key of the caller's, in memory that stays where it is."""

    def __init__(self, unet: Any) -> None:
        """Raises InputError for a UNet of one level, which has nothing deep."""
        if len(unet.up_blocks) < 2:
            raise InputError("cache_interval wants a UNet of two levels or more; this one has one")
        self._last: nn.Module = unet.up_blocks[-2]
        self._stand_ins: list[tuple[nn.Module, Forward]] = [
            *((block, _down(block)) for block in unet.down_blocks[1:]),
            *((block, _through) for block in (unet.mid_block, *unet.up_blocks[:-2])),
        ]
        self._kept: dict[int, Tensor] = {}

    @contextmanager
    def kept(self, key: int) -> Iterator[None]:
        """Within it a call of the UNet is whole, and what it takes from below is kept under `key`."""

        def forward(*arguments: Any, **values: Any) -> Tensor:
            made: Tensor = type(self._last).forward(self._last, *arguments, **values)
            if key in self._kept:
                self._kept[key].copy_(made)
            else:
                self._kept[key] = made.clone()
            return made

        with _called([(self._last, forward)]):
            yield

    @contextmanager
    def reused(self, key: int) -> Iterator[None]:
        """Within it a call of the UNet is shallow, with what is kept under `key`."""

        def forward(*arguments: Any, **values: Any) -> Tensor:
            return self._kept[key]

        with _called([*self._stand_ins, (self._last, forward)]):
            yield

    def forget(self, key: int) -> None:
        """What is kept under `key` goes."""
        self._kept.pop(key, None)


@contextmanager
def _called(forwards: list[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Within it these modules compute this in place of what they are."""
    with ExitStack() as stack:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
            stack.callback(module.__dict__.pop, "forward")
        yield


def _down(block: Any) -> Forward:
    """As many skips as the block gives, for up blocks that do not look at them."""
    count = len(block.resnets) + bool(block.downsamplers)

    def forward(hidden_states: Tensor, *arguments: Any, **values: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return hidden_states, (hidden_states,) * count

    return forward


def _through(hidden_states: Tensor, *arguments: Any, **values: Any) -> Tensor:
    return hidden_states
