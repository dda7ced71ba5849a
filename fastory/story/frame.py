"""What a story is made of: who appears in it, and its single pictures."""

from __future__ import annotations

from dataclasses import dataclass

from fastory.pictures import Picture, as_picture, as_pictures

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Character:
    """Who appears in a story.

    name: as it occurs in captions, as a whole word in any case.
    prompt: what follows the name's first occurrence in a caption, or None.
    references: pictures that show the character: paths, made absolute, and PIL pictures, kept as MemoryPicture.
    scale: weight of these pictures; None is the round's reference scale.
    """

    name: str
    prompt: str | None = None
    references: tuple[Picture, ...] = ()
    scale: float | None = None

    def __post_init__(self) -> None:
        """One picture stands for a list of one. InputError for what is no picture."""
        object.__setattr__(self, "references", as_pictures(self.references))


@dataclass(frozen=True)
class Frame:
    """One picture of a story.

    seed: overrides the run's noise for this frame, 0..2**63-1.
    characters: names of characters that the caption does not mention.
    boxes: (name, (left, top, right, bottom)) in fractions of the picture.
    masks: (name, a picture that is white where the character is, black where it is not, grey between).
    spoken: the caption with names in place of pronouns, where `Story.understood` found any.
    """

    caption: str
    seed: int | None = None
    characters: tuple[str, ...] = ()
    boxes: tuple[tuple[str, Box], ...] = ()
    masks: tuple[tuple[str, Picture], ...] = ()
    spoken: str | None = None

    def __post_init__(self) -> None:
        """Masks in memory are kept as files would be."""
        object.__setattr__(self, "masks", tuple((name, as_picture(mask)) for name, mask in self.masks))

    @property
    def is_laid_out(self) -> bool:
        """Whether it says where a character is."""
        return bool(self.boxes or self.masks)

    @property
    def text(self) -> str:
        """What the model is told: the caption, its pronouns understood."""
        return self.caption if self.spoken is None else self.spoken
