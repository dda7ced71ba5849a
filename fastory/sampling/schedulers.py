"""diffusers' schedulers by name, and one step of them without waiting for the device."""

from __future__ import annotations

import inspect
import math
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

    Raises InputError for LCM on a UNet that was not distilled for it, itself or by a LoRA.
    """
    row = SCHEDULERS[name]
    if row.distilled and model.distilled not in ("lcm", "lcm-lora"):
        raise InputError(
            f"scheduler {name} wants a UNet distilled for it (time_cond_proj_dim), or an LCM-LoRA; {model.name} has none. "
            "Give an LCM UNet with --model, an LCM-LoRA (its file, folder, hub name or header says lcm; else --distilled "
            "lcm-lora does) with --lora, or another --scheduler."
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


# Random numbers that are drawn at once, ahead of the steps that use them: some 50 ms of a host's core.
NOISE_AHEAD = 2**22


class SchedulerStep(TorchFunctionMode):
    """Around `scheduler.step`: each row's noise is drawn on the CPU from its own generator, and nothing is waited for.

    A scheduler that draws noise would ask for it with a blocking copy at every step; here the noise of many steps is drawn
    ahead and sent at once, from pinned memory. UniPC builds its coefficients from some hundred operations on single numbers
    and sends some of them back and forth; here they stay on the host, and the device gets them as arguments.
    """

    def __init__(
        self,
        device: torch.device,
        generators: Sequence[torch.Generator],
        steps: int = 1,
        solves: bool = False,
    ) -> None:
        """generators: of each row of the micro-batch. Rows with the same generator get the same noise, drawn once.

        steps: of the loop, for which noise is drawn ahead. solves: of the scheduler's row of the table.
        """
        super().__init__()
        self.device, self.generators, self.steps_left = device, generators, steps
        self.on_host = solves and device.type != "cpu"
        self.ahead: list[Tensor] = []  # the last one is the next

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Noise, copies from the CPU to the device, and what a solver's coefficients are made of; all else is as it is."""
        kwargs = dict(kwargs or {})
        if func is torch.randn:
            return self._next_noise(args[0], kwargs.get("dtype"))
        if self.on_host and func in _ON_HOST:
            return _ON_HOST[func](func, args, kwargs)
        if func is torch.Tensor.to and args[0].device.type == "cpu" and self.device in args[1:]:
            return func(self._send(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _next_noise(self, shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        if not self.ahead:
            own = {id(generator): generator for generator in self.generators}
            numbers = len(own) * math.prod(shape[1:])
            count = max(1, min(self.steps_left, NOISE_AHEAD // numbers))
            steps = [
                {
                    name: torch.randn((1, *shape[1:]), generator=generator, dtype=dtype)
                    for name, generator in own.items()
                }
                for _ in range(count)
            ]
            rows = [drawn[id(generator)] for drawn in steps for generator in self.generators]
            self.ahead = [*self._send(torch.cat(rows)).split(len(self.generators))][::-1]
            self.steps_left -= count
        noise = self.ahead.pop()
        if (noise.shape, noise.dtype) != (torch.Size(shape), dtype or torch.get_default_dtype()):
            raise ValueError(
                f"noise of {tuple(shape)} {dtype}, after noise of {tuple(noise.shape)} {noise.dtype}"
            )
        return noise

    def _send(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def _stay(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """`tensor.to(..)`: one on the host stays there; its type may change."""
    tensor: Tensor = args[0]
    if tensor.device.type != "cpu":
        return func(*args, **kwargs)
    dtypes = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
    return tensor.type(dtypes[0]) if dtypes else tensor


def _made_on_host(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return func(*args, **{**kwargs, "device": "cpu"})


def _weighted_sum(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """einsum("k,bkc...->bc...", weights, differences) with weights on the host: one number and one product each."""
    equation, weights, differences = args
    if equation != "k,bkc...->bc..." or weights.device.type != "cpu":
        return func(*args, **kwargs)
    terms = [weight * differences[:, k] for k, weight in enumerate(weights.unbind())]
    return sum(terms[1:], terms[0])


# What a solver's step asks the sample's device for that is a few numbers.
_ON_HOST: Mapping[Any, Any] = {
    torch.Tensor.to: _stay,
    torch.ones: _made_on_host,
    torch.tensor: _made_on_host,
    torch.einsum: _weighted_sum,
}
