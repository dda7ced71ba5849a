"""What `fastory export` is asked for, told without PyTorch: bindings, targets and sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastory.errors import InputError

Bounds = tuple[int, int]

BINDINGS = ("ort", "portable", "trt")  # what computes an attention node


@dataclass(frozen=True)
class Groups:
    """Groups of references that a UNet takes, a number that is fixed in its graph.

    shown: the frames, and one for every character with pictures. characters: further ones, of characters' own appearances;
    with them every group has masks, which are inputs of the graph. boxes: biases are, too, by which characters' words and
    self-attention keep to their boxes.
    """

    shown: int = 1
    characters: int = 0
    boxes: bool = False

    @property
    def count(self) -> int:
        """G."""
        return self.shown + self.characters

    @property
    def masked(self) -> bool:
        """Whether groups reach a part of the picture."""
        return self.characters > 0

    def noted(self) -> dict[str, int | bool]:
        """What fastory.json says of characters; nothing where none have references of their own."""
        return {
            **({"characters": self.characters} if self.masked else {}),
            **({"boxes": True} if self.boxes else {}),
        }


SIDES = ("height", "width")
NAMES = ("batch", *SIDES, "text", "references", "keys")

# TensorRT for RTX 1.7 builds for GeForce and RTX cards: Turing, Ampere, Ada and Blackwell.
RTX_TARGETS = {
    "sm75": "7.5",
    "sm80": "8.0",
    "sm86": "8.6",
    "sm89": "8.9",
    "sm120": "12.0",
    "sm121": "12.1",
}


def parse_sizes(texts: Iterable[str]) -> dict[str, Bounds]:
    """`["batch=1:8", "width=512"]` -> {"batch": (1, 8), "width": (512, 512)}; height and width in pixels.

    Raises InputError for another form, an unknown name, a name that comes twice, and numbers that are no range.
    """
    sizes: dict[str, Bounds] = {}
    for text in texts:
        name, equals, bounds = text.partition("=")
        low, colon, high = bounds.partition(":")
        if not equals or name not in NAMES:
            raise InputError(f"--size {text}: wanted NAME=LEAST:MOST, NAME one of {', '.join(NAMES)}")
        if name in sizes:
            raise InputError(f"--size {text}: {name} was given before; give it once")
        try:
            sizes[name] = (int(low), int(high if colon else low))
        except ValueError:
            raise InputError(
                f"--size {text}: wanted whole numbers, {name}=LEAST:MOST, got {bounds!r}"
            ) from None
        if not 1 <= sizes[name][0] <= sizes[name][1]:
            raise InputError(f"--size {text}: wanted 1 or more, and the least first")
    return sizes


def check_target(target: str) -> None:
    """InputError for a GPU that TensorRT for RTX does not build for."""
    if target.lower() not in RTX_TARGETS:
        raise InputError(
            f"--rtx {target}: TensorRT for RTX builds for {', '.join(RTX_TARGETS)}; for other GPUs build with --trt "
            "on a machine that has one"
        )


def check_is_no_file(folder: Path) -> None:
    """InputError where a file stands in the place of an export's folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; wanted a folder, or a name that is free")


def check_binding(binding: str, groups: Groups) -> None:
    """InputError for what computes no attention node, and for less than one group of references."""
    if binding not in BINDINGS:
        raise InputError(f"--bind: wanted one of {', '.join(BINDINGS)}, got {binding!r}")
    if groups.shown < 1:
        raise InputError(f"--groups: wanted 1 or more, got {groups.shown}")
    if groups.characters < 0:
        raise InputError(f"--characters: wanted 0 or more, got {groups.characters}")
    if groups.boxes and not groups.characters:
        raise InputError(
            "--boxes is about characters with references of their own; give --characters as well"
        )
