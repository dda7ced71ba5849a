"""Which measures a command makes, by the words that name them, and what each of them needs. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastory import packages
from fastory.errors import InputError
from fastory.model_names import local_encoder, user_path
from fastory.wording import shown

CLIP_B32 = "openai/clip-vit-base-patch32"
GROUNDING_DINO = "IDEA-Research/grounding-dino-tiny"  # Swin-T OGC
DINO_SMALL = "facebook/dinov2-small"
BUILTIN, BOXES, INCEPTION, ENCODER = "builtin", "boxes", "inception", "encoder"
ALL = "all"
# The words of --metrics, each with what it measures.
MEASURES: dict[str, str] = {
    "clip": "CLIP-T and CLIP-I of pictures with each other",
    "clip_i": "CLIP-I of pictures and the true ones of --truth",
    "dino": "DINO",
    "accs": "aCCS",
    "afid": "aCCS and aFID",
    "cids": "CIDS, OCCM and copy-paste of ViStoryBench",
    "fid": "FID to the pictures of --truth",
    "kid": "KID to the pictures of --truth",
    "judge": "the judge of the drawn world",
}
WITH_TRUTH, WITH_FEATURES = ("clip_i", "fid", "kid"), ("afid", "fid", "kid")

# Of ViStoryBench's figures.
NOT_COMPUTED = (
    "not computed here, for the benchmark's own code: insightface's features of realistic humans (non-commercial weights), "
    "scene, camera and action alignment (a paid vision-language model), CSD, aesthetics, Inception score"
)


@dataclass(frozen=True)
class Instruments:
    """What is measured, and by what.

    metrics: words of MEASURES. encoder: the CLIP model. detector: Grounding DINO, `builtin` or `boxes`. features: of FID, KID
    and aFID: `inception`, the path of its weights, or `encoder`. truth: a folder of true pictures.
    """

    metrics: tuple[str, ...]
    encoder: str = CLIP_B32
    detector: str = GROUNDING_DINO
    features: str = INCEPTION
    dino: str = DINO_SMALL
    truth: Path | None = None
    device: str = "cpu"
    offline: bool = False

    @classmethod
    def of(
        cls,
        metrics: Sequence[str],
        *,
        encoder: str | None,
        detector: str | None,
        features: str | None,
        dino: str | None,
        truth: Path | None,
        offline: bool,
    ) -> Instruments:
        """With the defaults of the papers, or those that need no download where the encoder is the built-in one."""
        name = encoder or CLIP_B32
        own = name == BUILTIN
        return cls(
            tuple(metrics),
            name,
            detector or (BUILTIN if own else GROUNDING_DINO),
            features or (ENCODER if own else INCEPTION),
            dino or DINO_SMALL,
            truth,
            offline=offline,
        )

    def check(self) -> None:
        """InputError for a name that is neither of something here nor of a hub, and for what its measures miss."""
        for name, free in ((self.encoder, (BUILTIN,)), (self.detector, (BUILTIN, BOXES)), (self.dino, ())):
            if name not in free:
                local_encoder(name)
        if self.truth is not None and not user_path(self.truth, "--truth").is_dir():
            raise InputError(f"--truth {self.truth}: wanted a folder of true pictures; there is none")
        if self.features not in (INCEPTION, ENCODER) and not user_path(self.features, "--features").is_file():
            raise InputError(
                f"--features {shown(self.features)}: wanted {INCEPTION}, {ENCODER}, or the file of Inception's weights "
                "(pt_inception-2015-12-05-6726825d.pth); there is none"
            )
        for metric in self.metrics:
            if why := self.missing(metric):
                raise InputError(why)

    def missing(self, metric: str) -> str:
        """Why a measure cannot be made, in one line; empty where nothing is known to be missing."""
        if metric in WITH_TRUTH and self.truth is None:
            return f"--metrics {metric} wants the true pictures: give their folder with --truth"
        try:
            if metric in WITH_FEATURES:
                packages.require(f"--metrics {metric}", "eval", "torchmetrics")
                if self.features != ENCODER:
                    packages.require(f"--metrics {metric} with Inception", "inception", "torch_fidelity")
            if metric == "cids":
                packages.require(f"--metrics {metric}", "eval", "scipy")
        except InputError as error:
            return str(error)
        if metric in WITH_FEATURES and self.features == INCEPTION and self.offline:
            return f"--offline forbids downloading Inception's weights for {metric}: give their file with --features"
        return ""


def read_metrics(text: str) -> tuple[str, ...]:
    """The words of NAME,NAME..; `all` stands for every one. Raises InputError for another word."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if strange := [name for name in names if name not in (*MEASURES, ALL)]:
        raise InputError(f"--metrics: wanted {', '.join((*MEASURES, ALL))}, got {shown(strange[0])}")
    if not names:
        raise InputError(f"--metrics: wanted one or more of {', '.join((*MEASURES, ALL))}, got none")
    return tuple(MEASURES) if ALL in names else tuple(dict.fromkeys(names))
