"""Fréchet and kernel distances of two sets of pictures, by torchmetrics, and the features that they are of.

The papers' features are Inception's 2048; any module that gives features of pictures will do, such as an encoder of `clip`.
torchmetrics is imported where it is used: the extra `eval`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from fastory.checkpoints.hashes import tensors_hash
from fastory.checkpoints.loading import loading
from fastory.checkpoints.pickles import read_pickle
from fastory.errors import InputError
from fastory.evaluation.choices import ENCODER, INCEPTION
from fastory.evaluation.clip import Encoder, parts
from fastory.evaluation.rows import Measured, Source
from fastory.files import folder_for
from fastory.intervals import GROUPS, jackknife
from fastory.pictures import open_picture

SIDE = 299  # px, Inception's
SUBSETS, SUBSET_SIZE, KID_SEED = 100, 1000, 0
RESIZED = f"{SIDE} x {SIDE}, bilinear with antialiasing"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Features(nn.Module):
    """A module as torchmetrics takes one: uint8 (n, 3, 299, 299) -> (n, D) float32. num_features: D."""

    name: str
    sha256: str
    num_features: int

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, D) features."""
        raise NotImplementedError


class EncoderFeatures(Features):
    """An encoder's L2-normalised picture features."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.name, self.sha256 = encoder, encoder.name, encoder.sha256
        self.num_features = encoder.pictures([Image.new("RGB", (SIDE, SIDE))]).shape[1]

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, D) features."""
        return self.encoder.pictures([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures])


class Inception(Features):
    """Inception-v3 with the weights of the first FID, 2048 features, by torch-fidelity through torchmetrics."""

    num_features = 2048

    def __init__(self, weights: Path | None, device: str) -> None:
        """weights: pt_inception-2015-12-05-6726825d.pth, whose code is not run, or a .safetensors of it; None fetches it.

        Raises InputError for another file.
        """
        super().__init__()
        with loading(
            f"{weights or 'the published Inception weights'}: not to be had, or not those of FID's Inception-v3"
        ):
            network: Any = _inception(_published() if weights is None else weights)
        self.network, self.device = network.to(device), device
        self.name, self.sha256 = "Inception-v3, pool of 2048", tensors_hash(network.state_dict())

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        """(n, 2048) features."""
        return self.network(pictures.to(self.device)).reshape(len(pictures), -1).float().cpu()


def _inception(weights: Path) -> nn.Module:
    """torch-fidelity would run what a pickle says, so it is given a file of our own with the tensors alone."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    tensors = load_file(weights) if weights.suffix == ".safetensors" else read_pickle(weights)
    with TemporaryDirectory() as folder:
        own = Path(folder) / "inception.pth"
        torch.save(dict(tensors), own)
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(own))


def _published() -> Path:
    """Where torch keeps what it downloads; fetched once, and checked by the hash in its name."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    file = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if not file.is_file():
        folder_for(file.parent, "give the file with --features")
        torch.hub.download_url_to_file(
            URL_INCEPTION_V3, str(file), file.stem.rsplit("-", 1)[1], progress=False
        )
    return file


def open_features(name: str, encoder: Encoder, device: str = "cpu") -> Features:
    """`encoder`, `inception`, or the path of Inception's weights."""
    if name == ENCODER:
        return EncoderFeatures(encoder)
    return Inception(None if name == INCEPTION else Path(name), device)


def prepared(images: Sequence[Image.Image]) -> Tensor:
    """uint8 (n, 3, 299, 299), resized by Pillow, bilinear with antialiasing."""
    small = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2).contiguous()


def features_of(features: Features, images: Sequence[Image.Image]) -> Tensor:
    """(n, D) float32."""
    return torch.cat([features(prepared(part)).float() for part in parts(images)])


def frechet(features: Features, generated: Sequence[Image.Image], real: Sequence[Image.Image]) -> float:
    """The Fréchet distance of two sets of at least two pictures (Heusel et al., arXiv 1706.08500)."""
    return fid_of(features_of(features, generated), features_of(features, real))


