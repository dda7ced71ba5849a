"""CLIP-T and CLIP-I of drawn stories, every frame counted.

CLIP-T: the cosine of a frame's picture and its raw caption, mean over frames. CLIP-I (self): the mean cosine of a story's
pictures with each other. A picture that cannot be read has its reason in place of a figure, and the story says how many
frames its means are of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from fastory.errors import InputError
from fastory.evaluation.clip import Clip
from fastory.evaluation.stories import DrawnStory
from fastory.pictures import open_picture

AT_ONCE = 16  # pictures


@dataclass(frozen=True)
class FrameMeasured:
    """One frame. clip_t: None where the picture could not be read; missing then says why."""

    story: str
    frame: int
    caption: str
    clip_t: float | None
    missing: str | None = None


@dataclass(frozen=True)
class StoryMeasured:
    """One story. clip_i_self: None with fewer than two pictures. frames: how many the means are of, of how many."""

    story: str
    folder: str
    clip_t: float | None
    clip_i_self: float | None
    frames: int
    of: int


@dataclass(frozen=True)
class Summary:
    """Means over stories, each story counting once. encoder: what the features are of. left_out: stories without a figure."""

    encoder: str
    stories: int
    clip_t: float | None
    clip_i_self: float | None
    left_out: int


Row = FrameMeasured | StoryMeasured | Summary


def measure(clip: Clip, stories: Sequence[DrawnStory], encoder: str) -> Iterator[Row]:
    """A row for each frame and story, and the summary. encoder: its name, for the table."""
    rows: list[StoryMeasured] = []
    for story in stories:
        images, reasons = _opened(story)
        features = (
            torch.cat([clip.pictures(part) for part in _parts(list(images.values()))]) if images else None
        )
        texts = clip.captions(story.captions)
        found: dict[int, float] = {}
        if features is not None:
            found = {i: float(features[n] @ texts[i]) for n, i in enumerate(images)}
        for i, caption in enumerate(story.captions):
            yield FrameMeasured(story.title, i, caption, found.get(i), reasons.get(i))
        rows.append(
            StoryMeasured(
                story.title,
                str(story.folder),
                _mean(list(found.values())),
                None if features is None else off_diagonal_mean(features),
                len(images),
                len(story.captions),
            )
        )
        yield rows[-1]
    whole = [row for row in rows if row.clip_t is not None]
    alike = [row.clip_i_self for row in rows if row.clip_i_self is not None]
    means = [row.clip_t for row in whole if row.clip_t is not None]
    yield Summary(encoder, len(rows), _mean(means), _mean(alike), len(rows) - len(whole))


def off_diagonal_mean(features: Tensor) -> float | None:
    """The mean cosine of n normalised features (n, D) with each other; None for one alone."""
    count = len(features)
    if count < 2:
        return None
    cosines = features.double() @ features.double().T
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


def _opened(story: DrawnStory) -> tuple[dict[int, Image.Image], dict[int, str]]:
    """The pictures that can be read, and why the others cannot, by frame."""
    images, reasons = dict[int, Image.Image](), dict[int, str]()
    for i, path in enumerate(story.pictures):
        try:
            images[i] = open_picture(path)
        except InputError as error:
            reasons[i] = str(error)
    return images, reasons


def _parts(images: Sequence[Image.Image]) -> Iterator[Sequence[Image.Image]]:
    yield from (images[first : first + AT_ONCE] for first in range(0, len(images), AT_ONCE))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
