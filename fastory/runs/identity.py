"""What a run folder belongs to: a story under resolved settings, and the words for what differs from another."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastory.settings import MODES, Settings
from fastory.story import Story
from fastory.wording import numbers_listed, shown

CAST = (
    "characters",
    "first frame",
)  # parts of a story that may be others in a redraw: what it draws is drawn with these


@dataclass(frozen=True)
class Identity:
    """What a run folder belongs to. Two runs with one identity draw the same bytes on the same machine.

    story: Story.digest; rest: everything but the frames, and parts: its parts, by name; frames: a digest a frame; seeds:
    the frames' own; casts: a digest a frame of its characters with their prompts and pictures, and of a first frame that is
    read: a redraw knows by them which frames were drawn with others. inputs: pictures that were given in memory, their sha256
    by the name a run folder keeps them under. settings: resolved. models: sha256 by file name, LoRA weights included. dtype:
    only where it was asked for.
    """

    title: str
    story: str
    rest: str
    parts: Mapping[str, str]
    frames: tuple[str, ...]
    seeds: tuple[int | None, ...]
    casts: tuple[str, ...]
    settings: Mapping[str, Any]
    models: Mapping[str, str]
    dtype: str | None
    inputs: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, story: Story, settings: Settings, models: Mapping[str, str], dtype: str | None) -> Identity:
        """The identity of a story under resolved settings."""
        frames = tuple(story.frame_digest(i) for i in range(len(story.frames)))
        seeds = tuple(frame.seed for frame in story.frames)
        plain = json.loads(json.dumps(settings.identity()))
        rest, parts = story.digest_without_frames(), _parts(story)
        inputs = {picture.name: picture.sha256 for picture in story.inputs()}
        casts = _casts(story, settings.mode)
        return cls(
            story.title, story.digest(), rest, parts, frames, seeds, casts, plain, dict(models), dtype, inputs
        )

    def digest(self) -> str:
        """sha256 of story and settings; its first 8 hex digits name the default folder."""
        named = [self.story, self.settings, sorted(self.models.items()), self.dtype]
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """The story as a manifest holds it."""
        return {
            "title": self.title,
            "digest": self.story,
            "rest": self.rest,
            "parts": dict(self.parts),
            "frames": list(self.frames),
            "seeds": list(self.seeds),
            "casts": list(self.casts),
        }

    def record_after(self, manifest: Mapping[str, Any], redrawn: Collection[int]) -> dict[str, Any]:
        """The story as a manifest holds it once these frames are drawn anew: the others keep what they were drawn with."""
        there = self._casts_there(manifest["story"])
        kept = [
            there[i] if i < len(there) and i not in redrawn else cast for i, cast in enumerate(self.casts)
        ]
        return {**self.record(), "casts": kept}

    def differences(self, manifest: Mapping[str, Any], redrawn: Sequence[int] | None = None) -> list[str]:
        """What differs from the run that `manifest` describes, one line each; the frames' own text is left to `changed`.

        redrawn: the frames that are drawn anew. Frames that were appended are no difference where all of them are among these.
        """
        appended = self.appended(manifest)
        joined = bool(appended) and redrawn is not None and set(appended) <= set(redrawn)
        lines = [] if joined else self._story_differences(manifest["story"], () if redrawn is None else CAST)
        there = manifest["settings"]
        lines += [
            f"{name}: {shown(there.get(name))} there, {shown(self.settings.get(name))} here"
            for name in sorted({*there, *self.settings})
            if there.get(name) != self.settings.get(name)
        ]
        if manifest["models"] != self.models:
            lines.append("the model, its adapter or its LoRAs: other weights")
        if self.dtype and manifest["machine"]["dtype"] != self.dtype:
            lines.append(f"dtype: {manifest['machine']['dtype']} there, {self.dtype} here")
        return lines

    def _story_differences(self, there: Mapping[str, Any], but: Collection[str]) -> list[str]:
        """The story's title, number of frames, characters, ..: each by name where the manifest tells them apart.

        but: parts that may differ.
        """
        if there["rest"] == self.rest:
            return []
        lines = []
        if there["title"] != self.title:
            lines.append(f"the story: {shown(there['title'])} there, {shown(self.title)} here")
        if len(there["frames"]) != len(self.frames):
            lines.append(_frames_added_or_removed(there["frames"], self.frames))
        if not there.get("parts"):
            return lines or ["the story's characters, style, negative prompt or pictures"]
        return [*lines, *(f"the story's {name}" for name in self._other_parts(there) if name not in but)]

    def _other_parts(self, there: Mapping[str, Any]) -> list[str]:
        """Names of parts that differ, those that only one of the two has among them; a manifest of before 2026-11 has none."""
        parts = there.get("parts") or self.parts
        return [name for name in sorted({*parts, *self.parts}) if parts.get(name) != self.parts.get(name)]

    def appended(self, manifest: Mapping[str, Any]) -> list[int]:
        """Frames after the last one of the run; none where anything of the story differs but its frames and its cast."""
        there = manifest["story"]
        other = set(self._other_parts(there)) - set(CAST)
        if there["title"] != self.title or not there.get("parts") or other:
            return []
        return list(range(len(there["frames"]), len(self.frames)))

    def changed(self, manifest: Mapping[str, Any]) -> list[int]:
        """Frames whose caption, seed or cast differs from the manifest's."""
        there = manifest["story"]["frames"]
        return [i for i, digest in enumerate(self.frames) if i >= len(there) or there[i] != digest]

    def recast(self, manifest: Mapping[str, Any]) -> list[int]:
        """Frames of the run that were drawn with other prompts or pictures of their characters, or another first frame."""
        there = self._casts_there(manifest["story"])
        return [i for i, (was, now) in enumerate(zip(there, self.casts, strict=False)) if was != now]

    def goes_on_from_another(self, manifest: Mapping[str, Any]) -> bool:
        """Whether its mode draws all frames from a first one that is another picture than the run's."""
        reads = MODES[self.settings["mode"]].first_frame
        return reads and "first frame" in self._other_parts(manifest["story"])

    def _casts_there(self, there: Mapping[str, Any]) -> list[str]:
        """What each of the run's frames was drawn with. A manifest of before 2026-11 says it of the whole cast alone."""
        if there.get("casts"):
            return list(there["casts"])
        same = not set(self._other_parts(there)) & set(CAST)
        unknown, nobody = there["rest"], _sha256([])
        count = len(there["frames"])
        return [cast if same or cast == nobody else unknown for cast in self.casts[:count]]


