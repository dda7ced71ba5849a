"""The drawn world: flat cartoon animals in six places, drawn with Pillow.

A caption names species, place and action. Body colour, hat and scarf are free: no caption mentions them, so only
references or a history can make a story consistent in them.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
SUPERSAMPLING = 3

SPECIES = ("rabbit", "turtle", "fox", "penguin", "bear", "cat")
PLACES = ("forest", "snow", "beach", "house", "city", "mountain")
ACTIONS = ("standing", "jumping", "sleeping", "flag", "ball", "book")
COLOURS = ("red", "yellow", "green", "blue", "purple", "gray")
HATS = ("none", "cone", "tophat", "crown")
SCARVES = ("none", "orange", "turquoise", "white")

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in shares of the picture, 0..1."""

INK: Colour = (34, 28, 36)
WHITE: Colour = (255, 255, 255)
BODY_RGB: dict[str, Colour] = {
    "red": (224, 52, 54),
    "yellow": (252, 214, 56),
    "green": (64, 176, 76),
    "blue": (56, 108, 228),
    "purple": (150, 76, 200),
    "gray": (158, 160, 166),
}
SCARF_RGB: dict[str, Colour] = {"orange": (255, 136, 20), "turquoise": (40, 220, 214), "white": WHITE}


@dataclass(frozen=True)
class Character:
    """An animal with its free attributes, the same in every frame of its story."""

    species: str
    colour: str
    hat: str
    scarf: str


@dataclass(frozen=True)
class Role:
    """What the character with this index in the cast does in a frame."""

    member: int
    action: str


@dataclass(frozen=True)
class Scene:
    """One frame: one role, or two roles from left to right, in a place."""

    place: str
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class Tale:
    """A cast of one or two characters and the frames they recur in."""

    cast: tuple[Character, ...]
    scenes: tuple[Scene, ...] = field(default_factory=tuple)

    @property
    def alike(self) -> bool:
        """Whether two of the cast are of one species."""
        return len({character.species for character in self.cast}) < len(self.cast)


