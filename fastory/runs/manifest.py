"""manifest.json: what a run folder holds, as a schema. A manifest that does not say so exactly is never acted on.

It names every file that a run writes, so that nothing else in the folder is ever cleared or replaced, and carries a
checksum of itself, so that a changed byte in it is found before it changes a picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fastory.documents import read_json, validated
from fastory.errors import InputError
from fastory.settings import MODES, Settings

SCHEMA = 1
NAME = "manifest.json"
WHAT = "the manifest of a run folder"
TODO = "choose another --output"

MOST_FRAMES = 100_000
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[
    str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,5})$")
]  # of a round or a frame, as JSON's key
Kept = Annotated[str, StringConstraints(pattern=r"^[0-9]{3,6}$")]  # of a redraw, in history/
Name = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
ShapeName = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}x[0-9]{1,9}x[0-9]{1,9}$")]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Plain = None | bool | int | float | str


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Story(_Strict):
    title: str
    digest: Sha256
    rest: Sha256
    frames: Annotated[list[Sha256], Field(min_length=1, max_length=MOST_FRAMES)]
    parts: dict[Name, Sha256] | None = None  # of `rest`, since 2026-11
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)] | None] | None = None  # the frames' own, since 2026-11
    casts: list[Sha256] | None = (
        None  # a frame's characters and pictures as it was drawn with them, since 2026-11
    )


class _Picture(_Strict):
    sha256: Sha256
    seed: Seed
    left_out: str | None
    seconds: Annotated[float, Field(ge=0)]
    converged: Annotated[int, Field(ge=0, le=1000)] | None = None  # the round that this picture is from


class _Machine(_Strict):
    device: Annotated[str, StringConstraints(pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$")]
    dtype: Literal["float32", "float16", "bfloat16"]
    threads: Annotated[int, Field(ge=1, le=4096)]
    graphs: bool
    compiled: Literal[True] | None = None  # since 2026-11; of a run with compiled blocks alone
    # Since 2026-11; of a run whose self-attention was chosen by measurement alone: the backend by L x H x d.
    attention: dict[ShapeName, Annotated[str, StringConstraints(pattern=r"^[a-z]{1,30}$")]] | None = None
    versions: dict[Name, str]


class _Moving(_Strict):
    history: Annotated[str, StringConstraints(pattern=r"^history/[0-9]{3,6}$")]
    story: str


Pictures = dict[Number, dict[Number, _Picture]]


class _Redraw(_Strict):
    frames: Annotated[list[Annotated[int, Field(ge=0, lt=MOST_FRAMES)]], Field(min_length=1)]
    story: _Story
    seeds: dict[Number, Seed]
    pictures: Pictures
    dropped_seeds: list[Number] = []
    dropped_frames: list[
        Annotated[int, Field(ge=0, lt=MOST_FRAMES)]
    ] = []  # the story's last ones: an append taken back
    moving: _Moving | None = None


class _Manifest(_Strict):
    schema_: Annotated[int, Field(alias="schema", ge=1, le=SCHEMA)]
    checksum: Sha256 | None = None
    story: _Story
    settings: dict[Name, Plain | list[Plain]]
    sources: dict[Name, str]
    models: dict[Name, str]
    machine: _Machine
    batch_sizes: Annotated[
        list[Annotated[int, Field(ge=1, le=MOST_FRAMES)]], Field(min_length=1, max_length=MOST_FRAMES)
    ]
    seeds: dict[Number, Seed]
    pictures: Pictures
    products: dict[Name, Sha256]
    story_file: Sha256 | None = None
    inputs: dict[Annotated[str, StringConstraints(pattern=r"^inputs/[0-9a-f]{16}\.bmp$")], Sha256] = {}
    history: dict[Kept, list[Name]] = {}
    appended: dict[
        Kept, list[int]
    ] = {}  # since 2026-11: frames that came with a redraw of the history, and are there
    redraw: _Redraw | None = None
    anew: bool = False
    processes: list[Annotated[int, Field(ge=1)]] | None = None  # that drew, in turn; none where one alone did


def read_manifest(path: Path) -> dict[str, Any]:
    """The values of a manifest.json. Raises InputError for one that is damaged, of a newer schema, or not ours."""
    data = read_json(path, what=WHAT, todo=TODO)
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise InputError(
            f"{path} has schema {schema}; this version reads up to {SCHEMA}: use a newer fastory, or another --output"
        )
    parsed = validated(_Manifest, data, path, what=WHAT, todo=TODO)
    if parsed.checksum is not None and parsed.checksum != checksum(data):
        raise InputError(f"{path} is damaged (its checksum differs): wanted {WHAT} as it was written; {TODO}")
    _check_numbers(parsed, path)
    return data


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The file's content, with its checksum."""
    signed = {**manifest, "checksum": checksum(manifest)}
    return json.dumps(signed, ensure_ascii=False, indent=1, sort_keys=True).encode()