def run_paths(stories: Sequence[Story], output: str | Path | None) -> list[Path | None]:
    """One run folder a story: `output` itself, or with several stories output/<slug>, numbered where slugs repeat."""
    if output is None:
        return [None] * len(stories)
    if len(stories) == 1:
        return [Path(output)]
    slugs: list[str] = []
    for story in stories:
        slug, n = story.slug, 2
        while slug in slugs:
            slug, n = f"{story.slug}-{n}", n + 1
        slugs.append(slug)
    return [Path(output) / slug for slug in slugs]


def _parts(story: Story) -> dict[str, str]:
    """Hashes of what digest_without_frames hashes as one, so that a difference can be named."""
    pictures = story.picture_digests()
    cast = [[c.name, c.prompt, c.scale, [pictures[path] for path in c.references]] for c in story.characters]
    first = pictures[story.first_frame] if story.first_frame else None
    initial = [pictures[picture] for picture in story.initial_pictures]
    parts = {
        "style": story.style,
        "negative prompt": story.negative_prompt,
        "characters": cast,
        "first frame": first,
        **({"initial pictures": initial} if initial else {}),
    }
    return {name: _sha256(value) for name, value in parts.items()}


def _casts(story: Story, mode: str) -> tuple[str, ...]:
    """A hash a frame of who is in it, as far as the mode reads it."""
    traits, pictures = MODES[mode], story.picture_digests()
    first = [pictures[story.first_frame]] if story.first_frame and traits.first_frame else []
    said: dict[str, list[Any]] = {}
    for character in story.characters:
        shown = [pictures[picture] for picture in character.references] if traits.character_pictures else []
        said[character.name] = [
            character.name,
            character.prompt,
            *([character.scale, shown] if shown else []),
        ]
    return tuple(
        _sha256([*first, *(said[name] for name in sorted(story.cast(i)))]) for i in range(len(story.frames))
    )


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _frames_added_or_removed(there: Sequence[str], here: Sequence[str]) -> str:
    """One line that says which frames came or went, counted from 0."""
    blocks = difflib.SequenceMatcher(a=list(there), b=list(here), autojunk=False).get_opcodes()
    removed = [
        i for kind, first, last, _, _ in blocks if kind in ("delete", "replace") for i in range(first, last)
    ]
    added = [
        j for kind, _, _, first, last in blocks if kind in ("insert", "replace") for j in range(first, last)
    ]
    said = [f"frame {numbers_listed(removed)} there is not here"] if removed else []
    said += [f"frame {numbers_listed(added)} here is not there"] if added else []
    return f"the number of frames: {len(there)} there, {len(here)} here ({', '.join(said)})"
