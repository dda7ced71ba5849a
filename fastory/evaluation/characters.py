"""aCCS and aFID, how alike the crops of a character are: TheaterGen (arXiv 2404.18919), as its evaluation computes them.

For each character of a story, in the frames that are annotated with it: the first frame in which it is detected gives the
reference crop, every other frame one comparison with it, 0 where the character was not detected. aCCS: the cosine of CLIP
picture features, mean over a character's comparisons, over the characters that have one, over stories. aFID: the Fréchet
distance of the later crops and of the reference, repeated once for each of them; a missed detection is a black picture of the
reference's size. Differs from the public script where that is wrong: it saves crops as JPEG and compares turn numbers as texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from fastory.evaluation.clip import Encoder, in_parts
from fastory.evaluation.detectors import THEATERGEN, Detector
from fastory.evaluation.distances import RESIZED, Features, frechet
from fastory.evaluation.measures import Opened, mean_of
from fastory.evaluation.rows import Measured, Source
from fastory.evaluation.stories import DrawnCharacter

NOBODY = "no character is annotated: list them under `characters:` of the story"
SEEN_ONCE = "no character has two annotated frames with a picture: nothing to compare"
FEW = "fewer than two later crops"


@dataclass(frozen=True)
class Crops:
    """One character in the annotated frames that have a picture, in the order of the frames; None where it was missed."""

    character: DrawnCharacter
    found: tuple[Image.Image | None, ...]

    @property
    def reference(self) -> int | None:
        """Which of them is the reference: the first that was detected."""
        return next((n for n, crop in enumerate(self.found) if crop is not None), None)

    @property
    def comparisons(self) -> list[Image.Image | None]:
        """All but the reference: frames before it, in which the character was missed, and the later ones."""
        first = self.reference or 0
        return [*self.found[:first], *self.found[first + 1 :]]


def crops_of(opened: Opened, detector: Detector) -> list[Crops]:
    """The crops of every character of a story."""
    found = []
    for character in opened.story.characters:
        frames = [frame for frame in character.frames if frame in opened.images]
        if frames:
            crops = (_first(opened.images[frame], frame, character, detector) for frame in frames)
            found.append(Crops(character, tuple(crops)))
    return found


def _first(
    image: Image.Image, frame: int, character: DrawnCharacter, detector: Detector
) -> Image.Image | None:
    boxes = detector.find(image, frame, [character], THEATERGEN)
    return image.crop(boxes[0]) if boxes else None


class CharacterMeasure:
    """aCCS, and aFID where there are features for it, of a story."""

    def __init__(self, encoder: Encoder, detector: Detector, features: Features | None) -> None:
        self.encoder, self.detector, self.features = encoder, detector, features

    @cached_property
    def source(self) -> Source:
        """The encoder and the detector of aCCS."""
        return Source(self.encoder.name, self.encoder.sha256, self._detection())

    @property
    def sources(self) -> tuple[Source, ...]:
        """All that its rows are measured by."""
        return (self.source,) if self.features is None else (self.source, self.distance_source)

    @cached_property
    def distance_source(self) -> Source:
        """The features of aFID, and the detector."""
        assert self.features is not None
        return Source(self.features.name, self.features.sha256, {**self._detection(), "resized": RESIZED})

    def _detection(self) -> dict[str, object]:
        thresholds = {"box threshold": THEATERGEN.box, "text threshold": THEATERGEN.text}
        named = {"detector": self.detector.name, "detector sha256": self.detector.sha256}
        return {**named, **self.detector.settings, **(thresholds if self.detector.sha256 else {})}

    def rows(self, opened: Opened) -> Iterator[Measured]:
        """Beside each score stand the crops, how many were expected, the misses, and the characters without a comparison."""
        if not opened.story.characters:
            yield opened.row("accs", None, self.source, missing=NOBODY)
            return
        crops = crops_of(opened, self.detector)
        expected, there = sum(len(c.found) for c in crops), sum(x is not None for c in crops for x in c.found)
        alone = sum(not c.comparisons for c in crops)
        notes = {
            "crops": there,
            "expected": expected,
            "misses": expected - there,
            "characters seen once": alone,
        }
        score = self._accs(crops)
        missing = None if score is not None else SEEN_ONCE
        yield opened.row("accs", score, self.source, missing=missing, notes=notes)
        if self.features is not None:
            yield self._afid_row(opened, crops)

    def _accs(self, crops: Sequence[Crops]) -> float | None:
        """The mean over characters of the mean over comparisons."""
        scores = [self._ccs(entry) for entry in crops if entry.comparisons]
        return mean_of(scores)

    def _ccs(self, crops: Crops) -> float:
        """The mean cosine with the reference, 0 for a miss, of a character that has comparisons."""
        later = [crop for crop in crops.comparisons if crop is not None]
        if not later:
            return 0.0
        reference = crops.found[crops.reference or 0]
        assert reference is not None
        features = in_parts(self.encoder, [reference, *later]).double()
        return float((features[1:] @ features[0]).sum()) / len(crops.comparisons)

    def _afid_row(self, opened: Opened, crops: Sequence[Crops]) -> Measured:
        """Characters that are never detected have no reference, so they are left out, and counted."""
        assert self.features is not None
        later, references, lost = list[Image.Image](), list[Image.Image](), 0
        for entry in crops:
            if entry.reference is None:
                lost += 1
                continue
            reference = entry.found[entry.reference]
            assert reference is not None
            black = Image.new("RGB", reference.size)
            later += [crop or black for crop in entry.comparisons]
            references += [reference] * len(entry.comparisons)
        notes = {"crops compared": len(later), "characters never detected": lost}
        if len(later) < 2:
            return opened.row("afid", None, self.distance_source, missing=FEW, notes=notes)
        value = frechet(self.features, later, references)
        return opened.row("afid", value, self.distance_source, notes=notes)
