"""Stories of the drawn world: which scenes there are, which ones are held out, and how stories are sampled."""

import json
from pathlib import Path

import numpy as np

from fastory.builtin.world.drawing import (
    ACTIONS,
    COLOURS,
    HATS,
    PLACES,
    SCARVES,
    SPECIES,
    Character,
    Role,
    Scene,
    Tale,
)

HELD_OUT_FILE = Path(__file__).with_name("held_out.json")

Triple = tuple[str, str, str]
Look = tuple[str, str, str, str]
"""Species, colour, hat, scarf."""


def choose_held_out(seed: int = 2024) -> list[Triple]:
    """48 of the 216 (species, place, action), eight per species, every place and every action at least once each.

    A place per species at least once makes two-character scenes possible in which both characters are held out.
    """
    rng = np.random.default_rng(seed)
    chosen: list[Triple] = []
    for species in SPECIES:
        actions = [*rng.permutation(ACTIONS), *rng.choice(ACTIONS, 2, replace=False)]
        first = actions[:6]
        extra_places = rng.permutation([i for i in range(6) if first[i] not in actions[6:]])[:2]
        places = [*PLACES, *(PLACES[i] for i in extra_places)]
        chosen += [(species, place, str(action)) for place, action in zip(places, actions, strict=True)]
    return sorted(chosen)


def choose_held_out_looks(seed: int = 2026) -> list[Look]:
    """72 of the 576 looks, twelve a species: every colour twice, every hat and every scarf three times.

    What is left shows every colour with every hat and scarf, so that a held-out look is a new combination of known parts.
    """
    rng = np.random.default_rng(seed)
    chosen: list[Look] = []
    for species in SPECIES:
        while True:
            columns = (
                rng.permutation(options * (12 // len(options))) for options in (COLOURS, HATS, SCARVES)
            )
            looks = {(species, str(a), str(b), str(c)) for a, b, c in zip(*columns, strict=True)}
            if len(looks) == 12:
                break
        chosen += looks
    return sorted(chosen)


def _committed(key: str) -> list[list[str]]:
    return json.loads(HELD_OUT_FILE.read_text(encoding="utf-8"))[key]


def held_out() -> frozenset[Triple]:
    """The committed (species, place, action) that no training picture shows. held_out.json, written before training."""
    return frozenset((a, b, c) for a, b, c in _committed("triples"))


def held_out_looks() -> frozenset[Look]:
    """The committed looks that no caption of a training says and, since captions may say looks, no picture of one shows."""
    return frozenset((a, b, c, d) for a, b, c, d in _committed("looks"))


HELD_OUT, HELD_OUT_LOOKS = held_out(), held_out_looks()
LOOKS = ("any", "trained", "held")
ALIKE = 1 / 6  # of the training stories of two characters: both are of one species


def triples(cast: tuple[Character, ...], scene: Scene) -> list[Triple]:
    """The (species, place, action) of every character in a scene."""
    return [(cast[role.member].species, scene.place, role.action) for role in scene.roles]


def sample_character(rng: np.random.Generator, species: str, looks: str = "any") -> Character:
    """A character with free attributes drawn uniformly. looks: `any`, `trained` ones or `held`-out ones."""
    while True:
        colour, hat, scarf = (options[rng.integers(len(options))] for options in (COLOURS, HATS, SCARVES))
        if looks == "any" or ((species, colour, hat, scarf) in HELD_OUT_LOOKS) == (looks == "held"):
            return Character(species, colour, hat, scarf)


def _sample_scene(
    rng: np.random.Generator, cast: tuple[Character, ...], members: list[int], held: bool
) -> Scene:
    """A scene whose triples are all held out, or none of them."""
    while True:
        place = PLACES[rng.integers(len(PLACES))]
        scene = Scene(place, tuple(Role(m, ACTIONS[rng.integers(len(ACTIONS))]) for m in members))
        among = [triple in HELD_OUT for triple in triples(cast, scene)]
        if all(among) if held else not any(among):
            return scene


def sample_cast(
    rng: np.random.Generator, cast_size: int, alike: bool = False, looks: str = "any"
) -> tuple[Character, ...]:
    """Characters of different species; alike: of one, each in another colour. looks: as in sample_character."""
    species = rng.permutation(SPECIES)[:cast_size]
    while True:
        cast = tuple(sample_character(rng, str(species[0] if alike else name), looks) for name in species)
        if not alike or len({character.colour for character in cast}) == cast_size:
            return cast


def sample_tale(
    rng: np.random.Generator,
    frames: int,
    cast_size: int,
    held: bool = False,
    alike: bool = False,
    looks: str = "any",
) -> Tale:
    """A story of 4-40 frames with recurring characters. held: only held-out scenes, else none of them.

    alike: the characters are of one species and of different colours. looks: as in sample_character.

    With two characters, half the frames show both, in either order, and a quarter each one alone. A scene is not
    drawn twice while other scenes of that cast are left.
    """
    if not 4 <= frames <= 40:
        raise ValueError(f"a story has 4 to 40 frames, not {frames}")
    cast = sample_cast(rng, cast_size, alike, looks)
    groups = [[0]] if cast_size == 1 else [[0], [1], [0, 1], [1, 0]]
    scenes: list[Scene] = []
    for _ in range(frames):
        members = groups[rng.integers(len(groups))]
        scene = _sample_scene(rng, cast, members, held)
        for _ in range(60):
            if scene not in scenes:
                break
            scene = _sample_scene(rng, cast, members, held)
        scenes.append(scene)
    return Tale(cast, tuple(scenes))


def sample_training_tale(rng: np.random.Generator, frames: int = 8, alike: float = ALIKE) -> Tale:
    """A story as training sees it, no held-out scene or look.

    Three of four have two characters, so that 3/8 of the frames do. alike: the share of these that has two of one species.
    """
    size = 1 + int(rng.random() < 0.75)
    return sample_tale(rng, frames, size, alike=size == 2 and rng.random() < alike, looks="trained")
