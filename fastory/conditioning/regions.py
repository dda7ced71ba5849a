"""Where the characters of a frame are: soft masks, from boxes or from the words of a caption, and what they cut out.

A map of a character is how much the predicted noise changes where its words are left out (DiffEdit, arXiv 2210.11427). A mask
is (h, w) in [0, 1] on the grid of the latents; a layer reads it averaged to its own grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in shares of the picture."""

SOFT = 1 / 16  # of the picture: the width of a box's edge
LEAST = 0.3  # of a map's highest value: less is background
FLOOR = 0.2  # of a map's pixels change with any word: their highest value counts as none
SMOOTH = 3 / 16  # of the picture: what a map is averaged over
STEEP = 6  # how fast a mask rises at its edges
LEVELS = (
    0,
    1,
    2,
    3,
)  # how often sides are halved: the deepest cross-attention of SD1.5 and SDXL has an eighth
SILENT = 1e-4  # of a word's weight is what it keeps outside its mask
BOUNDED = (
    2048  # tokens: SD1.5 to 32 x 32 and SDXL to a quarter of its latents, other forms of these areas, too
)
MARGIN = 0.08  # of the picture, around a character that is cut out


@dataclass(frozen=True)
class Grid:
    """The latents' height and width."""

    height: int
    width: int

    def box(self, box: Box) -> Tensor:
        """The mask of a box: 1 inside, 0 outside, a straight line between at its edges."""
        left, top, right, bottom = box
        return _edges(self.height, top, bottom)[:, None] * _edges(self.width, left, right)[None]

    def mask(self, picture: Image.Image) -> Tensor:
        """The mask that a picture shows: white is 1, black 0; a cell is the mean of what it covers."""
        shown = torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255)
        return functional.adaptive_avg_pool2d(shown[None, None], (self.height, self.width))[0, 0]

    def sides(self, divisor: int) -> tuple[int, int]:
        """Height and width of a layer that has a `divisor`-th of the latents' sides."""
        return -(-self.height // divisor), -(-self.width // divisor)

    def layers(self) -> dict[int, tuple[int, int]]:
        """Height and width of a layer by its number of query tokens, from the latents' own grid down to the deepest."""
        sides = [self.sides(n) for n in (2**level for level in LEVELS)]
        return {height * width: (height, width) for height, width in sides}

    def bounded_layers(self) -> dict[int, tuple[int, int]]:
        """Those of `layers` whose self-attention keeps characters apart: at a half and a quarter, where things have outlines.

        Of at most BOUNDED tokens, as the bias has a number for each two of them.
        """
        sides = [self.sides(n) for n in (2, 4)]
        return {h * w: (h, w) for h, w in sides if h * w <= BOUNDED}


def _edges(cells: int, first: float, last: float) -> Tensor:
    at = (torch.arange(cells) + 0.5) / cells
    rising = ((at - first) / SOFT + 0.5) if first > 0 else torch.ones(cells)
    falling = ((last - at) / SOFT + 0.5) if last < 1 else torch.ones(cells)
    return rising.clamp(0, 1) * falling.clamp(0, 1)


def apart(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that share what they both claim: no pixel belongs to more than one character altogether."""
    if not masks:
        return {}
    total = torch.stack(list(masks.values())).sum(0).clamp(min=1)
    return {name: mask / total for name, mask in masks.items()}


def rest_of(masks: Sequence[Tensor]) -> Tensor:
    """What no character of the frame has."""
    return (1 - torch.stack(list(masks)).sum(0)).clamp(0, 1)


def from_maps(maps: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Masks of characters from their maps (h, w): where a map is high, and of several the highest, edges soft."""
    heights = torch.stack([_smooth(map_, grid) for map_ in maps.values()])
    heights = (heights - heights.flatten(1).quantile(FLOOR, dim=1)[:, None, None]).clamp(min=0)
    highest = heights.amax((1, 2), keepdim=True).clamp(min=1e-12)
    inside = ((heights / highest - LEAST) * STEEP + 0.5).clamp(0, 1)
    masks = {}
    for index, name in enumerate(maps):
        own = heights[index]
        others = torch.cat([heights[:index], heights[index + 1 :], torch.zeros_like(own)[None]]).amax(0)
        nearer = (own - others) / (own + others).clamp(min=1e-12)  # 0 at a border, 1 where no other is
        masks[name] = inside[index] * (nearer * STEEP / 2 + 0.5).clamp(0, 1)
    return masks


def _smooth(map_: Tensor, grid: Grid) -> Tensor:
    """On the latents' grid, averaged with its neighbours."""
    size = (grid.height, grid.width)
    large = functional.interpolate(map_[None, None].float(), size=size, mode="bilinear")
    around = max(1, round(SMOOTH * min(size) / 2 - 0.5))
    padded = functional.pad(large, (around,) * 4, mode="replicate")
    return functional.avg_pool2d(padded, 2 * around + 1, stride=1)[0, 0]


def layer_masks(masks: Sequence[Tensor], grid: Grid) -> dict[int, Tensor]:
    """(1, G, L) of the G groups' masks for every layer of L query tokens."""
    stacked = torch.stack(list(masks))[None]
    return {
        tokens: functional.adaptive_avg_pool2d(stacked, size).flatten(2)
        for tokens, size in grid.layers().items()
    }


def text_bias(
    masks: Mapping[str, Tensor], words: Mapping[str, Sequence[int]], count: int, grid: Grid
) -> dict[int, Tensor]:
    """(1, L, count) for every layer of L query tokens: what is added to the scores of `count` text tokens.

    words: a character's positions among them, which reach its mask; 0 for the words of nobody, which reach everything.
    """
    return key_bias([(mask, words.get(name, ())) for name, mask in masks.items()], count, grid)


def history_bias(
    masks: Mapping[str, Tensor], spoken: Mapping[str, Sequence[int]], count: int, grid: Grid
) -> dict[int, Tensor]:
    """(1, L, count) for every layer: what is added to the scores of `count` tokens of earlier frames.

    spoken: which of them speak of a character. They reach its mask and what nobody has, as earlier frames tell of more than
    who is in them; those that speak of nobody, or of somebody who has no mask, reach everything.
    """
    return key_bias(
        [
            (rest_of([mask for other, mask in masks.items() if other != name]), spoken.get(name, ()))
            for name in (masks if len(masks) > 1 else ())
        ],
        count,
        grid,
    )


def key_bias(reaches: Sequence[tuple[Tensor, Sequence[int]]], count: int, grid: Grid) -> dict[int, Tensor]:
    """(1, L, count) for every layer of L query tokens: 0, but the logarithm of a mask at the keys that it is of."""
    biases = {tokens: torch.zeros(1, tokens, count) for tokens in grid.layers()}
    there = [(mask, list(keys)) for mask, keys in reaches if len(keys)]
    if there:
        for tokens, layer in layer_masks([mask for mask, _ in there], grid).items():
            for mask, (_, keys) in zip(layer[0], there, strict=True):
                biases[tokens][0, :, keys] = mask.clamp(min=SILENT).log()[:, None]
    return biases


def self_bias(masks: Sequence[Tensor], grid: Grid) -> dict[int, Tensor]:
    """(1, L, L) for every bounded layer: what is added to the scores of self-attention: characters do not see each other.

    A character's pixels see its own and what nobody has (the denoising half of Bounded Attention, arXiv 2403.16990, section 4);
    between soft masks as much is lost of a pixel's weight as the two belong to different characters.
    """
    found = {}
    for tokens, size in grid.bounded_layers().items():
        flat = functional.adaptive_avg_pool2d(torch.stack(list(masks))[None], size).flatten(2)[0]
        whole = flat.sum(0)
        foreign = whole[:, None] * whole[None] - flat.T @ flat
        found[tokens] = (1 - foreign).clamp(min=SILENT).log()[None]
    return found


def cut_out(image: Image.Image, mask: Tensor, others: Tensor | None = None) -> Image.Image | None:
    """The part of a picture where a mask is high, with a margin, as near to a square as the picture allows; None if empty.

    others: (h, w) in [0, 1], where somebody else is, who is painted over with the colour of what nobody has.
    """
    rows, columns = (torch.nonzero(mask.amax(axis) >= 0.5).flatten() for axis in (1, 0))
    if not len(rows):
        return None
    height, width = mask.shape
    left, right = _with_margin(int(columns[0]) / width, (int(columns[-1]) + 1) / width, image.width)
    top, bottom = _with_margin(int(rows[0]) / height, (int(rows[-1]) + 1) / height, image.height)
    side = max(right - left, bottom - top)
    left, right = _widened(left, right, side, image.width)
    top, bottom = _widened(top, bottom, side, image.height)
    shown = image if others is None else _without(image, others, rest_of([mask, others]))
    return shown.crop((left, top, right, bottom))


def _without(image: Image.Image, others: Tensor, rest: Tensor) -> Image.Image:
    """The picture, others painted over with the median colour of the rest."""
    pixels = np.asarray(image)
    free = np.asarray(_as_picture(rest, image.size)) > 191
    colour = np.median(pixels[free] if free.any() else pixels.reshape(-1, 3), axis=0)
    paint = Image.new("RGB", image.size, tuple(round(value) for value in colour))
    return Image.composite(paint, image, _as_picture(others, image.size))


def _as_picture(mask: Tensor, size: tuple[int, int]) -> Image.Image:
    grey = Image.fromarray((mask * 255).round().to(torch.uint8).numpy())
    return grey.resize(size, Image.Resampling.BILINEAR)


def _with_margin(first: float, last: float, pixels: int) -> tuple[int, int]:
    return max(0, round((first - MARGIN) * pixels)), min(pixels, round((last + MARGIN) * pixels))


def _widened(first: int, last: int, side: int, pixels: int) -> tuple[int, int]:
    """The same middle at a length of `side`, moved to lie in the picture."""
    side = min(side, pixels)
    first = min(max(0, (first + last - side) // 2), pixels - side)
    return first, first + side
