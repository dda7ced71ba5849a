"""Training stories of the drawn world, to tune the built-in model without a download:

python -m fastory.builtin.drawn_stories DIR --stories 1000 --frames 8 --seed 0
fastory tune DIR --model builtin --output ADAPTER.safetensors

No story shows a held-out scene, so `fastory.builtin.evaluate` measures what was never trained. Every third story went
through the built-in autoencoder: a history is made of pictures that the model drew.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from fastory import Story
from fastory.builtin import WEIGHTS
from fastory.builtin.autoencoder import to_pictures, to_tensor
from fastory.builtin.captions import caption, sample_names
from fastory.builtin.corpus import sample_training_tale
from fastory.builtin.networks import Network
from fastory.builtin.training import stream
from fastory.builtin.world import draw


def write_story(folder: Path, frames: int, seed: int, index: int, vae: Network) -> None:
    """One story as `fastory tune` reads it: story.yaml and frame-000.png .. in a new folder."""
    rng = stream("drawn story", seed, 0, index)
    tale = sample_training_tale(rng, frames)
    names = sample_names(rng, len(tale.cast))
    captions = [caption(rng, tale.cast, scene, names) for scene in tale.scenes]
    folder.mkdir(parents=True)
    story = Story.from_captions(captions, title=folder.name)
    (folder / "story.yaml").write_text(story.to_yaml(), encoding="utf-8")
    pictures = [draw(tale.cast, scene, rng) for scene in tale.scenes]
    for number, picture in enumerate(restored(vae, pictures) if index % 3 == 0 else pictures):
        picture.save(folder / f"frame-{number:03d}.png")


@torch.inference_mode()
def restored(vae: Network, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures as they come back from the autoencoder, one at a time: their bytes do not depend on the others."""
    tensors = (to_tensor(np.array(picture)[None]) for picture in pictures)
    return [
        Image.fromarray(to_pictures(vae.decode(vae.encode(t).latent_dist.mean).sample)[0]) for t in tensors
    ]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fastory.builtin.drawn_stories", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="new, or without stories of these names")
    parser.add_argument("--stories", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=8, help="of every story, 4 to 40")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 4 <= options.frames <= 40:
        parser.error(f"--frames: wanted 4 to 40, got {options.frames}")
    vae: Network = AutoencoderKL.from_pretrained(WEIGHTS / "vae").eval()
    for index in range(options.stories):
        write_story(options.folder / f"story-{index:05d}", options.frames, options.seed, index, vae)


if __name__ == "__main__":
    main()
