"""How much a reference counts: less where its frame differs from the story's majority, and by the step of a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from fastory.conditioning.references import References
from fastory.sampling.sampler import Sampler
from fastory.settings import Settings


@torch.inference_mode()
def majority_weights(tokens: Sequence[Tensor | None]) -> list[float]:
    """A factor in (0, 1] for each picture's values, from reference tokens (1, T, C_x); 1 for one that was left out.

    d_j is the median of the cosine distances of picture j to the others, so it is small where most others are near. Half of the
    pictures, those with d_j up to the median m of all d_j, count in full, the others m / d_j.
    """
    there = [j for j, picture in enumerate(tokens) if picture is not None]
    weights = [1.0] * len(tokens)
    if len(there) < 3:  # two are as far from each other: no majority
        return weights
    rows = torch.cat([picture.double().flatten(1) for picture in tokens if picture is not None]).cpu()
    flat = functional.normalize(rows, dim=1)
    distances = (1 - flat @ flat.T).tolist()
    apart = [median(distance for j, distance in enumerate(row) if j != i) for i, row in enumerate(distances)]
    middle = median(apart)
    for j, distance in zip(there, apart, strict=True):
        if distance > middle:
            weights[j] = max(0.0, middle) / distance
    return weights


def weights_of(tokens: Sequence[Tensor | None], settings: Settings) -> Sequence[float] | None:
    """The factors of pictures in a group, or None where all count alike."""
    return majority_weights(tokens) if settings.reference_weighting == "majority" else None


def ramp(settings: Settings, number: int, calls: int) -> float:
    """The factor of the weights in UNet call `number`, from 0, of `calls` in the whole schedule: linear."""
    first, last = settings.reference_ramp
    return first + (last - first) * (number / (calls - 1) if calls > 1 else 1.0)


def ramped(sampler: Sampler, references: References, settings: Settings) -> Callable[[int], object] | None:
    """What is called before every UNet call to write the weights that it reads; None where they stay."""
    if settings.reference_ramp == (1.0, 1.0) or not references.groups:
        return None

    def prepare(number: int) -> None:
        context, calls = sampler.context, len(sampler.host_timesteps)
        assert context is not None
        context.inputs()["scale"].copy_(references.scale * ramp(settings, number, calls))

    return prepare