class Pen:
    """Draws outlined shapes in coordinates whose unit is `unit` picture widths, from (x, y), y downwards."""

    def __init__(self, draw: ImageDraw.ImageDraw, x: float, y: float, unit: float) -> None:
        self.draw, self.x, self.y, self.unit = draw, x, y, unit
        self.pixels = SIZE * SUPERSAMPLING
        # Outlines keep about 1.7 final pixels whatever the character's size: thinner ones blur in the latents.
        self.outline = round(1.7 * SUPERSAMPLING)
        self._drawn: list[Point] = []

    def _place(self, point: Point) -> Point:
        placed = self.x + point[0] * self.unit, self.y + point[1] * self.unit
        self._drawn.append(placed)
        return placed[0] * self.pixels, placed[1] * self.pixels

    def box(self) -> Box:
        """What encloses all that was drawn, cut at the picture's edges; a stroke counts without its width."""
        across, down = zip(*self._drawn, strict=True)
        left, top = max(0.0, min(across)), max(0.0, min(down))
        return left, top, min(1.0, max(across)), min(1.0, max(down))

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour, outlined: bool = True) -> None:
        box = (*self._place((x - rx, y - ry)), *self._place((x + rx, y + ry)))
        self.draw.ellipse(
            box, fill=fill, outline=INK if outlined else None, width=self.outline if outlined else 0
        )

    def polygon(self, points: list[Point], fill: Colour, outlined: bool = True) -> None:
        placed = [self._place(point) for point in points]
        self.draw.polygon(placed, fill=fill)
        if outlined:
            self.draw.line([*placed, placed[0], placed[1]], fill=INK, width=self.outline, joint="curve")

    def rectangle(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        self.draw.rectangle((*self._place((left, top)), *self._place((right, bottom))), fill=fill)

    def line(self, points: list[Point], fill: Colour, width: float) -> None:
        pixels = max(1, round(width * self.unit * self.pixels))
        self.draw.line([self._place(point) for point in points], fill=fill, width=pixels, joint="curve")

    def limb(self, start: Point, end: Point, fill: Colour, width: float) -> None:
        """A thick outlined stroke with a round end."""
        border = 2 * self.outline / (self.unit * self.pixels)
        self.ellipse(*end, width / 2 + border / 2, width / 2 + border / 2, INK, outlined=False)
        self.line([start, end], INK, width + border)
        self.line([start, end], fill, width)
        self.ellipse(*end, width / 2, width / 2, fill, outlined=False)


def lighter(colour: Colour, share: float = 0.6) -> Colour:
    red, green, blue = (int(value + (255 - value) * share) for value in colour)
    return red, green, blue


def _forest(pen: Pen, shift: float) -> None:
    pen.rectangle(0, 0, 1, 1, (190, 232, 240))
    pen.rectangle(0, 0.7, 1, 1, (150, 206, 112))
    for x in (0.06, 0.36, 0.66, 0.96):
        pen.rectangle(x + shift - 0.03, 0.4, x + shift + 0.03, 0.76, (126, 88, 58))
        pen.ellipse(x + shift, 0.3, 0.14, 0.22, (88, 156, 100), outlined=False)


def _snow(pen: Pen, shift: float) -> None:
    pen.rectangle(0, 0, 1, 1, (176, 200, 228))
    pen.ellipse(0.25 + shift, 0.84, 0.6, 0.2, (248, 250, 254), outlined=False)
    pen.rectangle(0, 0.76, 1, 1, (248, 250, 254))
    for row, y in enumerate((0.08, 0.26, 0.44, 0.6)):
        for column in range(4):
            pen.ellipse((column + 0.5 * (row % 2) + 0.25) / 4 + shift, y, 0.022, 0.022, WHITE, outlined=False)


def _beach(pen: Pen, shift: float) -> None:
    pen.rectangle(0, 0, 1, 1, (160, 222, 252))
    pen.rectangle(0, 0.46, 1, 0.7, (56, 150, 206))
    pen.rectangle(0, 0.68, 1, 1, (244, 224, 170))
    pen.ellipse(0.86 + shift, 0.15, 0.1, 0.1, (255, 228, 96), outlined=False)


def _house(pen: Pen, shift: float) -> None:
    pen.rectangle(0, 0, 1, 1, (244, 214, 184))
    pen.rectangle(0, 0.74, 1, 1, (178, 124, 86))
    pen.rectangle(shift + 0.04, 0.12, shift + 0.32, 0.46, WHITE)
    pen.rectangle(shift + 0.06, 0.14, shift + 0.3, 0.44, (156, 212, 244))
    pen.rectangle(shift + 0.17, 0.14, shift + 0.19, 0.44, WHITE)
    pen.rectangle(shift + 0.72, 0.14, shift + 0.96, 0.36, (134, 76, 62))
    pen.rectangle(shift + 0.75, 0.17, shift + 0.93, 0.33, (250, 240, 204))


def _city(pen: Pen, shift: float) -> None:
    pen.rectangle(0, 0, 1, 1, (40, 44, 96))
    pen.rectangle(0, 0.78, 1, 1, (92, 94, 112))
    pen.ellipse(0.86 + shift, 0.13, 0.08, 0.08, (252, 248, 206), outlined=False)
    for x, top in ((0.0, 0.26), (0.22, 0.42), (0.44, 0.22), (0.66, 0.36), (0.88, 0.28)):
        pen.rectangle(x + shift, top, x + shift + 0.18, 0.78, (68, 74, 132))
        for row in range(3):
            for column in range(2):
                left, upper = x + shift + 0.03 + 0.075 * column, top + 0.05 + 0.12 * row
                pen.rectangle(left, upper, left + 0.045, upper + 0.06, (250, 222, 120))


def _mountain(pen: Pen, shift: float) -> None:
    pen.rectangle(0, 0, 1, 1, (212, 236, 252))
    for peak, top, shade in ((0.22, 0.12, (150, 142, 158)), (0.8, 0.2, (126, 120, 138))):
        x = peak + shift
        pen.polygon([(x - 0.44, 0.82), (x, top), (x + 0.44, 0.82)], shade, outlined=False)
        pen.polygon([(x - 0.1, top + 0.16), (x, top), (x + 0.1, top + 0.16)], WHITE, outlined=False)
    pen.rectangle(0, 0.76, 1, 1, (168, 192, 118))


_BACKGROUNDS = {
    "forest": _forest,
    "snow": _snow,
    "beach": _beach,
    "house": _house,
    "city": _city,
    "mountain": _mountain,
}


@dataclass(frozen=True)
class _Pose:
    """Where the parts of a body are: feet at y = 0, up is negative."""

    body_y: float
    body_rx: float
    body_ry: float
    head_y: float
    hands: tuple[Point, Point]
    feet_x: float


_POSES = {
    "standing": _Pose(-0.28, 0.21, 0.25, -0.66, ((-0.3, -0.2), (0.3, -0.2)), 0.11),
    "jumping": _Pose(-0.28, 0.21, 0.25, -0.66, ((-0.38, -0.56), (0.38, -0.56)), 0.2),
    "flag": _Pose(-0.28, 0.21, 0.25, -0.66, ((-0.3, -0.2), (0.36, -0.42)), 0.11),
    "ball": _Pose(-0.28, 0.21, 0.25, -0.66, ((-0.3, -0.2), (0.34, -0.32)), 0.11),
    "book": _Pose(-0.28, 0.21, 0.25, -0.66, ((-0.2, -0.24), (0.2, -0.24)), 0.11),
    "sleeping": _Pose(-0.17, 0.36, 0.15, -0.4, ((0, 0), (0, 0)), 0),
}


def _tail(pen: Pen, species: str, pose: _Pose, colour: Colour) -> None:
    y = pose.body_y
    if species == "fox":
        pen.polygon([(0.1, y + 0.1), (0.44, y - 0.2), (0.46, y + 0.12)], colour)
        pen.polygon([(0.44, y - 0.2), (0.34, y - 0.1), (0.455, y - 0.03)], WHITE, outlined=False)
    elif species == "cat":
        pen.limb((0.14, y + 0.12), (0.36, y + 0.06), colour, 0.07)
        pen.limb((0.36, y + 0.06), (0.4, y - 0.2), colour, 0.07)
    elif species == "turtle":
        pen.ellipse(0, y, pose.body_rx + 0.14, pose.body_ry + 0.04, (140, 100, 62))


def _ears(pen: Pen, species: str, y: float, colour: Colour) -> None:
    for side in (-1, 1):
        if species == "rabbit":
            pen.ellipse(side * 0.17, y - 0.28, 0.075, 0.2, colour)
            pen.ellipse(side * 0.17, y - 0.28, 0.03, 0.13, (255, 204, 208), outlined=False)
        elif species == "bear":
            pen.ellipse(side * 0.2, y - 0.15, 0.1, 0.1, colour)
        elif species in ("fox", "cat"):
            tip = 0.36 if species == "fox" else 0.28
            pen.polygon([(side * 0.07, y - 0.15), (side * 0.24, y - tip), (side * 0.26, y - 0.02)], colour)


def _muzzle(pen: Pen, species: str, y: float) -> None:
    if species == "penguin":
        pen.polygon([(-0.08, y + 0.04), (0.08, y + 0.04), (0, y + 0.14)], (255, 160, 40))
    elif species == "turtle":
        pen.line([(-0.08, y + 0.08), (0, y + 0.11), (0.08, y + 0.08)], INK, 0.03)
    else:
        pink = species in ("rabbit", "cat")
        pen.ellipse(0, y + 0.07, 0.045, 0.035, (240, 110, 140) if pink else INK, outlined=False)
    if species == "cat":
        for side in (-1, 1):
            pen.line([(side * 0.13, y + 0.08), (side * 0.34, y + 0.04)], INK, 0.022)
            pen.line([(side * 0.13, y + 0.11), (side * 0.34, y + 0.14)], INK, 0.022)


def _head(pen: Pen, species: str, y: float, colour: Colour, asleep: bool) -> None:
    _ears(pen, species, y, colour)
    rx, ry = (0.22, 0.19) if species == "turtle" else (0.27, 0.22)
    pen.ellipse(0, y, rx, ry, colour)
    if species == "penguin":
        for side in (-1, 1):
            pen.ellipse(side * 0.1, y + 0.03, 0.12, 0.14, WHITE, outlined=False)
    elif species == "fox":
        pen.polygon([(-0.21, y + 0.06), (0, y), (0.21, y + 0.06), (0, y + 0.2)], WHITE, outlined=False)
    elif species == "bear":
        pen.ellipse(0, y + 0.09, 0.13, 0.09, lighter(colour), outlined=False)
    for side in (-1, 1):
        if asleep:
            pen.line([(side * 0.1 - 0.06, y - 0.02), (side * 0.1 + 0.06, y - 0.02)], INK, 0.04)
        else:
            pen.ellipse(side * 0.1, y - 0.03, 0.042, 0.055, INK, outlined=False)
    _muzzle(pen, species, y)


def _hat(pen: Pen, kind: str, y: float) -> None:
    """Hats differ in both outline and colour, and are as wide as the head, so that one glance tells them apart."""
    if kind == "cone":
        pen.polygon([(-0.17, y + 0.04), (0, y - 0.28), (0.17, y + 0.04)], (240, 60, 160))
        pen.ellipse(0, y - 0.27, 0.055, 0.055, WHITE)
    elif kind == "tophat":
        pen.rectangle(-0.15, y - 0.26, 0.15, y, INK)
        pen.rectangle(-0.15, y - 0.09, 0.15, y - 0.03, (226, 40, 50))
        pen.rectangle(-0.25, y - 0.02, 0.25, y + 0.05, INK)
    elif kind == "crown":
        points = [(-0.19, y + 0.05), (-0.22, y - 0.19), (-0.1, y - 0.08), (0, y - 0.24)]
        pen.polygon([*points, (0.1, y - 0.08), (0.22, y - 0.19), (0.19, y + 0.05)], (255, 196, 24))


def _scarf(pen: Pen, colour: Colour, y: float) -> None:
    pen.polygon([(0.04, y), (0.18, y), (0.18, y + 0.24), (0.04, y + 0.24)], colour)
    pen.polygon([(-0.24, y - 0.06), (0.24, y - 0.06), (0.24, y + 0.06), (-0.24, y + 0.06)], colour)


def _prop(pen: Pen, action: str) -> None:
    if action == "flag":
        pen.line([(0.38, -0.02), (0.38, -1.02)], (110, 70, 40), 0.05)
        pen.polygon([(0.38, -1.02), (0.66, -0.88), (0.38, -0.72)], (236, 60, 40))
    elif action == "ball":
        pen.ellipse(0.4, -0.15, 0.16, 0.16, WHITE)
        pen.rectangle(0.27, -0.2, 0.53, -0.1, (240, 90, 40))
    elif action == "book":
        pen.polygon(
            [(-0.24, -0.38), (0, -0.31), (0.24, -0.38), (0.24, -0.12), (0, -0.05), (-0.24, -0.12)], WHITE
        )
        pen.line([(0, -0.31), (0, -0.05)], INK, 0.025)
    elif action == "sleeping":
        for x, y, size in ((0.3, -0.66, 0.12), (0.44, -0.9, 0.16)):
            stroke = [(x, y), (x + size, y), (x, y + size), (x + size, y + size)]
            pen.line(stroke, WHITE, 0.1)
            pen.line(stroke, (44, 50, 120), 0.05)


def _character(pen: Pen, character: Character, action: str) -> None:
    colour, pose, asleep = BODY_RGB[character.colour], _POSES[action], action == "sleeping"
    if asleep:
        pen.ellipse(0, -0.05, 0.46, 0.1, (240, 236, 250))  # a cushion: lying down is told at a glance
    _tail(pen, character.species, pose, colour)
    if not asleep:
        foot = (255, 160, 40) if character.species == "penguin" else colour
        for side in (-1, 1):
            pen.ellipse(side * pose.feet_x, -0.03, 0.1, 0.06, foot)
    pen.ellipse(0, pose.body_y, pose.body_rx, pose.body_ry, colour)
    belly = WHITE if character.species == "penguin" else lighter(colour)
    pen.ellipse(0, pose.body_y + 0.03, pose.body_rx * 0.6, pose.body_ry * 0.68, belly, outlined=False)
    if not asleep:
        for side, hand in zip((-1, 1), pose.hands, strict=True):
            pen.limb((side * 0.17, -0.4), hand, colour, 0.09)
    _head(pen, character.species, pose.head_y, colour, asleep)
    if character.scarf != "none":
        _scarf(pen, SCARF_RGB[character.scarf], pose.head_y + 0.22)
    _hat(pen, character.hat, pose.head_y - (0.16 if character.species == "turtle" else 0.19))
    _prop(pen, action)


def draw(cast: tuple[Character, ...], scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene, RGB, 128 x 128, supersampled three times.

    One character stands in the middle, the first of two on the left and the second on the right; rng moves
    characters and background by a few pixels.
    """
    return draw_with_boxes(cast, scene, rng)[0]


def draw_with_boxes(
    cast: tuple[Character, ...], scene: Scene, rng: np.random.Generator
) -> tuple[Image.Image, tuple[Box, ...]]:
    """The picture that `draw` gives, and around each role's character, with what it wears and holds, its box."""
    pixels = SIZE * SUPERSAMPLING
    image = Image.new("RGB", (pixels, pixels))
    canvas = ImageDraw.Draw(image)
    _BACKGROUNDS[scene.place](Pen(canvas, 0, 0, 1), rng.uniform(-0.04, 0.04))
    boxes: list[Box] = []
    centres, unit = ((0.48,), 0.68) if len(scene.roles) == 1 else ((0.25, 0.69), 0.52)
    for role, centre in zip(scene.roles, centres, strict=True):
        x, ground = centre + rng.uniform(-0.025, 0.025), 0.92 + rng.uniform(-0.015, 0.015)
        Pen(canvas, x, ground, unit).ellipse(0, 0, 0.3, 0.035, (84, 84, 96), outlined=False)
        lift = 0.2 * unit if role.action == "jumping" else 0
        pen = Pen(canvas, x, ground - lift, unit)
        _character(pen, cast[role.member], role.action)
        boxes.append(pen.box())
    return image.reduce(SUPERSAMPLING), tuple(boxes)
