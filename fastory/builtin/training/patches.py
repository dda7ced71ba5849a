"""Pictures with patches: bodies whose smaller part has another colour, as the model itself draws what captions leave open.

What follows references has to follow the larger part of such a body.
"""

import copy
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from fastory.builtin.world.drawing import COLOURS, SIZE, Character, Scene, draw
from fastory.tuning.objectives.paired_stories import SMALLER_PART, patch_shares

PATCHY = 0.5  # of the pictures


def patchy(cast: tuple[Character, ...], scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A scene as `draw` has it, or with patches of another colour on the smaller part of every character's body."""
    own = np.random.default_rng(int(rng.integers(2**62)))
    before = copy.deepcopy(own)
    picture = draw(cast, scene, own)
    return patch(picture, cast, scene, before, rng) if rng.random() >= PATCHY else picture


def patch(
    picture: Image.Image,
    cast: tuple[Character, ...],
    scene: Scene,
    before: np.random.Generator,
    rng: np.random.Generator,
) -> Image.Image:
    """A drawn picture with patches. before: the generator as it was when the picture was drawn, so that places are the same."""
    others = tuple(replace(c, colour=str(rng.choice([k for k in COLOURS if k != c.colour]))) for c in cast)
    first, second = (np.asarray(shown, np.float32) for shown in (picture, draw(others, scene, before)))
    body = torch.from_numpy((first != second).any(-1)).float()
    share = torch.zeros(SIZE, SIZE, 1)
    for columns in np.split(np.arange(SIZE), len(scene.roles)):
        share[:, columns, 0] = patch_shares(body[:, columns], SMALLER_PART, rng)
    return Image.fromarray(np.round(first + share.numpy() * (second - first)).astype(np.uint8))