class SetDistance:
    """FID or KID of all stories' pictures together and of true ones, with a jackknife's interval over stories."""

    def __init__(self, features: Features, truth: Sequence[Path], metric: str) -> None:
        """truth: picture files. metric: `fid` or `kid`."""
        self.features, self.truth, self.metric = features, truth, metric

    @cached_property
    def source(self) -> Source:
        """The features."""
        said: dict[str, Any] = {"resized": RESIZED, "true pictures": len(self.truth)}
        if self.metric == "kid":
            said |= {"subsets": SUBSETS, "subset size at most": SUBSET_SIZE, "seed": KID_SEED}
        return Source(self.features.name, self.features.sha256, said)

    def rows(self, stories: Sequence[Sequence[Path]]) -> Iterator[Measured]:
        """Of generated pictures; those that cannot be read are left out and counted: a measure of stories tells why."""
        generated = [found for story in stories if (found := self._readable(story))]
        count = sum(map(len, generated))
        notes: dict[str, Any] = {"pictures": count}
        counts: dict[str, Any] = {"count": count, "of": sum(map(len, stories))}
        if min(count, len(self.truth)) < 2:
            why = "fewer than two pictures in a set"
            yield Measured(self.metric, None, self.source, missing=why, notes=notes, **counts)
            return
        value = DISTANCES[self.metric](torch.cat([row for story in generated for row in story]), self._real)
        low, high = self._interval(value, generated)
        if low is not None:
            notes["interval"] = "by the jackknife over stories"
        yield Measured(self.metric, value, self.source, low=low, high=high, notes=notes, **counts)

    def _interval(
        self, value: float, stories: Sequence[Sequence[Tensor]]
    ) -> tuple[float | None, float | None]:
        """None where a group of stories has all but one of the pictures."""
        groups = min(len(stories), GROUPS)
        dealt = [[row for story in stories[n::groups] for row in story] for n in range(groups)]
        others = [[row for m, group in enumerate(dealt) if m != n for row in group] for n in range(groups)]
        if groups < 2 or min(map(len, others)) < 2:
            return None, None
        left_out = LEFT_OUT[self.metric](self._real)
        low, high = jackknife(value, [left_out(torch.cat(rows)) for rows in others])
        return (max(0.0, low) if self.metric == "fid" else low), high

    def _readable(self, pictures: Sequence[Path]) -> list[Tensor]:
        """The features (1, D) of a story's pictures."""
        found = []
        for path in pictures:
            try:
                found.append(self._features(path))
            except InputError:
                continue
        return found

    @cached_property
    def _real(self) -> Tensor:
        return torch.cat([self._features(path) for path in self.truth])

    def _features(self, path: Path) -> Tensor:
        return features_of(self.features, [open_picture(path)])


class _Ready(nn.Module):
    """Features that are at hand pass through torchmetrics as they are."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid_of(generated: Tensor, real: Tensor) -> float:
    """The Fréchet distance of features (n, D) and (m, D)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    distance: Any = FrechetInceptionDistance(feature=_Ready(generated.shape[1]))
    distance.update(generated.double(), real=False)
    distance.update(real.double(), real=True)
    return max(0.0, float(distance.compute()))


def kid_of(generated: Tensor, real: Tensor) -> float:
    """The kernel distance (Binkowski et al., arXiv 1801.01401): 100 subsets of at most 1000, drawn from a fixed seed."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(generated), len(real), SUBSET_SIZE)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(KID_SEED)
        distance: Any = KernelInceptionDistance(_Ready(generated.shape[1]), subsets=SUBSETS, subset_size=size)
        distance.update(generated.double(), real=False)
        distance.update(real.double(), real=True)
        return float(distance.compute()[0])


DISTANCES = {"fid": fid_of, "kid": kid_of}


def fid_to(real: Tensor) -> Callable[[Tensor], float]:
    """The Fréchet distance to features (m, D), for many sets (n, D).

    As `fid_of`, in the time of n and m, which are mostly less than D: the trace of the root of the covariances' product is the
    sum of the singular values of A B', where A'A and B'B are the covariances.
    """
    mean, root = _moments(real)

    def distance(generated: Tensor) -> float:
        mean_of_them, root_of_them = _moments(generated)
        common = torch.linalg.svdvals(root_of_them @ root.T).sum()
        spread = (root_of_them**2).sum() + (root**2).sum() - 2 * common
        return max(0.0, float(((mean_of_them - mean) ** 2).sum() + spread))

    return distance


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and an R of at most D rows with R'R the covariance, float64."""
    mean = features.double().mean(0)
    upper = torch.linalg.qr(features.double() - mean, mode="r").R
    return mean, upper / (len(features) - 1) ** 0.5


def kid_to(real: Tensor) -> Callable[[Tensor], float]:
    """The kernel distance to features (m, D), for many sets (n, D): the unbiased estimate of Binkowski et al., equation 4.

    Of whole sets, as the chance of subsets would look like spread.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> float:
        of_pairs = kernel(x, x)
        return float(of_pairs.sum() - of_pairs.diagonal().sum()) / (len(x) * (len(x) - 1))

    true = real.double()
    within_true = within(true)
    return lambda generated: (
        within(generated.double()) + within_true - 2 * float(kernel(generated.double(), true).mean())
    )


LEFT_OUT = {"fid": fid_to, "kid": kid_to}


@contextmanager
def _quiet() -> Iterator[None]:
    """torchmetrics warns that KID holds every feature in memory."""
    with warnings.catch_warnings(action="ignore"):
        yield


def pictures_below(folder: Path) -> list[Path]:
    """Every picture file in a folder and those below it, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
