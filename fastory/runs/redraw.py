"""Redrawing single frames of a finished run: new pictures are staged, then moved in by one manifest update.

Frames that were appended to the story are redrawn ones without a picture yet: they are drawn against the rest. Where that is
taken back (take_back.py) they leave the story. A manifest's `redraw` says which frames, and `moving`, once it stands there,
that the move is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from fastory import files
from fastory.errors import InputError
from fastory.runs.folder import RunFolder
from fastory.runs.identity import Identity
from fastory.runs.manifest import listed_files, picture_name, rounds_of
from fastory.story import Story
from fastory.wording import numbers_listed


def begin_redraw(
    folder: RunFolder,
    story: Story,
    identity: Identity,
    frames: Sequence[int],
    seed: int | None,
    noise_seed: Callable[[Mapping[int, int], int, int], int],
) -> bool:
    """Start, or take up again, the redrawing of `frames`. False where the same bytes would come of it.

    seed: --redraw-seed. noise_seed: of redraw seeds by frame, a frame and a round, the seed that its noise has there. The story
    may have other characters or another first frame than the run: frames that are not redrawn stay as they are. Raises
    InputError for frames that do not exist, for a first frame that all go on from and not all are redrawn, and for a run that
    is not finished, before anything is recorded.
    """
    manifest = folder.manifest
    count = max(len(manifest["story"]["frames"]), len(identity.frames))
    if outside := [i for i in frames if not 0 <= i < count]:
        raise InputError(f"--frames: wanted 0 to {count - 1}, got {numbers_listed(outside)}")
    if identity.goes_on_from_another(manifest) and len(frames) < count:
        raise InputError(
            f"--frames: all frames go on from the first, which is another picture now; wanted 0-, got {numbers_listed(frames)}"
        )
    seeds = {str(i): seed for i in frames} if seed is not None else {}
    dropped = [] if seeds else _superseded_seeds(folder, identity, frames)
    wanted = {
        "frames": list(frames),
        "story": identity.record_after(manifest, frames),
        "seeds": seeds,
        "dropped_seeds": dropped,
    }
    pending = manifest.get("redraw")
    if pending and {name: pending.get(name, []) for name in wanted} == wanted:
        _refuse_damaged(folder, frames)
        folder.take_inputs(story)
        return True
    _refuse_unfinished(folder, frames)
    kept = {int(i): recorded for i, recorded in manifest["seeds"].items() if i not in dropped}
    noise = partial(noise_seed, {**kept, **{int(i): seed for i, seed in seeds.items()}})
    other = identity.changed(manifest) or set(identity.recast(manifest)) & set(frames)
    if pending is None and not other and not _other_noise(folder, noise, frames):
        return False
    folder.check_free({**manifest, "story": identity.record(), "inputs": identity.inputs})
    folder.remove(_staged_files(folder))
    manifest["redraw"] = {**wanted, "pictures": {}}
    folder.trust_nothing()
    folder.save_manifest()
    folder.take_inputs(story)
    return True


def give_up_redraw(folder: RunFolder) -> str:
    """Forget a redraw that is not finished: the run as it was is asked for. Returns what to tell the user."""
    frames = numbers_listed(folder.manifest["redraw"]["frames"])
    folder.remove(_staged_files(folder))
    del folder.manifest["redraw"]
    folder.trust_nothing()
    folder.save_manifest()
    return f"the unfinished redraw of frames {frames} is given up, as this command asks for the run as it was"


def end_redraw(folder: RunFolder, story: Story) -> None:
    """Move the new pictures in by one manifest update; the old ones go to history/."""
    names = [*(p.name for p in folder.path.glob("history/*")), *folder.manifest.get("history", {})]
    number = 1 + max((int(name) for name in names if name.isdecimal() and len(name) <= 6), default=0)
    moving = {"history": f"history/{number:03d}", "story": story.to_yaml(folder.path)}
    folder.manifest["redraw"]["moving"] = moving
    folder.save_manifest()
    finish_move(folder)


def finish_move(folder: RunFolder) -> None:
    """Do what is left of a decided move, which a kill may have cut short; nothing where none is decided."""
    manifest = folder.manifest
    redraw = manifest.get("redraw") or {}
    if not redraw.get("moving"):
        return
    moved = [
        picture_name(int(round), int(frame))
        for round, pictures in redraw["pictures"].items()
        for frame in pictures
    ]
    folder.check_places(listed_files(manifest))
    kept_in = redraw["moving"]["history"]
    number = kept_in.removeprefix("history/")
    dropped = redraw.get("dropped_frames", ())
    removed = [picture_name(k, i) for k in range(rounds_of(manifest["settings"])) for i in dropped]
    _move_pictures(folder, moved, kept_in)
    _set_aside(folder, removed, kept_in)
    folder.remove([f"frames/frame-{i:03d}.png" for i in dropped])  # the last round's, which is kept
    staged = _staged_files(folder)
    _note_frames(manifest, number)
    for round, pictures in redraw["pictures"].items():
        manifest["pictures"].setdefault(round, {}).update(pictures)
    manifest["story"] = redraw["story"]
    for frame in redraw.get("dropped_seeds", ()):
        manifest["seeds"].pop(frame, None)
    manifest["seeds"].update(redraw["seeds"])
    kept = [name for name in (*moved, *removed) if (folder.path / kept_in / name).exists()]
    manifest.setdefault("history", {})[number] = kept
    manifest["products"] = {}
    manifest["story_file"] = folder.write("story.yaml", redraw["moving"]["story"].encode())
    folder.remove(staged)  # only empty folders are left of them
    del manifest["redraw"]
    folder.save_manifest()
    folder.trust_nothing()


def _move_pictures(folder: RunFolder, names: Sequence[str], kept_in: str) -> None:
    """Each staged picture to its place, the one that was there to the folder `kept_in`; any of it may be done already."""
    with files.disk_errors(folder.path):
        for name in names:
            new, now, old = folder.path / "redraw" / name, folder.path / name, folder.path / kept_in / name
            if new.exists():
                if now.exists() and not old.exists():
                    files.make_folder(old.parent)
                    files.replace(now, old)
                files.replace(new, now)


def _set_aside(folder: RunFolder, names: Sequence[str], kept_in: str) -> None:
    """Pictures of frames that leave the story to the folder `kept_in`; any of it may be done already."""
    with files.disk_errors(folder.path):
        for name in names:
            now, old = folder.path / name, folder.path / kept_in / name
            if now.exists() and not old.exists():
                files.make_folder(old.parent)
                files.replace(now, old)


def _note_frames(manifest: dict[str, Any], number: str) -> None:
    """Record which frames come with redraw `number`, and forget those that leave the story with it."""
    redraw, before = manifest["redraw"], len(manifest["story"]["frames"])
    after = len(redraw["story"]["frames"])
    appended = {
        kept: [i for i in frames if i < after] for kept, frames in manifest.get("appended", {}).items()
    }
    if after > before:
        appended[number] = list(range(before, after))
    if appended:
        manifest["appended"] = appended
    for i in redraw.get("dropped_frames", ()):
        manifest["seeds"].pop(str(i), None)
        for pictures in manifest["pictures"].values():
            pictures.pop(str(i), None)


def _staged_files(folder: RunFolder) -> list[str]:
    return [name for name in listed_files(folder.manifest) if name.startswith("redraw/")]


def _refuse_damaged(folder: RunFolder, redrawn: Sequence[int]) -> None:
    """InputError where a picture is damaged that the redraw keeps: it was drawn beside frames that change now."""
    kept = [(k, i) for k, i in _pictures_of(folder) if i not in redrawn]
    damaged = [picture_name(k, i) for k, i in kept if not folder.has(k, i)]
    if damaged:
        raise InputError(
            f"{folder.path / damaged[0]} is damaged or missing, and this redraw keeps it; give the redraw up with the "
            f"command that drew the run, for the story {folder.path / 'story.yaml'}, which draws it again, then redraw"
        )


def refuse_unrepeatable(folder: RunFolder, recast: Collection[int]) -> None:
    """InputError where a picture is damaged that would come out otherwise now: it was drawn beside frames since redrawn.

    A round that sees no other frame is drawn again as it was, and what the last redraw drew saw what is there now. recast:
    frames that were drawn with other characters.
    """
    history = folder.manifest.get("history")
    if not history:
        return
    last = set(history[max(history, key=int)])
    first_referring = 0 if folder.manifest["settings"].get("references_from") == "latest" else 1
    for k, i in _pictures_of(folder):
        name = picture_name(k, i)
        unlike = i in recast or (k >= first_referring and name not in last)
        if unlike and not folder.has(k, i):
            raise InputError(
                f"{folder.path / name} is damaged or missing, and cannot be drawn again as it was, since frames beside it "
                f"were redrawn; put the file back, or redraw it: --frames {i} --redraw-seed N, or --overwrite the run"
            )


def _refuse_unfinished(folder: RunFolder, redrawn: Sequence[int]) -> None:
    """InputError for a run of which a picture is missing; one that was drawn and is redrawn may be damaged."""
    pending = folder.manifest.pop(
        "redraw", None
    )  # `has` then speaks of the pictures that are in their places
    folder.trust_nothing()
    try:
        finished = all(
            folder.has(k, i) or (i in redrawn and folder.is_recorded(k, i)) for k, i in _pictures_of(folder)
        )
    finally:
        if pending:
            folder.manifest["redraw"] = pending
        folder.trust_nothing()
    if not finished:
        raise InputError(
            f"{folder.path} is not finished; finish it with the same command without --frames first"
        )


def _pictures_of(folder: RunFolder) -> list[tuple[int, int]]:
    """(round, frame) of all pictures of the run."""
    count = len(folder.manifest["story"]["frames"])
    return [(k, i) for k in range(rounds_of(folder.manifest["settings"])) for i in range(count)]


def _superseded_seeds(folder: RunFolder, identity: Identity, frames: Sequence[int]) -> list[str]:
    """Recorded redraw seeds of frames whose own `seed:` was given or changed since: what was said last counts."""
    recorded, own = folder.manifest["seeds"], folder.manifest["story"].get("seeds") or list(identity.seeds)
    return [
        str(i)
        for i in frames
        if str(i) in recorded and identity.seeds[i] is not None and identity.seeds[i] != own[i]
    ]


def _other_noise(folder: RunFolder, noise: Callable[[int, int], int], frames: Sequence[int]) -> bool:
    """Whether any of these frames was drawn from another seed than it would be now, in the round that its picture is from."""
    last = rounds_of(folder.manifest["settings"]) - 1
    pictures = folder.manifest["pictures"].get(str(last), {})
    records = {i: pictures.get(str(i), {}) for i in frames}
    return any(record.get("seed") != noise(i, record.get("converged", last)) for i, record in records.items())
