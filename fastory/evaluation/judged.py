"""The judge of the drawn world as a measure: what pictures show of what captions say, and whether looks agree.

It counts for the built-in model alone, and for stories in its words: see fastory.builtin.evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from fastory.builtin.evaluation.classifier import FILE, load_classifier
from fastory.builtin.evaluation.distinct import FREE
from fastory.builtin.evaluation.iterative import HeldOutStory, judge, scores
from fastory.builtin.world.drawing import SIZE
from fastory.builtin.world.reading import UnreadableCaption, read_tale
from fastory.evaluation.measures import Opened
from fastory.evaluation.rows import Measured, Source
from fastory.files import sha256_of

CAPTIONED = ("species", "place", "action", "both right")
NAMED = {"distinct": "judge_distinct", **{name: f"judge_{name}" for name in FREE}}


class JudgeMeasure:
    """Agreement of colour, hat and scarf, captions, and how distinct two characters are, a story."""

    def __init__(self) -> None:
        self.classifier = load_classifier()

    @cached_property
    def source(self) -> Source:
        """The classifier of fastory.builtin.evaluation."""
        return Source("judge of the drawn world", sha256_of(FILE))

    @property
    def sources(self) -> tuple[Source, ...]:
        """The classifier."""
        return (self.source,)

    def rows(self, opened: Opened) -> Iterator[Measured]:
        """judge_agreement: mean of the three shares of appearances that show the most frequent value; judge_captions: mean of
        the shares of frames with species, place and action, or both characters, as captioned."""
        try:
            found = self._scores(opened)
        except UnreadableCaption as error:
            yield opened.row(
                "judge_agreement", None, self.source, missing=f"the judge cannot read it: {error}"
            )
            return
        means = {
            "judge_agreement": [found[name] for name in FREE if name in found],
            "judge_captions": [found[name] for name in CAPTIONED if name in found],
            **{metric: [found[name]] for name, metric in NAMED.items() if name in found},
        }
        for metric, values in means.items():
            yield opened.row(metric, float(np.mean(values)) if values else None, self.source)

    def _scores(self, opened: Opened) -> dict[str, float]:
        """What fastory.builtin.evaluation.iterative computes of a round, by its names."""
        if opened.reasons:
            raise UnreadableCaption(next(iter(opened.reasons.values())))
        pictures = [np.asarray(opened.images[i]) for i in range(len(opened.story.captions))]
        if odd := [picture.shape for picture in pictures if picture.shape != (SIZE, SIZE, 3)]:
            raise UnreadableCaption(f"a picture of {odd[0][1]} x {odd[0][0]}; wanted {SIZE} x {SIZE}")
        tale = read_tale(opened.story.prompts)
        return scores(
            judge(self.classifier, HeldOutStory(tale, opened.story.captions, 0), np.stack(pictures))
        )
