"""The run folder: the only writer. Atomic files, a manifest, a lock, and what makes a killed run go on.

story/
  manifest.json                       what was asked, with what, and every picture's state
  story.yaml                          the story as understood
  iteration-00/frame-000.png ...      every round
  frames/frame-000.png ...            the final pictures
  sheet.png  storybook.html
  redraw/  history/                   pictures on their way in, and those they replaced
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastory.errors import FastoryError, InputError
from fastory.events import FrameDrawn
from fastory.model import open_picture
from fastory.settings import Settings
from fastory.story import Story
from fastory.storybook import Page, write_sheet, write_storybook

SCHEMA = 1
OWN_NAMES = ("manifest.json", "story.yaml", "frames", "sheet.png", "storybook.html", "redraw", "history")


@dataclass(frozen=True)
class Identity:
    """What a run folder belongs to. Two runs with one identity draw the same bytes on the same machine.

    story: Story.digest; rest: everything but the frames; frames: a digest a frame. settings: resolved. models: sha256
    by file name, LoRA weights included. dtype: only where it was asked for.
    """

    title: str
    story: str
    rest: str
    frames: tuple[str, ...]
    settings: Mapping[str, Any]
    models: Mapping[str, str]
    dtype: str | None

    @classmethod
    def of(cls, story: Story, settings: Settings, models: Mapping[str, str], dtype: str | None) -> Identity:
        """The identity of a story under resolved settings."""
        frames = tuple(story.frame_digest(i) for i in range(len(story.frames)))
        plain = json.loads(json.dumps(settings.identity()))
        return cls(
            story.title, story.digest(), story.digest_without_frames(), frames, plain, dict(models), dtype
        )

    def digest(self) -> str:
        """sha256 of story and settings; its first 8 hex digits name the default folder."""
        named = [self.story, self.settings, sorted(self.models.items()), self.dtype]
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    def differences(self, manifest: Mapping[str, Any]) -> list[str]:
        """What differs from the run that `manifest` describes, one line each; the frames' own text is left to `changed`."""
        lines = []
        if manifest["story"]["rest"] != self.rest:
            lines.append(
                f"the story: {manifest['story']['title']!r} there, {self.title!r} here (or its characters, style, length)"
            )
        there = manifest["settings"]
        lines += [
            f"{name}: {there.get(name)!r} there, {self.settings.get(name)!r} here"
            for name in sorted({*there, *self.settings})
            if there.get(name) != self.settings.get(name)
        ]
        if manifest["models"] != self.models:
            lines.append("the model, its adapter or its LoRAs: other weights")
        if self.dtype and manifest["machine"]["dtype"] != self.dtype:
            lines.append(f"dtype: {manifest['machine']['dtype']} there, {self.dtype} here")
        return lines

    def changed(self, manifest: Mapping[str, Any]) -> list[int]:
        """Frames whose caption, seed or cast differs from the manifest's."""
        there = manifest["story"]["frames"]
        return [i for i, digest in enumerate(self.frames) if i >= len(there) or there[i] != digest]


