"""Training stories of the drawn world, to tune the built-in model without a download:

python -m fastory.builtin.training.drawn_stories DIR --stories 1000 --frames 8 --seed 0
fastory tune DIR --model builtin --output ADAPTER.safetensors

With --paired N, N stories in a row have the same captions and places and other looks: what `--contrast` and
`--patches` learn from. With --said SHARE, captions of that share of the stories say something of colour, hat and scarf, every
other time; what is said, paired stories have in common. Two of one species have names: nothing else tells them apart.

No story shows a held-out scene, so fastory.builtin.evaluation measures what was never trained. Every third story went through
the built-in autoencoder: a history is made of pictures that the model drew.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from fastory import Story
from fastory.builtin import WEIGHTS
from fastory.builtin.training.autoencoder import to_pictures, to_tensor
from fastory.builtin.training.loop import stream
from fastory.builtin.training.networks import Network
from fastory.builtin.world.captions import NAMED, caption, sample_names
from fastory.builtin.world.corpus import ALIKE, HELD_OUT_LOOKS, sample_character, sample_training_tale
from fastory.builtin.world.drawing import COLOURS, Character, draw
from fastory.builtin.world.looks import NOTHING, Said, sample_said


@dataclass(frozen=True)
class Kind:
    """Which stories are drawn. said: share of those whose captions say looks. alike: of those of two, that have one species."""

    frames: int
    seed: int
    said: float = 0.0
    alike: float = ALIKE


def write_story(folder: Path, kind: Kind, index: int, vae: Network, variant: int = 0) -> None:
    """One story as `fastory tune` reads it: story.yaml and frame-000.png .. in a new folder.

    variant: above 0 another story of the same captions and places, with each character in another of the six colours, but for
    what captions say.
    """
    rng = stream("drawn story", kind.seed, 0, index)
    tale = sample_training_tale(rng, kind.frames, kind.alike)
    words = stream("said", kind.seed, 0, index)
    said = sample_said(words, len(tale.cast), kind.said, named=True)
    if variant:
        looks = other_looks(tale.cast, variant, stream("sibling", kind.seed, variant, index), said)
        tale = replace(tale, cast=looks)
    names = sample_names(rng, len(tale.cast), 1.0 if tale.alike else NAMED)
    captions = [caption(rng, tale.cast, scene, names, _every_other(words, said)) for scene in tale.scenes]
    folder.mkdir(parents=True)
    story = Story.from_captions(captions, title=folder.name)
    (folder / "story.yaml").write_text(story.to_yaml(), encoding="utf-8")
    pictures = [draw(tale.cast, scene, rng) for scene in tale.scenes]
    for number, picture in enumerate(restored(vae, pictures) if index % 3 == 0 else pictures):
        picture.save(folder / f"frame-{number:03d}.png")


def _every_other(rng: np.random.Generator, said: Sequence[Said]) -> tuple[Said, ...]:
    """What one caption says of each of a cast: all of `said`, or nothing."""
    return tuple(look if rng.random() < 0.5 else NOTHING for look in said)


def other_looks(
    cast: Sequence[Character], variant: int, rng: np.random.Generator, said: Sequence[Said] = ()
) -> tuple[Character, ...]:
    """The same species in other colours, hats and scarves; six variants, 0 to 5, have six colours.

    said: of each, what stays as it is.
    """
    looks = []
    for character, kept in zip(cast, said or (NOTHING,) * len(cast), strict=True):
        said_of_it = {name: getattr(character, name) for name in kept}
        for attempt in count():
            # Where hat and scarf are said, another colour is all that leads away from a held-out look.
            step = variant + attempt // 8
            colour = COLOURS[(COLOURS.index(character.colour) + step) % len(COLOURS)]
            look = replace(sample_character(rng, character.species), **{"colour": colour, **said_of_it})
            if (look.species, look.colour, look.hat, look.scarf) not in HELD_OUT_LOOKS:
                break
        looks.append(look)
    return tuple(looks)


@torch.inference_mode()
def restored(vae: Network, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures as they come back from the autoencoder, one at a time: their bytes do not depend on the others."""
    tensors = (to_tensor(np.array(picture)[None]) for picture in pictures)
    return [
        Image.fromarray(to_pictures(vae.decode(vae.encode(t).latent_dist.mean).sample)[0]) for t in tensors
    ]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastory.builtin.training.drawn_stories", description=__doc__
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="new, or without stories of these names")
    parser.add_argument("--stories", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=8, help="of every story, 4 to 40")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paired", type=int, default=1, help="stories of the same captions, 1 to 6")
    parser.add_argument(
        "--said", type=float, default=0.0, help="share of the stories whose captions say looks, 0 to 1"
    )
    parser.add_argument(
        "--alike", type=float, default=ALIKE, help="share of two characters that are of one species, 0 to 1"
    )
    # Its name of before.
    parser.add_argument(
        "--siblings", dest="paired", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    options = parser.parse_args(arguments)
    if not 1 <= options.paired <= len(COLOURS):
        parser.error(f"--paired: wanted 1 to {len(COLOURS)}, got {options.paired}")
    if not 4 <= options.frames <= 40:
        parser.error(f"--frames: wanted 4 to 40, got {options.frames}")
    for name in ("said", "alike"):
        if not 0 <= getattr(options, name) <= 1:
            parser.error(f"--{name}: wanted 0 to 1, got {getattr(options, name)}")
    kind = Kind(options.frames, options.seed, options.said, options.alike)
    vae: Network = AutoencoderKL.from_pretrained(WEIGHTS / "vae").eval()
    for number in range(options.stories):
        index, variant = divmod(number, options.paired)
        folder = options.folder / f"story-{number:05d}"
        write_story(folder, kind, index, vae, variant)


if __name__ == "__main__":
    main()
