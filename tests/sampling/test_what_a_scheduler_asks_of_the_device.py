"""Risk: coefficients that stay on the host, or noise that is drawn ahead, are others than diffusers' own."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import Tensor

from fastory.sampling import schedulers
from fastory.sampling.schedulers import SchedulerStep

STEPS, ROWS, SHAPE = 7, 3, (4, 8, 8)
CPU = torch.device("cpu")


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sampled(name: str, step: Callable[..., Tensor], dtype: torch.dtype, **config: object) -> Tensor:
    """The end of a loop whose predictions hang on the sample and on the step."""
    kind = getattr(diffusers, name)
    running = kind.from_config({"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", **config})
    running.set_timesteps(STEPS)
    sample = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=dtype)
    for number, timestep in enumerate(running.timesteps):
        prediction = torch.sin(sample * (1 + number))
        sample = step(running, prediction, timestep, sample)
    return sample


@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_a_solver_on_the_host_is_diffusers_own(solver_order: int) -> None:
    """In float64, where only the order of at most three summands may differ: eps a step, tenfold through the loop."""

    def plain(running: object, *values: Tensor) -> Tensor:
        return running.step(*values, return_dict=False)[0]  # type: ignore[attr-defined]

    def on_host(running: object, *values: Tensor) -> Tensor:
        within = SchedulerStep(CPU, [], STEPS, solves=True)
        within.on_host = True  # as on a device; here the two are one, so that both can be compared
        with within:
            return plain(running, *values)

    theirs, ours = (
        sampled("UniPCMultistepScheduler", step, torch.float64, solver_order=solver_order)
        for step in (plain, on_host)
    )
    assert torch.isfinite(theirs).all()
    assert (theirs - ours).abs().max() <= 100 * torch.finfo(torch.float64).eps * theirs.abs().max()


@pytest.mark.parametrize("ahead", [1, 2 * 3 * 256, 2**22], ids=["one step", "two steps", "all"])
@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_noise_that_is_drawn_ahead_is_what_each_row_would_draw(
    name: str, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is diffusers with a list of generators, which draws a row after the other, a step after the other."""
    monkeypatch.setattr(schedulers, "NOISE_AHEAD", ahead)
    own = generators(1, 2, 3)

    def plain(running: object, *values: Tensor) -> Tensor:
        return running.step(*values, generator=own, return_dict=False)[0]  # type: ignore[attr-defined]

    within = SchedulerStep(CPU, generators(1, 2, 3), STEPS)

    def drawn(running: object, *values: Tensor) -> Tensor:
        with within:
            return running.step(*values, return_dict=False)[0]  # type: ignore[attr-defined]

    assert torch.equal(sampled(name, plain, torch.float32), sampled(name, drawn, torch.float32))
