"""What the judge does not see: bodies of two colours, and blur.

Purity: of the pixels that are body wherever a character of this kind stands, the share of the most frequent body colour. The
judge names one colour for a yellow bear with a red face; its purity is what gives it away. Sharpness: the edge energy, the
mean absolute Laplacian of the luminance. Both are read beside the same measures of drawn pictures, as they are and as the
autoencoder restores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fastory.builtin.world.drawing import (
    BODY_RGB,
    HATS,
    INK,
    SCARVES,
    WHITE,
    Character,
    Role,
    Scene,
    draw,
    lighter,
)

if TYPE_CHECKING:
    from fastory import StoryModel
    from fastory.builtin.evaluation.iterative import HeldOutStory

PLACEMENTS = (
    16  # drawings of one kind, each moved by a few pixels; what is body in all of them is body in any
)
LUMINANCE = np.array([0.299, 0.587, 0.114])
# A belly is drawn lighter, and an edge or the autoencoder mixes a colour with the belly's, with a line's ink, with white.
LIGHT, DARK = np.linspace(0, 0.6, 7), (0.2, 0.4, 0.6)
BODY = np.array(
    [
        [
            *(lighter(rgb, share) for share in LIGHT),
            *(np.array(rgb) * (1 - d) + np.array(INK) * d for d in DARK),
        ]
        for rgb in BODY_RGB.values()
    ],
    dtype=np.float64,
)  # (colours, shades, 3)
NO_BODY = np.array([INK, WHITE], dtype=np.float64)
LEAST = 24  # pixels from which a colour is told: a penguin with a book shows fewer


def edge_energy(pictures: np.ndarray) -> float:
    """Mean absolute Laplacian of the luminance of pictures (n, H, W, 3), in grey levels of 255."""
    grey = pictures.astype(np.float64) @ LUMINANCE
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float(np.abs(4 * grey[:, 1:-1, 1:-1] - around).mean())


@cache
def body_pixels(species: tuple[str, ...], actions: tuple[str, ...], slot: int) -> np.ndarray:
    """(H, W) bool: pixels that are body of the character at `slot`, whatever it wears and wherever the drawing puts it.

    species, actions: of the characters from left to right. They are the pixels that change with the body's colour.
    """
    scene = Scene("house", tuple(Role(i, action) for i, action in enumerate(actions)))
    sure = np.ones((128, 128), dtype=bool)
    for placement in range(PLACEMENTS):
        hat, scarf = HATS[placement % len(HATS)], SCARVES[placement // len(HATS) % len(SCARVES)]
        pictures = []
        for colour in ("blue", "yellow"):
            cast = tuple(
                Character(s, colour if i == slot else "gray", hat, scarf) for i, s in enumerate(species)
            )
            pictures.append(np.asarray(draw(cast, scene, np.random.default_rng(placement)), dtype=np.int16))
        sure &= np.abs(pictures[0] - pictures[1]).max(-1) > 60  # an outline's edge changes less
    return sure


def colour_shares(picture: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
    """Shares of the body colours, in the order of COLOURS, among some pixels (H, W) of a picture (H, W, 3), by nearness.

    Lines and white do not count; None where too few pixels are left.
    """
    shades = np.concatenate([BODY.reshape(-1, 3), NO_BODY])
    nearest = ((picture[pixels].astype(np.float64)[:, None] - shades) ** 2).sum(-1).argmin(1)
    counts = np.bincount(nearest // BODY.shape[1], minlength=len(BODY) + 1)[: len(BODY)]
    return counts / counts.sum() if counts.sum() >= LEAST else None


def purities(story: HeldOutStory, pictures: np.ndarray) -> np.ndarray:
    """The purity of every character in every frame of one round (frames, H, W, 3); NaN where too little of it is sure."""
    found = []
    for picture, scene in zip(pictures, story.tale.scenes, strict=True):
        species = tuple(story.tale.cast[role.member].species for role in scene.roles)
        actions = tuple(role.action for role in scene.roles)
        for slot in range(len(scene.roles)):
            shares = colour_shares(picture, body_pixels(species, actions, slot))
            found.append(np.nan if shares is None else float(shares.max()))
    return np.array(found)


def drawn_world(stories: Sequence[HeldOutStory]) -> list[np.ndarray]:
    """The frames of every story as the drawn world shows them, every look kept: (frames, H, W, 3) uint8 each."""
    rng = np.random.default_rng(5)  # what a drawing leaves open: where somebody stands to a few pixels
    return [np.stack([np.asarray(draw(s.tale.cast, sc, rng)) for sc in s.tale.scenes]) for s in stories]


def calibrate(stories: Sequence[HeldOutStory], restore: Any) -> dict[str, float]:
    """Both measures of the drawn world: drawn, and through the autoencoder.

    restore: pictures (n, H, W, 3) uint8 -> the same through the autoencoder. `patched below`: the purity that 99 % of the
    restored bodies have; a body below it counts as patched. `bodies told`: the share of which enough pixels are sure.
    """
    drawn = drawn_world(stories)
    restored = [restore(pictures) for pictures in drawn]
    pure = {
        name: np.concatenate([purities(story, shown) for story, shown in zip(stories, pictures, strict=True)])
        for name, pictures in (("drawn", drawn), ("restored", restored))
    }
    return {
        "bodies told": float(np.isfinite(pure["drawn"]).mean()),
        "purity drawn": float(np.nanmean(pure["drawn"])),
        "purity restored": float(np.nanmean(pure["restored"])),
        "patched below": float(np.nanquantile(pure["restored"], 0.01)),
        "edge energy drawn": edge_energy(np.concatenate(drawn)),
        "edge energy restored": edge_energy(np.concatenate(restored)),
    }


def quality_scores(story: HeldOutStory, pictures: np.ndarray, patched_below: float) -> dict[str, float]:
    """One story's and round's `purity`, share of `patched` bodies, and `edge energy`."""
    pure = purities(story, pictures)
    known = pure[np.isfinite(pure)]
    found = {"edge energy": edge_energy(pictures)}
    return (
        {**found, "purity": float(known.mean()), "patched": float((known < patched_below).mean())}
        if len(known)
        else found
    )


def pixel_diversity(pictures: np.ndarray) -> float:
    """Standard deviation over pictures (n, H, W, 3), mean over pixels, in 0..255: 0 if all are one picture."""
    return float(pictures.astype(np.float32).std(0).mean())


def drawn_diversity(stories: Sequence[HeldOutStory]) -> float:
    """Pixel diversity of the drawn world on the same scenes: what the model's is to be held against."""
    return pixel_diversity(np.concatenate(drawn_world(stories)))


def restore(model: StoryModel, pictures: np.ndarray) -> np.ndarray:
    """Pictures (n, H, W, 3) uint8 through the autoencoder and back."""
    import torch

    from fastory.builtin.training.autoencoder import to_pictures, to_tensor

    with torch.no_grad():
        parts = [
            to_pictures(model.vae(part.to(model.device)).sample) for part in to_tensor(pictures).split(16)
        ]
    return np.concatenate(parts)
