"""diffusers' schedulers by name, and one step of them without waiting for the device."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastory.errors import InputError
from fastory.settings import SCHEDULERS
from fastory.wording import counted

if TYPE_CHECKING:
    from fastory.models.protocol import Model


def make_scheduler(model: Model, name: str) -> Any:
    """The named scheduler with the checkpoint's own noise schedule.

    Raises InputError for LCM on a UNet that was not distilled for it (no time_cond_proj_dim).
    """
    row = SCHEDULERS[name]
    if row.distilled and model.sizes.guidance_embedding is None:
        raise InputError(
            f"scheduler {name} wants a UNet distilled for it (time_cond_proj_dim); {model.name} has none. "
            "Give an LCM UNet with --model, or another --scheduler."
        )
    kind, config = getattr(diffusers, row.kind), {**model.scheduler_config, **row.config}
    if "clip_sample" in inspect.signature(kind).parameters:
        # DDIM clips by default, which is for pixels. A checkpoint that came with another scheduler does not say so.
        config.setdefault("clip_sample", False)
    return kind.from_config(config)


def check_steps(model: Model, name: str, steps: Sequence[int]) -> None:
    """InputError for numbers of steps that the named scheduler has no timesteps for: PNDM's first ones, say, are four."""
    for count in steps:
        try:
            make_scheduler(model, name).set_timesteps(count)
        except ValueError as error:  # what diffusers' schedulers raise
            raise InputError(
                f"scheduler {name} cannot draw in {counted(count, 'step')} with this checkpoint's schedule ({error}); "
                "give more --steps, or another --scheduler"
            ) from error


class SchedulerStep(TorchFunctionMode):
    """Around `scheduler.step`: each row's noise is drawn on the CPU from its own generator, and nothing is waited for.

    A scheduler that draws noise would ask for it with a blocking copy at every step, and UniPC sends some numbers of its
    tables and checks a solver's status on the host; here copies leave pinned memory and the device goes on.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        """generators: of each row of the micro-batch. Rows with the same generator get the same noise, drawn once."""
        super().__init__()
        self.device, self.generators = device, generators

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Noise, copies from the CPU to the device, and torch.linalg.solve; everything else is as it is."""
        kwargs = dict(kwargs or {})
        if func is torch.randn:
            return self._send(self._noise(args[0], kwargs.get("dtype")))
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **kwargs).result
        if func is torch.Tensor.to and args[0].device.type == "cpu" and self.device in args[1:]:
            return func(self._send(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _noise(self, shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        own = {
            id(generator): torch.randn((1, *shape[1:]), generator=generator, dtype=dtype)
            for generator in {id(generator): generator for generator in self.generators}.values()
        }
        return torch.cat([own[id(generator)] for generator in self.generators])

    def _send(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)
