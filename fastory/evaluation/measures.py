"""Measures of drawn stories, every frame counted; a picture that cannot be read has its reason in place of a figure.

CLIP-T: the cosine of a frame's picture and its raw caption, mean over frames. CLIP-I: of a frame's picture and the true one.
CLIP-I (self): the mean cosine of a story's pictures with each other; DINO: the same by DINOv2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from fastory.errors import InputError
from fastory.evaluation.clip import Encoder, PictureEncoder, in_parts
from fastory.evaluation.journal import Journal, key_of
from fastory.evaluation.rows import Measured, Source, means
from fastory.evaluation.stories import DrawnStory
from fastory.files import sha256_of
from fastory.pictures import open_picture

ALONE = "fewer than two pictures"


@dataclass(frozen=True)
class Opened:
    """A story with its pictures read: those that can be, and why the others cannot, by frame."""

    story: DrawnStory
    images: Mapping[int, Image.Image]
    reasons: Mapping[int, str]

    @classmethod
    def of(cls, story: DrawnStory) -> Opened:
        """Reads every picture once."""
        images, reasons = dict[int, Image.Image](), dict[int, str]()
        for i, path in enumerate(story.pictures):
            try:
                images[i] = open_picture(path)
            except InputError as error:
                reasons[i] = str(error)
        return cls(story, images, reasons)

    def row(self, metric: str, value: float | None, by: Source, **more: object) -> Measured:
        """A row of the whole story; count and of are its frames unless said."""
        counts = {"count": len(self.images), "of": len(self.story.captions)}
        return Measured(metric, value, by, self.story.title, str(self.story.folder), **{**counts, **more})  # type: ignore[arg-type]


class Measure(Protocol):
    """What gives rows of one story at a time."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """All that its rows are measured by."""

    def rows(self, opened: Opened) -> Iterator[Measured]:
        """Rows of the frames, and of the story."""


class SetMeasure(Protocol):
    """What gives rows of all stories' pictures together."""

    def rows(self, stories: Sequence[Sequence[Path]]) -> Iterator[Measured]:
        """One a metric. stories: the pictures of each."""


def measure(
    stories: Sequence[DrawnStory],
    measures: Sequence[Measure],
    journal: Journal | None = None,
    of_all: Sequence[SetMeasure] = (),
) -> Iterator[Measured]:
    """Rows of every story by every measure, then the means over stories, then what is of all pictures together.

    What the journal has is not measured again.
    """
    kept = journal or Journal(None)
    found: list[Measured] = []
    for story in stories:
        opened: Opened | None = None
        for by in measures:
            key = key_of(story, type(by).__name__, by.sources)
            rows = kept.get(key)
            if rows is None:
                opened = opened or Opened.of(story)
                rows = list(by.rows(opened))
                kept.keep(key, rows)
            rows = [_of_this_folder(row, story) for row in rows]
            found += rows
            yield from rows
    yield from means(found)
    for measure_ in of_all:
        yield from measure_.rows([story.pictures for story in stories])


def _of_this_folder(row: Measured, story: DrawnStory) -> Measured:
    return replace(row, folder=str(story.folder))


@dataclass(frozen=True)
class ClipMeasure:
    """CLIP-T of every frame and story, and CLIP-I (self)."""

    encoder: Encoder

    @cached_property
    def source(self) -> Source:
        """The encoder."""
        return Source(self.encoder.name, self.encoder.sha256, {"captions": "raw"})

    @property
    def sources(self) -> tuple[Source, ...]:
        """The encoder."""
        return (self.source,)

    def rows(self, opened: Opened) -> Iterator[Measured]:
        """CLIP-T a frame, then of the story; CLIP-I (self) of the story."""
        features = in_parts(self.encoder, list(opened.images.values())) if opened.images else None
        yield from self._clip_t(opened, features)
        alike = None if features is None else off_diagonal_mean(features)
        yield opened.row("clip_i_self", alike, self.source, missing=None if alike is not None else ALONE)

    def _clip_t(self, opened: Opened, features: Tensor | None) -> Iterator[Measured]:
        story, found = opened.story, dict[int, float]()
        if features is not None:
            texts = self.encoder.captions(story.captions)
            found = {i: float(features[n] @ texts[i]) for n, i in enumerate(opened.images)}
        for i, caption in enumerate(story.captions):
            said = {"frame": i, "caption": caption, "count": int(i in found), "of": 1}
            yield opened.row("clip_t", found.get(i), self.source, missing=opened.reasons.get(i), **said)
        missing = None if found else next(iter(opened.reasons.values()), "no picture")
        yield opened.row("clip_t", mean_of(list(found.values())), self.source, missing=missing)


@dataclass(frozen=True)
class TruthMeasure:
    """CLIP-I of every frame's picture and the true one, as StoryGen reports it.

    truth: a folder with a folder of pictures for each story, called as the story's own; or with the pictures of the only one.
    """

    encoder: Encoder
    truth: Path

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The encoder, and the bytes of the true pictures."""
        digests = [sha256_of(path) for path in sorted(self.truth.rglob("frame-*.png"))]
        said = {"truth sha256": hashlib.sha256("".join(digests).encode()).hexdigest()}
        return (Source(self.encoder.name, self.encoder.sha256, said),)

    def rows(self, opened: Opened) -> Iterator[Measured]:
        """clip_i a frame, then of the story."""
        (by,) = self.sources
        own = self.truth / opened.story.folder.name
        folder = own if own.is_dir() else self.truth
        pictures = tuple(folder / path.name for path in opened.story.pictures)
        true = Opened.of(replace(opened.story, pictures=pictures))
        both = [i for i in opened.images if i in true.images]
        found = dict[int, float]()
        if both:
            pair = [
                in_parts(self.encoder, [images[i] for i in both]) for images in (opened.images, true.images)
            ]
            found = dict(zip(both, (pair[0] * pair[1]).sum(1).tolist(), strict=True))
        reasons = {**true.reasons, **opened.reasons}
        for i in range(len(opened.story.captions)):
            said = {"frame": i, "count": int(i in found), "of": 1}
            yield opened.row("clip_i", found.get(i), by, missing=reasons.get(i), **said)
        missing = None if found else next(iter(reasons.values()), "no picture")
        yield opened.row("clip_i", mean_of(list(found.values())), by, missing=missing, count=len(found))


@dataclass(frozen=True)
class DinoMeasure:
    """The mean cosine of a story's pictures with each other, by the class token of a DINOv2."""

    encoder: PictureEncoder

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The encoder."""
        return (Source(self.encoder.name, self.encoder.sha256, {"features": "class token"}),)

    def rows(self, opened: Opened) -> Iterator[Measured]:
        """Of the story."""
        images = list(opened.images.values())
        alike = off_diagonal_mean(in_parts(self.encoder, images)) if images else None
        yield opened.row("dino", alike, self.sources[0], missing=None if alike is not None else ALONE)


def off_diagonal_mean(features: Tensor) -> float | None:
    """The mean cosine of n normalised features (n, D) with each other; None for one alone."""
    count = len(features)
    if count < 2:
        return None
    cosines = features.double() @ features.double().T
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


def mean_of(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None
