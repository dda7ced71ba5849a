"""What is compared: a mode, or a preset, with settings of its own, by the word that names it on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastory.errors import InputError
from fastory.model_names import user_path
from fastory.pictures import Picture, pictures_or_noise
from fastory.presets import PRESETS
from fastory.settings import MODES, check, check_choice, choices
from fastory.wording import shown

INITIAL, WITH_INITIAL = "initial_pictures", ("iterative", "reference")


@dataclass(frozen=True)
class Method:
    """name: as it was given. settings: over those of the preset, the story and the model's folder. rounds: to be measured,
    the last one being how many are drawn; none where the mode has no rounds, or its own last round alone counts. initial:
    pictures in place of round 0, which is then not measured, or of a reference mode's bank."""

    name: str
    mode: str
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rounds: tuple[int, ...] = ()
    initial: tuple[Picture, ...] = ()

    @property
    def folder(self) -> str:
        """A name for any file system; two methods of a comparison have two."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.")


def words() -> tuple[str, ...]:
    """The words that name a method: every mode there is, those of plug-ins too, and every preset."""
    return tuple(dict.fromkeys((*choices("mode"), *PRESETS)))


def read_methods(text: str, rounds: Sequence[int] = ()) -> list[Method]:
    """The methods of WORD[+SETTING=VALUE..],WORD..; rounds: of --rounds.

    Raises InputError for a word that is neither a mode nor a preset, for a setting that its mode does not read, and for a
    method that is named twice.
    """
    methods = [_read(part.strip(), rounds) for part in text.split(",") if part.strip()]
    if not methods:
        raise InputError(f"--methods: wanted one or more of {', '.join(words())}, got none")
    folders = [method.folder for method in methods]
    if twice := [method.name for method in methods if folders.count(method.folder) > 1]:
        raise InputError(f"--methods: {twice[0]} is named twice; wanted every method once")
    return methods


def _read(text: str, rounds: Sequence[int]) -> Method:
    word, *own = text.split("+")
    preset = word if word in PRESETS and word not in MODES else None
    if preset is None and word not in words():
        raise InputError(f"--methods: wanted {', '.join(words())}, got {shown(word)}")
    mode = PRESETS[preset]["mode"] if preset else word
    check_choice("mode", mode, "--methods")  # a plug-in's mode is registered by it
    settings = dict(_setting(part, text, mode) for part in own)
    initial = settings.pop(INITIAL, ())
    if "iterations" not in MODES[mode].own or not rounds:
        return Method(text, mode, preset, settings, initial=initial)
    last = settings.setdefault("iterations", max(rounds))
    measured = {k for k in rounds if (1 if initial else 0) <= k <= last}
    return Method(text, mode, preset, settings, tuple(sorted(measured)) or (last,), initial)


def _setting(text: str, method: str, mode: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    if not equals:
        raise InputError(f"--methods: {shown(method)}: wanted SETTING=VALUE after +, got {shown(text)}")
    if name == INITIAL and mode in WITH_INITIAL:
        return name, _initial(value, method)
    foreign = {other for traits in MODES.values() for other in traits.own} - set(MODES[mode].own)
    if name in foreign or name in ("mode", INITIAL):
        raise InputError(
            f"--methods: {shown(method)}: {name} is no setting of {mode} mode; wanted one that it reads"
        )
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value  # a word, or FIRST:LAST
    return name, check(name, parsed, f"--methods {method}")


def _initial(value: str, method: str) -> tuple[Picture, ...]:
    user_path(value, f"--methods {shown(method)}")
    try:
        return tuple(pictures_or_noise(Path(value)))
    except InputError as error:
        raise InputError(f"--methods: {shown(method)}: {error}") from error


def parse_rounds(text: str | None) -> tuple[int, ...]:
    """The numbers of 0,1,3,5,10. Raises InputError for what no round can be."""
    if text is None:
        return ()
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (-1,)
    if min(found) < 0 or max(found) > 1000:
        raise InputError(f"--rounds: wanted numbers of rounds such as 0,1,3,5,10, got {shown(text)}")
    return tuple(sorted(set(found)))
