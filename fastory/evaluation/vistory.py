"""ViStoryBench (arXiv 2505.24862): its figures that need no paid model and no non-commercial weights, and its folders.

CIDS, OCCM and copy-paste as its code v1.3.0 computes them, but for realistic humans, for whom it mixes in the features of
insightface (non-commercial). Scene, camera and action alignment want a paid vision-language model; CSD, aesthetics and
Inception score are the benchmark's own to compute: `export` writes the pictures as its reader takes them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastory import files
from fastory.errors import InputError
from fastory.evaluation.clip import Encoder, in_parts
from fastory.evaluation.detectors import VISTORYBENCH, Detector
from fastory.evaluation.measures import Opened, mean_of, off_diagonal_mean
from fastory.evaluation.rows import Measured, Source
from fastory.evaluation.stories import DrawnStory
from fastory.pictures import Picture, open_picture

TEMPERATURE = 0.01
NO_PICTURES = "no character has reference pictures: list them under `characters:` of the story"
NOBODY = "no character is annotated"
NOT_FOUND = "no character was found in any picture"
NUMBER = re.compile(r"\d+")


@dataclass
class Matched:
    """What was found of one character. features: of its matched crops, (D,) each; crops: of how many expected."""

    references: Tensor
    mirrored: Tensor
    features: list[Tensor] = field(default_factory=list)
    expected: int = 0


class VistoryMeasure:
    """cids_cross, cids_self, copy_paste and occm of a story."""

    def __init__(self, encoder: Encoder, detector: Detector) -> None:
        self.encoder, self.detector = encoder, detector

    @cached_property
    def source(self) -> Source:
        """The encoder and the detector, with thresholds as the benchmark's code has them."""
        thresholds = {"box threshold": VISTORYBENCH.box, "text threshold": VISTORYBENCH.text}
        named = {"detector": self.detector.name, "detector sha256": self.detector.sha256}
        return Source(self.encoder.name, self.encoder.sha256, {"benchmark": "v1.3.0", **named, **thresholds})

    @property
    def sources(self) -> tuple[Source, ...]:
        """The same."""
        return (self.source,)

    def rows(self, opened: Opened) -> Iterator[Measured]:
        """Coverage stands beside CIDS: a character that is missed in a picture does not lower it."""
        found, counts = self._matched(opened)
        yield self._occm(opened, counts)
        if not found:
            for metric in ("cids_cross", "cids_self", "copy_paste"):
                yield opened.row(metric, None, self.source, missing=NO_PICTURES)
            return
        crops, expected = sum(len(m.features) for m in found), sum(m.expected for m in found)
        seen = [m for m in found if m.features]
        notes: dict[str, int] = {
            "crops": crops,
            "expected": expected,
            "single crops": sum(len(m.features) == 1 for m in seen),
        }
        for metric, score in (("cids_cross", cross), ("cids_self", within), ("copy_paste", copy_paste)):
            value = mean_of([score(m) for m in seen])
            missing = None if value is not None else NOT_FOUND
            yield opened.row(metric, value, self.source, missing=missing, notes=notes)

    def _occm(self, opened: Opened, counts: Sequence[tuple[int, int]]) -> Measured:
        """Mean over the pictures in which somebody is expected."""
        value = mean_of([100 * exp(-abs(there - wanted) / (1e-6 + wanted)) for there, wanted in counts])
        notes = {
            "detected": sum(there for there, _ in counts),
            "expected": sum(wanted for _, wanted in counts),
        }
        missing = None if value is not None else NOBODY
        return opened.row("occm", value, self.source, missing=missing, notes=notes)

    def _matched(self, opened: Opened) -> tuple[list[Matched], list[tuple[int, int]]]:
        """The crops of each character with reference pictures, and (detected, expected) of every picture."""
        known = {c.name: self._references(c.references) for c in opened.story.characters if c.references}
        counts: list[tuple[int, int]] = []
        for frame, image in opened.images.items():
            expected = [c for c in opened.story.characters if frame in c.frames]
            if not expected:
                continue
            boxes = self.detector.find(image, frame, expected, VISTORYBENCH)
            counts.append((len(boxes), len(expected)))
            self._match(
                [known[c.name] for c in expected if c.name in known], [image.crop(box) for box in boxes]
            )
        return list(known.values()), counts

    def _references(self, paths: Sequence[Path]) -> Matched:
        images = [open_picture(path) for path in paths]
        return Matched(
            in_parts(self.encoder, images), in_parts(self.encoder, [ImageOps.mirror(i) for i in images])
        )

    def _match(self, expected: Sequence[Matched], crops: Sequence[Image.Image]) -> None:
        """Each character gets at most one crop, so that the cosines' sum is largest (Hungarian matching)."""
        from scipy.optimize import linear_sum_assignment

        for character in expected:
            character.expected += 1
        if not expected or not crops:
            return
        features = in_parts(self.encoder, crops)
        cosines = torch.stack([(character.references @ features.T).mean(0) for character in expected])
        for row, column in zip(*linear_sum_assignment(cosines.numpy(), maximize=True), strict=True):
            expected[row].features.append(features[column])


