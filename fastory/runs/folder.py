"""The run folder: the only writer. Atomic files, a manifest, a lock, and what makes a killed run go on.

story/
  manifest.json                       what was asked, with what, and every picture's state; written first
  story.yaml                          the story as understood
  inputs/                             pictures that a program gave in memory, which story.yaml names
  iteration-00/frame-000.png ...      every round
  frames/frame-000.png ...            the final pictures
  sheet.png  storybook.html
  redraw/  history/                   pictures on their way in, and those they replaced

A folder is ours only if its manifest.json says so. Nothing is cleared or replaced but the files that it names, and nothing
is written through a symbolic link.
"""

from __future__ import annotations

import contextlib
import hashlib
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastory import files
from fastory.errors import FastoryError, InputError
from fastory.events import FrameDrawn
from fastory.pictures import open_picture
from fastory.runs import manifest
from fastory.runs.identity import Identity
from fastory.runs.manifest import listed_files, manifest_bytes, picture_name, read_manifest
from fastory.runs.storybook import Page, write_sheet, write_storybook
from fastory.story import Story
from fastory.wording import numbers_listed


class RunFolder:
    """A locked run folder. Implements the mode's `Finished`: which pictures exist and can be trusted."""

    def __init__(self, path: Path) -> None:
        """Lock `path`, making it if needed. Nothing in it is changed before it is known to be ours, or empty.

        Raises FastoryError where another process holds it, InputError for a folder that holds anything but a run.
        """
        self.path = path
        files.check_names_fit([path])
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; wanted a new or empty folder for --output")
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            files.make_folder(path)
            self._refuse_strangers()
        except OSError as error:
            raise InputError(
                f"cannot make or read the folder {path}: {error.strerror}; choose another --output"
            ) from error
        self._lock = files.lock_folder(path, "draws into", "choose another --output")
        self.manifest: dict[str, Any] = {}
        self._old: dict[str, Any] = {}
        self._trusted: dict[tuple[int, int], bool] = {}

    def _refuse_strangers(self) -> None:
        """InputError where there is no manifest and yet something that a run which never began does not leave."""
        if (self.path / manifest.NAME).exists():
            return
        partial = files.partial_of(self.path / manifest.NAME).name
        for entry in sorted(self.path.iterdir()):
            if entry.name not in (files.LOCK, partial) or not stat.S_ISREG(entry.lstat().st_mode):
                raise InputError(
                    f"{self.path} is not a run folder: it holds {entry.name!r} and no manifest.json of ours; "
                    "wanted a new or empty folder for --output"
                )

    def close(self) -> None:
        """Release the lock. A folder that was made for a run that never began is removed again."""
        self._lock.release()
        if self._made and not (self.path / manifest.NAME).exists():
            (self.path / files.LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: someone else uses it
                for folder in self._made:
                    folder.rmdir()

    # -- opening -------------------------------------------------------------------------------------------------

    def read(self) -> bool:
        """Read the manifest if there is one. False for a new folder.

        Raises InputError for a manifest that is damaged or not ours, and where a folder, a link or a pipe has the place of
        a file of the run.
        """
        self._refuse_strangers()
        if not (self.path / manifest.NAME).exists():
            return False
        self.manifest = read_manifest(self.path / manifest.NAME)
        names = listed_files(self.manifest)
        self.check_places([manifest.NAME, *names])
        for name in (manifest.NAME, *names):
            files.remove(files.partial_of(self.path / name))
        return True

    def check_places(self, names: Iterable[str]) -> None:
        """InputError where what stands at a file's place, or at the place of its folder, is something else."""
        folders: set[Path] = set()
        for name in names:
            target = self.path / name
            for path, fits, wanted in (
                *((folder, stat.S_ISDIR, "a folder") for folder in target.parents if folder not in folders),
                (target, stat.S_ISREG, "a file"),
                (files.partial_of(target), stat.S_ISREG, "a file"),
            ):
                if not path.is_relative_to(self.path) or path == self.path:
                    continue
                folders.add(path)
                self._check_place(path, fits, wanted)

    def _check_place(self, path: Path, fits: Callable[[int], bool], wanted: str) -> None:
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}); make it readable, or choose another --output"
            ) from error
        if not fits(mode):
            kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
            got = kinds.get(stat.S_IFMT(mode), "a pipe or a device")
            raise InputError(
                f"{path} is {got}, where this run has {wanted}; move it away, or choose another --output"
            )

    def check(self, identity: Identity, frames: Sequence[int] | None) -> None:
        """InputError where the folder belongs to another story or other settings: says what differs, offers --overwrite."""
        appended = identity.appended(self.manifest)
        lines = identity.differences(self.manifest, frames)
        changed = [i for i in identity.changed(self.manifest) if frames is None or i not in frames]
        pending = self.manifest.get("redraw")
        joining = not identity.differences(self.manifest, appended)
        if joining and changed and pending and identity.frames == tuple(pending["story"]["frames"]):
            raise InputError(
                f"{self.path} has an unfinished redraw of frames {numbers_listed(pending['frames'])}; "
                f"finish it with --frames {numbers_listed(pending['frames'])}, or give --overwrite"
            )
        if not lines and changed:
            lines.append(f"the text, seed or cast of frames {numbers_listed(changed)}")
        if lines:
            hint = ""
            wanted = sorted({*changed, *(identity.recast(self.manifest) if frames is None else ())})
            if joining and wanted:
                what = "To draw added frames against the rest" if appended else "To redraw single frames"
                hint = f" {what}: --frames {numbers_listed(wanted)}."
            raise InputError(
                f"{self.path} holds another run. What differs: {'; '.join(lines)}. "
                f"Choose another --output, or --overwrite to draw it anew.{hint}"
            )

    def draw_anew(self, identity: Identity) -> bool:
        """Forget the run that is here (--overwrite). False where it is this very run, begun anew and not yet finished.

        Its files go when `begin` is called: another story of the call may still be refused. Raises InputError where a
        file that no manifest lists has a name that the new run will write.
        """
        unfinished = self.manifest.get("anew") and not identity.differences(self.manifest)
        if unfinished and not identity.changed(self.manifest):
            return False
        self.check_free(
            {"story": identity.record(), "settings": identity.settings, "inputs": identity.inputs}
        )
        self._old, self.manifest = self.manifest, {}
        self.trust_nothing()
        return True

    def check_free(self, future: Mapping[str, Any]) -> None:
        """InputError where what a run with this manifest would write is there, and the one that is here does not list it."""
        own = set(listed_files(self.manifest))
        names = [name for name in listed_files(future) if name not in own]
        strange = [name for name in names if (self.path / name).exists() or (self.path / name).is_symlink()]
        if strange:
            raise InputError(
                f"{self.path / strange[0]} is in the way: the new run would write it, and no manifest of ours lists it; "
                "move it away, or choose another --output"
            )
        self.check_places(names)

    def begin(
        self,
        identity: Identity,
        story: Story,
        sources: Mapping[str, str],
        machine: Mapping[str, Any],
        batch_size: int,
    ) -> None:
        """Clear what an overwritten run listed, then write the manifest of a new run, then its story.yaml."""
        self.remove(listed_files(self._old) if self._old else [])
        self.manifest = {
            "schema": manifest.SCHEMA,
            "story": identity.record(),
            "settings": dict(identity.settings),
            "sources": dict(sources),
            "models": dict(identity.models),
            "machine": dict(machine),
            "batch_sizes": [batch_size],
            "seeds": {},
            "pictures": {},
            "products": {},
            **({"inputs": dict(identity.inputs)} if identity.inputs else {}),
            **({"anew": True} if self._old else {}),
        }
        self._old = {}
        self._write_story(story)

    def take_inputs(self, story: Story) -> None:
        """Keep pictures that a redraw is given in memory beside those that the run had; those stay, for a redraw taken back."""
        new = {picture.name: picture.sha256 for picture in story.inputs()}
        there = self.manifest.get("inputs", {})
        if not new.keys() <= there.keys():
            self.manifest["inputs"] = {**there, **new}
            self.save_manifest()
        self._write_inputs(story)

    def restore_story(self, story: Story) -> str | None:
        """Write story.yaml where it is missing or damaged. Returns a notice where it was changed and still is a story.

        Pictures that were given in memory are written again, too, where their files are not as they were.
        """
        self._write_inputs(story)
        file = self.path / "story.yaml"
        stored = self.manifest.get("story_file")
        if stored is None and file.exists():
            return None  # a manifest of before 2026-11, which does not say
        if self._sha256(file) == stored and stored is not None:
            return None
        try:
            Story.read(file)
        except InputError:
            self._write_story(story)
            return None
        return f"{file} was changed since the run wrote it, and is left as it is"

    def _write_story(self, story: Story) -> None:
        """The manifest first, as a folder is ours by it alone; a kill in between leaves a story.yaml to be restored."""
        data = story.to_yaml(self.path).encode()
        self.manifest["story_file"] = hashlib.sha256(data).hexdigest()
        self.save_manifest()
        self._write_inputs(story)
        self.write("story.yaml", data)

    def _write_inputs(self, story: Story) -> None:
        for picture in story.inputs():
            if (
                picture.name in self.manifest.get("inputs", ())
                and self._sha256(self.path / picture.name) != picture.sha256
            ):
                self.write(picture.name, picture.data)

    def remove(self, names: Iterable[str]) -> None:
        """Remove these files, and the folders they were in where nothing else is left there."""
        folders: set[Path] = set()
        for name in names:
            files.remove(self.path / name)
            folders.update(folder for folder in Path(name).parents if folder != Path())
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            path = self.path / folder
            if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                files.remove(path)

    # -- pictures ------------------------------------------------------------------------------------------------

    def has(self, round: int, frame: int) -> bool:
        """True where the picture is recorded and its file still has the recorded hash."""
        key = (round, frame)
        if key not in self._trusted:
            record = self._record(round, frame)
            self._trusted[key] = (
                record is not None and self._sha256(self._file(round, frame)) == record["sha256"]
            )
        return self._trusted[key]

    def is_recorded(self, round: int, frame: int) -> bool:
        """True where the picture was drawn, whatever became of its file."""
        return self._record(round, frame) is not None

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        """A finished picture and why it is left out as a reference, or None."""
        record = self._record(round, frame)
        if record is None:
            raise FastoryError(
                f"{self.path}: frame {frame} of round {round} is missing; run the same command again"
            )
        return open_picture(self._file(round, frame)), record["left_out"]

    def record(self, pictures: Iterable[tuple[FrameDrawn, str, float]]) -> None:
        """Record pictures whose files are written, each with its sha256 and seconds: until then they are not drawn."""
        for drawn, sha256, seconds in pictures:
            self._pictures().setdefault(str(drawn.round), {})[str(drawn.frame)] = {
                "sha256": sha256,
                "seed": drawn.seed,
                "left_out": drawn.left_out,
                "seconds": round(seconds, 3),
                **({} if drawn.converged is None else {"converged": drawn.converged}),
            }
            self._trusted[drawn.round, drawn.frame] = True
        self.save_manifest()

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
        self.save_manifest()

    def halve_from(self, frame: int, size: int) -> None:
        """Causal mode: the smaller micro-batch of stories from `frame` on; that frame is drawn again."""
        sizes = self.manifest["batch_sizes"]
        sizes += [sizes[-1]] * (frame + 1 - len(sizes))
        sizes[frame:] = [size]
        self._pictures().get("0", {}).pop(str(frame), None)
        self._trusted.pop((0, frame), None)
        self.save_manifest()

    def batch_sizes(self) -> list[int]:
        """Frames at once in round 0, 1, .., or stories at once at frame 0, 1, ..; the last entry stands for all later ones."""
        return list(self.manifest["batch_sizes"])

    def record_processes(self, count: int) -> None:
        """Say in the manifest that from now on `count` processes draw. A run of one process alone says nothing of it."""
        there = self.manifest.get("processes", [1])
        if there[-1] != count:
            drawn = any(self.manifest["pictures"].values())
            self.manifest["processes"] = [*(there if drawn else there[:-1]), count]
            self.save_manifest()

    def counts(self, rounds: int, frames: int) -> list[int]:
        """How many pictures of each round are finished."""
        return [sum(self.has(k, i) for i in range(frames)) for k in range(rounds)]

    def seeds(self) -> dict[int, int]:
        """Frames drawn from another seed (--redraw-seed), which counts before the frame's own and the run's."""
        redraw = self.manifest.get("redraw") or {}
        recorded = {**self.manifest["seeds"], **redraw.get("seeds", {})}
        return {
            int(frame): seed
            for frame, seed in recorded.items()
            if frame not in redraw.get("dropped_seeds", ())
        }

    def _pictures(self) -> dict[str, dict[str, Any]]:
        redraw = self.manifest.get("redraw")
        return redraw["pictures"] if redraw else self.manifest["pictures"]

    def _redrawn(self, frame: int) -> bool:
        return frame in (self.manifest.get("redraw") or {}).get("frames", ())

    def trust_nothing(self) -> None:
        """Check the hash of every picture again before it is trusted: which pictures are meant has changed."""
        self._trusted.clear()

    def _record(self, round: int, frame: int) -> dict[str, Any] | None:
        pictures = self._pictures() if self._redrawn(frame) else self.manifest["pictures"]
        return pictures.get(str(round), {}).get(str(frame))

    def place_of(self, round: int, frame: int) -> str:
        """Where a picture stands, relative to the folder: one that is redrawn stands in redraw/ first."""
        name = picture_name(round, frame)
        return f"redraw/{name}" if self._redrawn(frame) else name

    def _file(self, round: int, frame: int) -> Path:
        return self.path / self.place_of(round, frame)

    # -- finishing -----------------------------------------------------------------------------------------------

    def complete(self) -> bool:
        """True where final pictures, sheet and storybook exist with the recorded hashes."""
        products = self.manifest.get("products", {})
        return bool(products) and all(
            self._sha256(self.path / name) == digest for name, digest in products.items()
        )

    def finish(self, story: Story, rounds: int, footer: Mapping[str, str]) -> None:
        """Write the final pictures, the contact sheet and the storybook."""
        products, pages = {}, []
        for i in range(len(story.frames)):
            last = self.path / picture_name(rounds - 1, i)
            name = f"frames/frame-{i:03d}.png"
            products[name] = self.write(name, last.read_bytes())
            pages.append(self._page(story, i, rounds, self.path / name))
        products["sheet.png"] = self.write(
            "sheet.png", lambda path: write_sheet(pages, path, title=story.title)
        )
        products["storybook.html"] = self.write(
            "storybook.html", lambda path: write_storybook(pages, path, title=story.title, settings=footer)
        )
        self.manifest["products"] = products
        self.manifest.pop("anew", None)
        self.save_manifest()

    def _page(self, story: Story, frame: int, rounds: int, final: Path) -> Page:
        pictures: list[Path | None] = []
        notes = []
        for k in range(rounds):
            record = self._record(k, frame)
            left_out = record["left_out"] if record else "not drawn"
            pictures.append(None if left_out else self._file(k, frame))
            if left_out:
                notes.append(f"round {k}: {left_out}")
            elif record and record.get("converged") == k - 1:
                notes.append(f"no change after round {k - 1}")
        return Page(story.frames[frame].caption, tuple(pictures), final, "; ".join(notes))

    # -- files ---------------------------------------------------------------------------------------------------

    def save_manifest(self) -> None:
        """Write manifest.json."""
        self.write(manifest.NAME, manifest_bytes(self.manifest))

    def write(self, name: str, data: bytes | files.Write) -> str:
        """Write beside its place, sync, rename. Returns the sha256."""
        return files.atomic_write(self._target(name), data)

    def make_folder_of(self, name: str) -> None:
        """Make the folder that a file of this name lies in."""
        files.make_folder(self._target(name).parent)

    def _target(self, name: str) -> Path:
        """Where a file of this name is written. InputError where a link leads there."""
        target = self.path / name
        if files.is_link_below(self.path, target):
            raise InputError(f"{target} is reached through a symbolic link; move the link away")
        return target

    def _sha256(self, file: Path) -> str | None:
        """The file's hash, None where there is none. InputError for one that cannot be read."""
        try:
            return files.sha256_of(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(
                f"{file} cannot be read ({error.strerror}); make it readable, or choose another --output"
            ) from error
