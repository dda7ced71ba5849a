"""Where a character is in a picture: boxes that the story says, Grounding DINO, or the judge of the drawn world.

Boxes are (left, top, right, bottom) in pixels. TheaterGen asks for one character's noun and takes the first box; ViStoryBench
asks for all of a shot and takes every box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from fastory.builtin.evaluation.classifier import FILE, load_classifier
from fastory.builtin.words import SPECIES_WORDS
from fastory.builtin.world.drawing import SIZE, SPECIES
from fastory.checkpoints.hub import encoder_path
from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import component_weights
from fastory.evaluation.choices import BOXES, BUILTIN
from fastory.evaluation.clip import hash_of
from fastory.evaluation.stories import DrawnCharacter
from fastory.files import sha256_of

Pixels = tuple[int, int, int, int]
BY_SPECIES = {word: name for name, options in SPECIES_WORDS.items() for word in options}


@dataclass(frozen=True)
class Thresholds:
    """box: of a box's best word; text: of the words that it is called by."""

    box: float
    text: float


THEATERGEN, VISTORYBENCH = Thresholds(0.5, 0.25), Thresholds(0.25, 0.25)


class Detector(Protocol):
    """Finds characters. name, sha256: as a table has them; sha256 is None where no weights are asked."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str | None: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def find(
        self, image: Image.Image, frame: int, characters: Sequence[DrawnCharacter], thresholds: Thresholds
    ) -> list[Pixels]:
        """All boxes of these characters in the picture of a frame, the surest or first one first."""


def open_detector(name: str, *, device: str = "cpu", offline: bool = False) -> Detector:
    """`boxes`, `builtin`, a folder or an id of the hub. Raises InputError where it is neither here nor to be had."""
    if name == BOXES:
        return GivenBoxes()
    if name == BUILTIN:
        return JudgeDetector()
    return GroundingDino(name, device, offline)


class GivenBoxes:
    """The boxes that the story's frames say: nothing is detected."""

    name, sha256 = "boxes of the story", None
    settings: Mapping[str, Any] = {}

    def find(
        self, image: Image.Image, frame: int, characters: Sequence[DrawnCharacter], thresholds: Thresholds
    ) -> list[Pixels]:
        """Those of this frame, in the characters' order."""
        boxes = [character.boxes.get(frame) for character in characters]
        return [
            _pixels([s * side for s, side in zip(box, image.size * 2, strict=True)], image)
            for box in boxes
            if box
        ]


class JudgeDetector:
    """The judge names the animals, left and right: of two each has its half of the picture, one alone the whole."""

    name = "judge of the drawn world"
    settings: Mapping[str, Any] = {"boxes": "the whole picture, or its halves"}

    def __init__(self) -> None:
        self.classifier, self.sha256 = load_classifier(), sha256_of(FILE)

    def find(
        self, image: Image.Image, frame: int, characters: Sequence[DrawnCharacter], thresholds: Thresholds
    ) -> list[Pixels]:
        """From left to right."""
        small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        seen = self.classifier.see(np.array(small)[None])
        wanted = {BY_SPECIES.get(character.noun.lower()) for character in characters}
        slots = [SPECIES[int(slot)] for slot in seen.slots["species"][0][: 2 if seen.two[0] else 1]]
        width, height = image.size
        halves = [(0, 0, width // 2, height), (width // 2, 0, width, height)]
        boxes = halves if len(slots) == 2 else [(0, 0, width, height)]
        return [box for name, box in zip(slots, boxes, strict=True) if name in wanted]


class GroundingDino:
    """Grounding DINO as transformers saves it; the papers' is Swin-T OGC, IDEA-Research/grounding-dino-tiny."""

    settings: Mapping[str, Any] = {}

    def __init__(self, name: str, device: str = "cpu", offline: bool = False) -> None:
        from transformers import (
            AutoTokenizer,
            GroundingDinoForObjectDetection,
            GroundingDinoImageProcessorPil,
        )
        from transformers.models.grounding_dino import GroundingDinoProcessor

        folder = encoder_path(name, offline=offline)
        _, weights = component_weights(folder)
        with loading(f"{folder} is not a Grounding DINO with its tokenizer and preprocessor"):
            opened: Any = GroundingDinoForObjectDetection.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
            images = GroundingDinoImageProcessorPil.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor: Any = GroundingDinoProcessor(images, tokenizer)
        self.model = opened.to(device, torch.float32).eval().requires_grad_(False)
        self.device, self.name, self.sha256 = device, name, hash_of(weights)

    @torch.inference_mode()
    def find(
        self, image: Image.Image, frame: int, characters: Sequence[DrawnCharacter], thresholds: Thresholds
    ) -> list[Pixels]:
        """In the order of the model's queries, as the published evaluation takes them."""
        text = " ".join(f"{noun.lower()}." for noun in dict.fromkeys(c.noun for c in characters))
        inputs = self.processor(images=image.convert("RGB"), text=text, return_tensors="pt").to(self.device)
        (found,) = self.processor.post_process_grounded_object_detection(
            self.model(**inputs),
            inputs.input_ids,
            threshold=thresholds.box,
            text_threshold=thresholds.text,
            target_sizes=[(image.height, image.width)],
        )
        return [_pixels(box, image) for box in found["boxes"].tolist()]


def _pixels(box: Sequence[float], image: Image.Image) -> Pixels:
    """Whole pixels within the picture, at least one."""
    left, top = (min(max(0, int(value)), side - 1) for value, side in zip(box[:2], image.size, strict=True))
    right, bottom = (min(round(value), side) for value, side in zip(box[2:], image.size, strict=True))
    return left, top, max(left + 1, right), max(top + 1, bottom)
