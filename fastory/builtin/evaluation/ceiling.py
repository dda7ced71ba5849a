"""What a model without any fault of its own would score: python -m fastory.builtin.evaluation.ceiling --stories 100

The held-out stories as the drawn world shows them, every character with its own look in every frame, through the autoencoder,
and judged as a model's pictures are. What is missing to 1 is the autoencoder's and the judge's: a small penguin behind a book
has few pixels that tell its colour. With this autoencoder a UNet can score more only where its looks are easier to tell.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from fastory import StoryModel
from fastory.builtin.evaluation.classifier import FILE, Classifier, load_classifier
from fastory.builtin.evaluation.iterative import (
    CASTS,
    FRAMES,
    HeldOutStory,
    held_out_stories,
    judge,
    scores,
    summary,
)
from fastory.builtin.evaluation.quality import drawn_world, restore


def ceiling(
    classifier: Classifier, stories: Sequence[HeldOutStory], restored: Callable[[np.ndarray], np.ndarray]
) -> list[dict[str, float]]:
    """The scores of every story, as evaluation.iterative has them, none left out.

    restored: pictures (n, H, W, 3) uint8 -> the same through an autoencoder.
    """
    pairs = zip(stories, drawn_world(stories), strict=True)
    return [scores(judge(classifier, story, restored(pictures))) for story, pictures in pairs]


def main(arguments: list[str] | None = None) -> None:
    """Print a line a score: drawn, and through the autoencoder with its interval."""
    parser = argparse.ArgumentParser(prog="python -m fastory.builtin.evaluation.ceiling", description=__doc__)
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of every story, 4 to 40")
    parser.add_argument("--cast", choices=CASTS, default="mixed")
    parser.add_argument("--model", default="builtin")
    options = parser.parse_args(arguments)
    model, classifier = StoryModel.open(options.model), load_classifier(FILE)
    stories = held_out_stories(options.stories, options.seed, options.frames, options.cast)
    plain = summary(ceiling(classifier, stories, lambda pictures: pictures))
    through = summary(ceiling(classifier, stories, partial(restore, model)))
    print(f"{len(stories)} stories of seed {options.seed}: drawn, through the autoencoder")
    for name, (mean, low, high) in through.items():
        print(f"  {name:16s} {plain[name][0]:.3f}  {mean:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
