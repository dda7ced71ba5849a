"""Stories with the same captions and other characters: what they teach beyond the stories one by one.

Contrast. A prediction's error is mostly what no history could tell. For two stories A and B of the same captions, drawn with
the same noise at the same step, that part is the same, and what is left between the two is what their histories say:

loss = mean |e|^2 + contrast * mean |e_A - e_B|^2 / mean |w_A - w_B|^2,    e = prediction - w, w what is wanted

so that the second term is 1 for a history that nobody listens to and 0 for one that is followed to the end.

Patches. A first frame has no history: its caption leaves open what its characters look like, and denoising, which begins
with the mean of all of them, may end in a body with patches of several. Such pictures are nowhere in the training data, so
nothing ever taught the UNet to remove them. Here a noisy picture has patches of a paired story, and what is wanted is the
picture itself: the larger part, or where a pair looks the same, what the history says. It is the cure of "Input Perturbation
Reduces Exposure Bias in Diffusion Models" (Ning et al., ICML 2023), with errors of the kind that are made in place of
Gaussian ones. (MODEL_CARD.md has what came of it: much for frames with a history, nothing for first frames.) For x0 with
patches d

x_t = a (x0 + d) + s n = a x0 + s (n + a d / s),    a^2 + s^2 = 1

which is x0 under another noise: predictions are asked for as always, and at low noise, where it is none any more, without
patches. But patches are small, and in the mean of all errors next to nothing. So with e0, the error of the predicted x0,

loss = ... + contrast * sum <e0, d>^2 / |d|^2 / sum |d|^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from fastory.errors import InputError
from fastory.tuning.sizes import Tuning
from fastory.tuning.stories import Example

PairedStories = Sequence[Sequence[int]]
LEAST_NOISE = 0.25  # of the schedule's steps: below, there are no patches
SMALLER_PART = 0.4  # most of a picture that is another's, where it should be told from the rest of it


def paired_stories_of(examples: Sequence[Example]) -> PairedStories:
    """The stories, by number, that have the same captions in the same order; a story without such others is left out.

    So is a copy: nothing tells it apart, and the contrast is a share of what does.
    """
    found: dict[tuple[str, ...], dict[str, int]] = {}
    for number, example in enumerate(examples):
        found.setdefault(example.prompts, {}).setdefault(example.digest, number)
    return [list(group.values()) for group in found.values() if len(group) > 1]


def check_paired_stories(paired: PairedStories, tuning: Tuning) -> None:
    """InputError where a setting needs stories with the same captions and there are none."""
    for flag, value in (("--contrast", tuning.contrast), ("--patches", tuning.patches)):
        if value and not paired:
            raise InputError(
                f"{flag} wants stories that share their captions and show other characters, and no two of these do; "
                f"add such stories, or leave {flag} out"
            )


def paired_rows(lengths: Sequence[int]) -> Tensor:
    """(P, 2): the rows of frames that belong together, where the stretches 0 and 1, 2 and 3, .. are pairs of a length."""
    rows = [np.arange(*ends) for ends in pairwise(np.cumsum([0, *lengths]))]
    return torch.from_numpy(np.stack([np.concatenate(rows[0::2]), np.concatenate(rows[1::2])], 1))


def patch_shares(changed: Tensor, most: float, rng: np.random.Generator) -> Tensor:
    """(h, w), 0 to 1: smooth random patches over a share of `changed` (h, w), 0 or more, drawn from 0 to `most`."""
    cells = int(rng.integers(3, 7))
    coarse = torch.from_numpy(rng.normal(size=(1, 1, cells, cells)))
    field = nn.functional.interpolate(coarse, size=changed.shape, mode="bicubic", align_corners=False)[0, 0]
    values, order = field.flatten().sort(descending=True)
    covered = changed.double().flatten()[order].cumsum(0)
    share = rng.uniform(0, most)
    level = values[(covered < share * covered[-1]).sum().clamp(max=len(values) - 1)]
    return (rng.uniform(1, 8) * (field - level) + 0.5).clamp(0, 1).to(changed.dtype)


def patches_of(
    latents: Tensor, others: Tensor, seen: Tensor, pairs: Tensor | None, rng: np.random.Generator
) -> Tensor:
    """What to add to latents (R, c, h, w) for patches of `others`, zeros where `seen` (R,) is False.

    The others' part is the smaller one. But half of the pairs (P, 2) that are seen take patches of each other so that both
    look the same, whichever part is larger: only their histories tell them apart.
    """
    patches = torch.zeros_like(latents)
    for row in torch.where(seen)[0].tolist():
        change = others[row] - latents[row]
        patches[row] = patch_shares(change.square().sum(0), SMALLER_PART, rng) * change
    for first, second in pairs.tolist() if pairs is not None else ():
        if seen[first] and rng.random() < 0.5:
            change = latents[second] - latents[first]
            patches[first] = patch_shares(change.square().sum(0), 1.0, rng) * change
            patches[second] = patches[first] - change
    return patches


def patched_noise(noise: Tensor, patches: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """n + a d / s: the noise (R, c, h, w) under which x0 is seen with patches d; alphas_cumprod (R,): a^2."""
    alphas = alphas_cumprod.view(-1, 1, 1, 1)
    return noise + (alphas / (1 - alphas)).sqrt() * patches


def contrast(errors: Tensor, wanted: Tensor, pairs: Tensor) -> Tensor:
    """The second term, without its weight; 0 where no pair has a history. errors, wanted (R, c, h, w), pairs (P, 2)."""
    if not len(pairs):
        return errors.sum() * 0
    first, second = pairs.unbind(1)
    change = (wanted[first] - wanted[second]).square().mean()
    return (errors[first] - errors[second]).square().mean() / change.clamp(min=1e-12)


def patch_loss(errors: Tensor, patches: Tensor) -> Tensor:
    """The third term, without its weight: 0 where patches are gone, 1 where they stay. errors: of x0 (R, c, h, w)."""
    left = (errors * patches).flatten(1).sum(1).square()
    size = patches.square().flatten(1).sum(1)
    return (left / size.clamp(min=1e-12)).sum() / size.sum().clamp(min=1e-12)
