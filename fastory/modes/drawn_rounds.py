"""What pictures that are drawn give those that are not yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from fastory.events import FrameDrawn
from fastory.models.protocol import Model
from fastory.modes.finished import Finished
from fastory.modes.regions import Regions, Seen
from fastory.pictures import saturated
from fastory.settings import Settings

LOOKED_BACK = 3  # rounds that say whether a frame has converged


@dataclass(frozen=True)
class DrawnFrame:
    """A picture, and what it gives others: None where no round will ask."""

    event: FrameDrawn
    seen: Seen | None


@dataclass
class DrawnRounds:
    """The pictures of a story's rounds as references. One that was not drawn just now is loaded and encoded, once a round.

    converged: the frames that are finished, each with the round in which it was; see modes/converged.py.
    """

    model: Model
    settings: Settings
    finished: Finished
    regions: Regions | None
    converged: dict[int, int] = field(default_factory=dict)
    _seen: dict[tuple[int, int], Seen] = field(default_factory=dict)
    _means: dict[tuple[int, int], Seen] = field(default_factory=dict)
    _pictures: dict[tuple[int, int], Image.Image] = field(default_factory=dict)

    def begin(self, k: int) -> None:
        """Round k begins, or begins again: pictures that it drew before do not count, nor those that no round sees any more."""
        kept = range(k - (LOOKED_BACK if self.settings.until == "converged" else 1), k)
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] in kept}
        self._means = {key: mean for key, mean in self._means.items() if k - 2 <= key[0] < k}
        self._pictures = {key: image for key, image in self._pictures.items() if key[0] == k - 1}

    def encoded(self, k: int, frame: int, image: Image.Image, left_out: str | None) -> Seen:
        """What a picture of round k gives others. left_out: why it must not become a reference, None for one that may."""
        shown = saturated(image, self.settings.reference_saturation)
        whole = None if left_out else self.model.encode_reference(shown, self.settings.reference_fit)
        seen = Seen(whole) if self.regions is None else self.regions.see(frame, image, shown, whole)
        if whole is not None and self.settings.restarts(k + 1):
            # From the picture as it is saved: a resumed run has no other.
            seen = replace(seen, latents=self.model.encode_picture(image))
        return seen

    def add(self, k: int, frame: int, image: Image.Image, left_out: str | None) -> None:
        """A picture is a reference from now on. left_out: why it must not become one."""
        self.put(k, frame, self.encoded(k, frame, image, left_out))

    def finish(self, k: int, frame: int, seed: int, latents: Tensor) -> DrawnFrame:
        """Latents (1, c, h, w) decoded, and encoded as a reference. It changes nothing here: another thread may do it."""
        decoded = self.model.decode(latents)
        drawn = FrameDrawn(k, frame, decoded.image, seed, decoded.left_out)
        if k >= self.settings.iterations and self.settings.references_from != "latest":
            return DrawnFrame(drawn, None)
        return DrawnFrame(drawn, self.encoded(k, frame, decoded.image, decoded.left_out))

    def take(self, k: int, drawn: Iterable[DrawnFrame]) -> Iterator[FrameDrawn]:
        """Pictures of round k are passed on, and are references from now on."""
        for frame in drawn:
            if frame.seen is not None:
                self.put(k, frame.event.frame, frame.seen)
            yield frame.event

    def seen(self, k: int, frame: int) -> Seen:
        """What the picture of `frame` in round k gives others; nothing if it must not become a reference."""
        if (k, frame) not in self._seen:
            self.add(k, frame, *self.finished.load(k, frame))
        return self._seen[k, frame]

    def as_reference(self, k: int, frame: int) -> Seen:
        """What `frame` is as a reference after round k: its picture's tokens, with momentum their mean over rounds."""
        if not self.settings.reference_momentum:
            return self.seen(k, frame)
        known = next((j for j in range(k, 0, -1) if (j, frame) in self._means), 0)
        for j in range(known, k + 1):
            if (j, frame) not in self._means:
                now = self.seen(j, frame)
                self._means[j, frame] = self._mixed(self._means[j - 1, frame], now) if j else now
        return self._means[k, frame]

    def _mixed(self, before: Seen, now: Seen) -> Seen:
        """`now`, its tokens mixed with those of before where both are there. Masks and latents stay its own."""
        share = self.settings.reference_momentum

        def mix(old: Tensor | None, new: Tensor) -> Tensor:
            return new if old is None else torch.lerp(new.float(), old.float(), share).to(new.dtype)

        whole = None if now.whole is None else mix(before.whole, now.whole)
        own = {name: mix(before.own.get(name), tokens) for name, tokens in now.own.items()}
        return replace(now, whole=whole, own=own)

    def put(self, k: int, frame: int, seen: Seen) -> None:
        """What a picture that was drawn just now, here or in another process, gives others."""
        self._seen[k, frame] = seen

    def put_reference(self, k: int, frame: int, seen: Seen) -> None:
        """What a frame is as a reference after round k, as another process knows it."""
        self._seen[k, frame] = self._means[k, frame] = seen

    def keep(self, k: int, frame: int, image: Image.Image) -> None:
        """A picture that may stand for its frame in the next round, too."""
        if self.settings.until == "converged":
            self._pictures[k, frame] = image

    def picture(self, k: int, frame: int) -> Image.Image:
        """The picture of `frame` in round k."""
        there = self._pictures.get((k, frame))
        return self.finished.load(k, frame)[0] if there is None else there

    def of_round(self, k: int, frames: int) -> dict[int, Seen]:
        """What every frame is as a reference after a finished round; after round -1, before the first, none is."""
        return {j: self.as_reference(k, j) for j in range(frames if k >= 0 else 0)}