def checksum(manifest: Mapping[str, Any]) -> str:
    """Hex sha256 of all that a manifest says but its checksum."""
    said = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _check_numbers(manifest: _Manifest, path: Path) -> None:
    """Rounds and frames that the run does not have, and names that are no file of a run."""
    frames, rounds = len(manifest.story.frames), rounds_of(manifest.settings)
    redraw = manifest.redraw
    recorded = [*manifest.pictures.items(), *(redraw.pictures.items() if redraw else ())]
    wrong = [f"round {k}" for k, _ in recorded if int(k) >= rounds]
    numbers = [*manifest.seeds, *(number for pictures in manifest.pictures.values() for number in pictures)]
    wrong += [f"frame {number}" for number in numbers if int(number) >= frames]
    if redraw:
        then, dropped = len(redraw.story.frames), redraw.dropped_frames
        numbers = [*redraw.seeds, *redraw.dropped_seeds]
        numbers += [str(i) for i in redraw.frames if i not in dropped]
        numbers += [number for pictures in redraw.pictures.values() for number in pictures]
        wrong += [f"frame {number}" for number in numbers if int(number) >= then]
        wrong += ["fewer frames after a redraw"] if list(range(then, frames)) != dropped else []
    known = {*product_names(frames)}
    wrong += [f"the product {name!r}" for name in manifest.products if name not in known]
    kept = (name for names in manifest.history.values() for name in names)
    wrong += [f"history of {name!r}" for name in kept if not _is_picture(name, rounds)]
    added = (i for numbers in manifest.appended.values() for i in numbers)
    wrong += [f"the appended frame {i}" for i in added if not 0 <= i < frames]
    if wrong:
        raise InputError(f"{path} is damaged (it records {wrong[0]}): wanted {WHAT}; {TODO}")


def rounds_of(settings: Mapping[str, Any]) -> int:
    """How often every frame of a run with these settings is drawn."""
    mode, iterations = settings.get("mode"), settings.get("iterations", 0)
    traits = MODES.get(mode) if isinstance(mode, str) else None
    if type(iterations) is not int or (traits is not None and "iterations" not in traits.own):
        return 1
    return min(max(iterations, 0), 1000) + 1


def settings_of(manifest: Mapping[str, Any]) -> Settings:
    """The settings that a run is drawn with."""
    said = manifest["settings"].items()
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in said
    }
    return Settings(**values)


def picture_name(round: int, frame: int) -> str:
    """Where a round's picture lies in the run folder."""
    return f"iteration-{round:02d}/frame-{frame:03d}.png"


def numbers_of(name: str) -> tuple[int, int]:
    """Round and frame of a picture's name. Raises ValueError for another's."""
    round, _, frame = name.removeprefix("iteration-").removesuffix(".png").partition("/frame-")
    return int(round), int(frame)


def _is_picture(name: str, rounds: int) -> bool:
    """Whether a run of so many rounds has a picture of this name, or had one of a frame that was taken back."""
    try:
        round, frame = numbers_of(name)
    except ValueError:
        return False
    return 0 <= round < rounds and 0 <= frame < MOST_FRAMES and picture_name(round, frame) == name


def product_names(frames: int) -> list[str]:
    """What is written when all rounds are drawn."""
    return [*(f"frames/frame-{i:03d}.png" for i in range(frames)), "sheet.png", "storybook.html"]


def listed_files(manifest: Mapping[str, Any]) -> list[str]:
    """Every file that a run with this manifest may have written, but manifest.json: relative names."""
    frames, rounds = len(manifest["story"]["frames"]), rounds_of(manifest["settings"])
    pictures = [picture_name(k, i) for k in range(rounds) for i in range(frames)]
    redrawn = manifest.get("redraw") or {}
    staged = [f"redraw/{picture_name(k, i)}" for k in range(rounds) for i in redrawn.get("frames", ())]
    kept = [
        f"history/{number}/{name}" for number, names in manifest.get("history", {}).items() for name in names
    ]
    if moving := redrawn.get("moving"):
        kept += [f"{moving['history']}/{name.removeprefix('redraw/')}" for name in staged]
    return [*pictures, *product_names(frames), "story.yaml", *manifest.get("inputs", ()), *staged, *kept]