class RunFolder:
    """A locked run folder. Implements the mode's `Finished`: which pictures exist and can be trusted."""

    def __init__(self, path: Path) -> None:
        """Lock `path`, making it if needed. Raises FastoryError where another process holds it."""
        self.path = path
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; wanted a new or empty folder for --output")
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make the folder {path}: {error.strerror}; choose another --output"
            ) from error
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise FastoryError(
                f"another process draws into {path}; wait for it to end, or choose another --output"
            ) from None
        except OSError as error:
            raise InputError(
                f"cannot write into {path}: {error.strerror}; choose another --output"
            ) from error
        self.manifest: dict[str, Any] = {}
        self._trusted: dict[tuple[int, int], bool] = {}

    def close(self) -> None:
        """Release the lock. A folder that was made for a run that never began is removed again."""
        self._lock.release()
        if self._made and not (self.path / "manifest.json").exists():
            (self.path / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: someone else uses it
                for folder in self._made:
                    folder.rmdir()

    # -- opening -------------------------------------------------------------------------------------------------

    def read(self) -> bool:
        """Read the manifest if there is one. False for a new folder. Finishes a redraw's move that a kill cut short."""
        for leftover in self.path.rglob(".*.partial"):
            leftover.unlink(missing_ok=True)
        if not (self.path / "manifest.json").exists():
            strangers = [p.name for p in self.path.iterdir() if p.name != ".lock" and not _is_own(p.name)]
            if strangers:
                raise InputError(
                    f"{self.path} is not a run folder (it holds {strangers[0]!r}); wanted a new or empty folder for --output"
                )
            return False
        self.manifest = _read_manifest(self.path / "manifest.json")
        if self.manifest.get("redraw", {}).get("moving"):
            self._move_in()
        return True

    def check(self, identity: Identity, frames: Sequence[int] | None) -> None:
        """InputError where the folder belongs to another story or other settings: says what differs, offers --overwrite."""
        lines = identity.differences(self.manifest)
        changed = [i for i in identity.changed(self.manifest) if frames is None or i not in frames]
        pending = self.manifest.get("redraw")
        if not lines and changed and pending and identity.frames == tuple(pending["story"]["frames"]):
            raise InputError(
                f"{self.path} has an unfinished redraw of frames {_listed(pending['frames'])}; "
                f"finish it with --frames {_listed(pending['frames'])}, or give --overwrite"
            )
        if not lines and changed:
            lines.append(f"the text, seed or cast of frames {_listed(changed)}")
        if lines:
            hint = (
                f" To redraw single frames: --frames {_listed(changed)}."
                if changed and len(lines) == 1
                else ""
            )
            raise InputError(
                f"{self.path} holds another run. What differs: {'; '.join(lines)}. "
                f"Choose another --output, or --overwrite to draw it anew.{hint}"
            )

    def clear(self) -> None:
        """Remove what a run left here (--overwrite); files of other names stay."""
        for entry in self.path.iterdir():
            if _is_own(entry.name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.manifest, self._trusted = {}, {}

    def begin(
        self,
        identity: Identity,
        story: Story,
        sources: Mapping[str, str],
        machine: Mapping[str, Any],
        batch_size: int,
    ) -> None:
        """Write the manifest and story.yaml of a new run."""
        self.manifest = {
            "schema": SCHEMA,
            "story": _story_record(identity),
            "settings": dict(identity.settings),
            "sources": dict(sources),
            "models": dict(identity.models),
            "machine": dict(machine),
            "batch_sizes": [batch_size],
            "seeds": {},
            "pictures": {},
            "products": {},
        }
        self._write("story.yaml", story.to_yaml(self.path).encode())
        self._save()

    # -- pictures ------------------------------------------------------------------------------------------------

    def has(self, round: int, frame: int) -> bool:
        """True where the picture is recorded and its file still has the recorded hash."""
        key = (round, frame)
        if key not in self._trusted:
            record = self._record(round, frame)
            file = self._file(round, frame)
            self._trusted[key] = (
                record is not None and file.exists() and _sha256_file(file) == record["sha256"]
            )
        return self._trusted[key]

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        """A finished picture and why it is left out as a reference, or None."""
        record = self._record(round, frame)
        if record is None:
            raise FastoryError(
                f"{self.path}: frame {frame} of round {round} is missing; run the same command again"
            )
        return open_picture(self._file(round, frame)), record["left_out"]

    def save(self, drawn: FrameDrawn, chunks: Mapping[str, str], seconds: float) -> Path:
        """Write a picture, then its record: a kill in between costs this picture alone."""
        info = PngInfo()
        for name, text in chunks.items():
            info.add_itxt(name, text)
        buffer = io.BytesIO()
        drawn.image.save(buffer, "PNG", pnginfo=info)
        relative = self._relative(drawn.round, drawn.frame)
        record = {
            "sha256": self._write(relative, buffer.getvalue()),
            "seed": drawn.seed,
            "left_out": drawn.left_out,
            "seconds": round(seconds, 3),
        }
        self._pictures().setdefault(str(drawn.round), {})[str(drawn.frame)] = record
        self._trusted[drawn.round, drawn.frame] = True
        self._save()
        return self.path / relative

    def halve(self, round: int, size: int) -> None:
        """Record the smaller micro-batch from `round` on, and forget that round's pictures drawn with the larger one.

        A causal story has one round, in which every frame has a size of its own: see halve_from.
        """
        sizes = self.manifest["batch_sizes"]
        sizes += [sizes[-1]] * (round + 1 - len(sizes))
        sizes[round:] = [size]
        drawn = self._pictures().get(str(round), {})
        for frame in [int(name) for name in drawn]:
            del drawn[str(frame)]
            self._trusted.pop((round, frame), None)
        self._save()

    def halve_from(self, frame: int, size: int) -> None:
        """Causal mode: the smaller micro-batch of stories from `frame` on; that frame is drawn again."""
        sizes = self.manifest["batch_sizes"]
        sizes += [sizes[-1]] * (frame + 1 - len(sizes))
        sizes[frame:] = [size]
        self._pictures().get("0", {}).pop(str(frame), None)
        self._trusted.pop((0, frame), None)
        self._save()

    def batch_sizes(self) -> list[int]:
        """Frames at once in round 0, 1, .., or stories at once at frame 0, 1, ..; the last entry stands for all later ones."""
        return list(self.manifest["batch_sizes"])

    def count(self, rounds: int, frames: int) -> int:
        """How many pictures of all rounds are finished."""
        return sum(self.has(k, i) for k in range(rounds) for i in range(frames))

    def _pictures(self) -> dict[str, dict[str, Any]]:
        redraw = self.manifest.get("redraw")
        return redraw["pictures"] if redraw else self.manifest["pictures"]

    def _redrawn(self, frame: int) -> bool:
        return frame in self.manifest.get("redraw", {}).get("frames", ())

    def _record(self, round: int, frame: int) -> dict[str, Any] | None:
        pictures = self._pictures() if self._redrawn(frame) else self.manifest["pictures"]
        return pictures.get(str(round), {}).get(str(frame))

    def _relative(self, round: int, frame: int) -> str:
        place = _picture_name(round, frame)
        return f"redraw/{place}" if self._redrawn(frame) else place

    def _file(self, round: int, frame: int) -> Path:
        return self.path / self._relative(round, frame)

    # -- redrawing -----------------------------------------------------------------------------------------------

    def begin_redraw(
        self, identity: Identity, frames: Sequence[int], seed: int | None, finished_rounds: int
    ) -> bool:
        """Start, or take up again, the redrawing of `frames`. False where nothing about them changed.

        Raises InputError for frames that do not exist and for a run that is not finished.
        """
        count = len(self.manifest["story"]["frames"])
        if outside := [i for i in frames if i >= count]:
            raise InputError(f"--frames: wanted 0 to {count - 1}, got {_listed(outside)}")
        seeds = {str(i): seed for i in frames} if seed is not None else {}
        wanted = {"frames": list(frames), "story": _story_record(identity), "seeds": seeds}
        pending = self.manifest.get("redraw")
        if pending and {name: pending[name] for name in wanted} == wanted:
            return True
        if pending is None and not identity.changed(self.manifest) and not self._new_seeds(seeds):
            return False
        if not all(self.has(k, i) for k in range(finished_rounds) for i in range(count)):
            raise InputError(
                f"{self.path} is not finished; finish it with the same command without --frames first"
            )
        shutil.rmtree(self.path / "redraw", ignore_errors=True)
        self.manifest["redraw"] = {**wanted, "pictures": {}}
        self._trusted.clear()
        self._save()
        return True

    def _new_seeds(self, seeds: Mapping[str, int]) -> bool:
        return any(self.manifest["seeds"].get(frame) != seed for frame, seed in seeds.items())

    def seeds(self) -> dict[int, int]:
        """Frames drawn as under another --seed (--redraw-seed)."""
        recorded = {**self.manifest["seeds"], **self.manifest.get("redraw", {}).get("seeds", {})}
        return {int(frame): seed for frame, seed in recorded.items()}

    def end_redraw(self, story: Story) -> None:
        """Move the new pictures in by one manifest update; the old ones go to history/."""
        redraw = self.manifest["redraw"]
        number = 1 + max((int(p.name) for p in self.path.glob("history/*") if p.name.isdecimal()), default=0)
        redraw["moving"] = {"history": f"history/{number:03d}", "story": story.to_yaml(self.path)}
        self._save()
        self._move_in()

    def _move_in(self) -> None:
        """Finish a decided move; every step may have happened already."""
        redraw = self.manifest["redraw"]
        for round, pictures in redraw["pictures"].items():
            for frame in pictures:
                name = _picture_name(int(round), int(frame))
                staged, old = self.path / "redraw" / name, self.path / name
                kept = self.path / redraw["moving"]["history"] / name
                if staged.exists():
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    if not kept.exists():
                        os.replace(old, kept)
                    os.replace(staged, old)
        for round, pictures in redraw["pictures"].items():
            self.manifest["pictures"][round].update(pictures)
        self.manifest["story"] = redraw["story"]
        self.manifest["seeds"].update(redraw["seeds"])
        self.manifest["products"] = {}
        self._write("story.yaml", redraw["moving"]["story"].encode())
        del self.manifest["redraw"]
        self._save()
        shutil.rmtree(self.path / "redraw", ignore_errors=True)
        self._trusted.clear()

    # -- finishing -----------------------------------------------------------------------------------------------

    def complete(self) -> bool:
        """True where final pictures, sheet and storybook exist with the recorded hashes."""
        products = self.manifest.get("products", {})
        return bool(products) and all(
            (self.path / name).exists() and _sha256_file(self.path / name) == digest
            for name, digest in products.items()
        )

    def finish(self, story: Story, rounds: int, footer: Mapping[str, str]) -> None:
        """Write the final pictures, the contact sheet and the storybook."""
        products, pages = {}, []
        for i in range(len(story.frames)):
            last = self.path / _picture_name(rounds - 1, i)
            name = f"frames/frame-{i:03d}.png"
            products[name] = self._write(name, last.read_bytes())
            pages.append(self._page(story, i, rounds, self.path / name))
        products["sheet.png"] = self._write_by(
            "sheet.png", lambda path: write_sheet(pages, path, title=story.title)
        )
        products["storybook.html"] = self._write_by(
            "storybook.html", lambda path: write_storybook(pages, path, title=story.title, settings=footer)
        )
        self.manifest["products"] = products
        self._save()

    def _page(self, story: Story, frame: int, rounds: int, final: Path) -> Page:
        pictures: list[Path | None] = []
        notes = []
        for k in range(rounds):
            record = self._record(k, frame)
            left_out = record["left_out"] if record else "not drawn"
            pictures.append(None if left_out else self._file(k, frame))
            if left_out:
                notes.append(f"round {k}: {left_out}")
        return Page(story.frames[frame].caption, tuple(pictures), final, "; ".join(notes))

    # -- files ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._write(
            "manifest.json", json.dumps(self.manifest, ensure_ascii=False, indent=1, sort_keys=True).encode()
        )

    def _write(self, name: str, data: bytes) -> str:
        """Write beside its place, sync, rename. Returns the sha256."""
        return self._write_by(name, lambda path: path.write_bytes(data))

    def _write_by(self, name: str, write: Callable[[Path], object]) -> str:
        target = self.path / name
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write(partial)
            digest = _sha256_file(partial)
            _sync(partial)
            os.replace(partial, target)
            _sync(target.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise _disk_error(error, target) from error
        return digest


def _disk_error(error: OSError, target: Path) -> FastoryError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FastoryError(
            f"the disk is full: {target} could not be written. Free some space; the same command goes on from what is finished."
        )
    return FastoryError(
        f"{target} could not be written: {error.strerror or error}. What is finished is kept."
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); --overwrite draws the story anew, or choose another --output"
        ) from error
    if not isinstance(schema, int) or schema > SCHEMA:
        raise InputError(
            f"{path} has schema {schema}; this version reads up to {SCHEMA}: use a newer fastory, or another --output"
        )
    missing = [
        name
        for name in ("story", "settings", "models", "machine", "batch_sizes", "seeds", "pictures", "products")
        if name not in manifest
    ]
    if missing:
        raise InputError(
            f"{path} is damaged (no {missing[0]!r}); --overwrite draws the story anew, or choose another --output"
        )
    return manifest


def _story_record(identity: Identity) -> dict[str, Any]:
    return {
        "title": identity.title,
        "digest": identity.story,
        "rest": identity.rest,
        "frames": list(identity.frames),
    }


def _picture_name(round: int, frame: int) -> str:
    return f"iteration-{round:02d}/frame-{frame:03d}.png"


def _is_own(name: str) -> bool:
    return name in OWN_NAMES or name.startswith("iteration-")


def _listed(frames: Sequence[int]) -> str:
    return ",".join(str(i) for i in frames)


def _sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle for a folder; NTFS journals the rename
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
