"""Story folders with pictures, small enough to tune on in seconds: a square of the captioned colour on a gradient."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from fastory.tuning import loop
from fastory.tuning.tables import Tables

CAPTIONS = (
    ("a red fox in the sea", "the fox sleeps", "a fox swims in the sea"),
    ("a blue rabbit picks fruit", "the rabbit in the forest", "a rabbit sleeps", "robinson with a rabbit"),
    ("robinson in the sea", "robinson swims"),
)


def write_stories(folder: Path, side: int = 64) -> Path:
    """Three stories of 3, 4 and 2 frames, with random pictures of side x side pixels; the second as a run folder has them."""
    rng = np.random.default_rng(11)
    for number, captions in enumerate(CAPTIONS):
        story = folder / f"story-{number}"
        pictures = story / "frames" if number == 1 else story
        pictures.mkdir(parents=True)
        (story / "story.txt").write_text("\n".join(captions) + "\n")
        for i in range(len(captions)):
            blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize((side, side)).save(pictures / f"frame-{i:03d}.png")
    return folder


def write_paired_stories(folder: Path, side: int = 64) -> Path:
    """Beside the stories of `write_stories` others of the same captions: 0 gets two, 1 one, and 2 none."""
    rng = np.random.default_rng(3)
    for own, copy in ((0, 3), (0, 4), (1, 5)):
        shutil.copytree(folder / f"story-{own}", folder / f"story-{copy}")
        for file in (folder / f"story-{copy}").rglob("*.png"):
            blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize((side, side)).save(file)
    return folder


def encoded(run: loop.TuningRun, folder: Path, references: bool = False) -> Tables:
    """The tables of a run's stories, in `folder`, as a tuning has them when it begins to train."""
    list(loop.encode_examples(run.model, run.examples, run.size, folder / "tables", references))
    return loop.open_tables(run.model, run.examples, run.size, folder / "tables")
