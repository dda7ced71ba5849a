"""The measures that a command asks for, with their models opened, each model once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from fastory.errors import InputError
from fastory.evaluation.characters import CharacterMeasure
from fastory.evaluation.choices import MEASURES, Instruments
from fastory.evaluation.clip import Dino, Encoder, open_encoder
from fastory.evaluation.detectors import Detector, open_detector
from fastory.evaluation.distances import Features, SetDistance, open_features, pictures_below
from fastory.evaluation.judged import JudgeMeasure
from fastory.evaluation.measures import ClipMeasure, DinoMeasure, Measure, SetMeasure, TruthMeasure
from fastory.evaluation.vistory import VistoryMeasure

OF_ALL = ("fid", "kid")


@dataclass(frozen=True)
class Opened:
    """measures: of each story; of_all: of all pictures together; missing: what could not be opened, a line each."""

    measures: tuple[Measure, ...]
    of_all: tuple[SetMeasure, ...]
    missing: tuple[str, ...]


def open_measures(wanted: Instruments, *, whatever_there_is: bool = False) -> Opened:
    """The measures. Raises InputError for what is missing, unless whatever there is will do, which `missing` then names."""
    models, made, of_all, missing = _Models(wanted), list[Measure](), list[SetMeasure](), list[str]()
    for name in wanted.metrics:
        if name == "accs" and "afid" in wanted.metrics and not wanted.missing("afid"):
            continue  # aFID brings aCCS of the same crops
        try:
            if why := wanted.missing(name):
                raise InputError(why)
            if name in OF_ALL:
                of_all.append(_distance(models, name))
            else:
                made.append(MAKERS[name](models))
        except InputError as error:
            if not whatever_there_is:
                raise
            missing.append(f"not measured: {MEASURES[name]}: {error}")
    return Opened(tuple(made), tuple(of_all), tuple(missing))


class _Models:
    """Opened when the first measure asks for them."""

    def __init__(self, wanted: Instruments) -> None:
        self.wanted = wanted

    @cached_property
    def encoder(self) -> Encoder:
        return open_encoder(self.wanted.encoder, device=self.wanted.device, offline=self.wanted.offline)

    @cached_property
    def detector(self) -> Detector:
        return open_detector(self.wanted.detector, device=self.wanted.device, offline=self.wanted.offline)

    @cached_property
    def features(self) -> Features:
        return open_features(self.wanted.features, self.encoder, self.wanted.device)

    @cached_property
    def dino(self) -> Dino:
        return Dino(self.wanted.dino, device=self.wanted.device, offline=self.wanted.offline)


def _truth(models: _Models) -> TruthMeasure:
    assert models.wanted.truth is not None
    return TruthMeasure(models.encoder, models.wanted.truth)


def _distance(models: _Models, metric: str) -> SetDistance:
    truth = models.wanted.truth
    assert truth is not None
    if not (pictures := pictures_below(truth)):
        raise InputError(f"--truth {truth}: wanted a folder of true pictures, got one without any")
    return SetDistance(models.features, pictures, metric)


MAKERS: Mapping[str, Callable[[_Models], Measure]] = {
    "clip": lambda models: ClipMeasure(models.encoder),
    "clip_i": _truth,
    "dino": lambda models: DinoMeasure(models.dino),
    "accs": lambda models: CharacterMeasure(models.encoder, models.detector, None),
    "afid": lambda models: CharacterMeasure(models.encoder, models.detector, models.features),
    "cids": lambda models: VistoryMeasure(models.encoder, models.detector),
    "judge": lambda models: JudgeMeasure(),
}