def cross(matched: Matched) -> float:
    """CIDS cross: the mean cosine of a character's crops and its reference pictures."""
    return float((torch.stack(matched.features).double() @ matched.references.double().T).mean())


def within(matched: Matched) -> float:
    """CIDS self: the mean cosine of a character's crops with each other; 1 for a single crop, as the benchmark has it."""
    found = off_diagonal_mean(torch.stack(matched.features))
    return 1.0 if found is None else found


def copy_paste(matched: Matched) -> float:
    """How much nearer crops are to the references than to their mirror images: 0.5 is not at all, 1 a copy."""
    crops = torch.stack(matched.features).double()
    pair = torch.stack([crops @ matched.references.double().T, crops @ matched.mirrored.double().T], -1)
    return float((pair / TEMPERATURE).softmax(-1)[..., 0].mean())


# Its folders: outputs/<method>/<mode>/<language>/<YYYYMMDD_HHMMSS>/<story>/shots/<nn>.png


def export(stories: Sequence[DrawnStory], folder: Path, *, when: str, method: str = "fastory") -> Path:
    """Write the pictures as ViStoryBench's reader takes them, each story beside its story file. Returns the run's folder.

    A story whose folder's name is a number keeps it, as the benchmark's own have; others are counted from 01. when:
    YYYYMMDD_HHMMSS. Raises InputError where something is there already, or a picture is missing: nothing is written then.
    """
    target = folder / method / "base" / "en" / when
    if target.exists():
        raise InputError(f"{target} exists; wanted a folder that is free for --export-vistorybench")
    names = [story.folder.name for story in stories]
    if not all(NUMBER.fullmatch(name) for name in names) or len({int(name) for name in names}) < len(names):
        names = [f"{n:02d}" for n in range(1, len(stories) + 1)]
    if lost := [path for story in stories for path in story.pictures if not path.is_file()]:
        raise InputError(f"{lost[0]} is missing; wanted every picture of the stories that are exported")
    files.folder_for(target.parent, "choose another folder")
    with files.unfinished(target, "exports into", "choose another folder") as working:
        for name, story in zip(names, stories, strict=True):
            _write(story, working / files.NEW / name)
        files.sync_tree(working / files.NEW)
        files.replace(working / files.NEW, target)
    return target


def _write(story: DrawnStory, folder: Path) -> None:
    files.make_folder(folder / "shots")
    for i, path in enumerate(story.pictures):
        files.write(folder / "shots" / f"{i:02d}.png", _as_png(path))
    if story.story is None:
        return
    characters = []
    for k, character in enumerate(story.story.characters):
        # a story file names pictures of its own folder alone
        copies = [folder / "references" / f"{k:02d}-{n:02d}.png" for n in range(len(character.references))]
        for copy, picture in zip(copies, character.references, strict=True):
            files.make_folder(copy.parent)
            files.write(copy, _as_png(picture))
        characters.append(replace(character, references=tuple(copies)))
    written = replace(story.story, characters=tuple(characters), first_frame=None)
    files.write(folder / "story.yaml", written.to_yaml(folder).encode())


def _as_png(picture: Picture) -> bytes:
    """The file's own bytes where it is a PNG."""
    data = picture.read_bytes() if isinstance(picture, Path) else picture.data
    if data.startswith(b"\x89PNG"):
        return data
    buffer = io.BytesIO()
    open_picture(picture).save(buffer, "PNG")
    return buffer.getvalue()
