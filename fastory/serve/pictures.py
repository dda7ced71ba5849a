"""A story's pictures: those that are drawn, those that it is given, and the forms in which it is taken along."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from fastory import files
from fastory.runs.manifest import picture_name, rounds_of
from fastory.runs.render import Layout, render
from fastory.serve import bodies
from fastory.serve.gate import MOST_PIXELS
from fastory.serve.shelf import PICTURE, InUse, NoSuchStory, Shelf, is_finished


def pictures_api(shelf: Shelf) -> APIRouter:
    """A story's pictures: those that are drawn, and those that it is given."""
    api = APIRouter(prefix="/stories/{story}")
    picture_schema = {
        "requestBody": {
            "required": True,
            "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
        }
    }

    @api.post(
        "/pictures",
        status_code=201,
        response_model=bodies.Uploaded,
        openapi_extra=picture_schema,
        summary="A picture of a character, or a first frame, for a draft",
    )
    async def upload(story: str, request: Request) -> Any:
        shelf.known(story)
        data = await request.body()
        return {"name": await run_in_threadpool(shelf.add_picture, story, data, MOST_PIXELS)}

    @api.get("/pictures/{name}", response_class=FileResponse, summary="A picture that was uploaded")
    def uploaded(story: str, name: str) -> FileResponse:
        shelf.known(story)
        file = shelf.draft(story) / "pictures" / name
        if not PICTURE.fullmatch(f"pictures/{name}") or not file.is_file():
            raise NoSuchStory("there is no such picture")
        return FileResponse(file)

    @api.get(
        "/frames/{frame}",
        response_class=FileResponse,
        summary="A picture as PNG: of a round, the last unless given",
    )
    def picture(story: str, frame: int, round: int | None = None, take: str | None = None) -> FileResponse:
        """take: `redraw` for the picture of a redraw that is not finished, or a number of the history."""
        file = picture_file(shelf, shelf.known(story), frame, round, take)
        return FileResponse(file, media_type="image/png", headers={"cache-control": "private, no-cache"})

    @api.get("/take/{name}", response_class=FileResponse, summary="A finished story to print, send and keep")
    def take(story: str, name: str) -> FileResponse:
        """name: one of storybook.html, sheet.png, story.yaml, pictures.zip, pages.pdf, comic.pdf, strip.png, animated.webp."""
        return taken_along(shelf, shelf.known(story), name)

    return api


WHOLE_FILES = ("storybook.html", "sheet.png", "story.yaml")
RENDERED = {
    "pictures.zip": ("zip", Layout()),
    "pages.pdf": ("pdf", Layout()),
    "comic.pdf": ("pdf", Layout(per_page=4)),
    "strip.png": ("strip", Layout(captions="box")),
    "animated.webp": ("webp", Layout()),
}


def taken_along(shelf: Shelf, story: str, name: str) -> FileResponse:
    """A file to be saved. Raises NoSuchStory for another name, InUse before the story is finished."""
    if name not in (*WHOLE_FILES, *RENDERED):
        raise NoSuchStory("there is no such file of a story")
    manifest, folder = shelf.manifest(story), shelf.run(story)
    if manifest is None or not is_finished(manifest):
        raise InUse("the story is not finished: draw it to its end first")
    shown_name = f"{story}-{name}"
    if name in WHOLE_FILES:
        file = folder / name
        if files.is_link_below(shelf.root, file) or not file.is_file():
            raise NoSuchStory("there is no such file of a story")
        return FileResponse(file, filename=shown_name)
    form, layout = RENDERED[name]
    made = Path(tempfile.mkdtemp(prefix="fastory-render-"))
    try:
        render(folder, form, made / name, layout)
    except BaseException:
        files.remove(made)
        raise
    return FileResponse(made / name, filename=shown_name, background=BackgroundTask(files.remove, made))


def picture_file(shelf: Shelf, story: str, frame: int, round: int | None, take: str | None) -> Path:
    """A picture that the manifest lists. Raises NoSuchStory for any other."""
    missing = NoSuchStory(f"there is no such picture of frame {frame if 0 <= frame < 10**6 else '?'}")
    manifest = shelf.manifest(story)
    if manifest is None:
        raise missing
    pictures = manifest["pictures"]
    if take == "redraw":
        pictures = (manifest.get("redraw") or {}).get("pictures", {})
    rounds = [k for k in range(rounds_of(manifest["settings"])) if str(frame) in pictures.get(str(k), {})]
    chosen = (rounds[-1] if rounds else -1) if round is None else round
    name = picture_name(chosen, frame) if chosen in rounds else ""
    if take is not None and take != "redraw":
        name = f"history/{take}/{name}" if name in manifest.get("history", {}).get(take, ()) else ""
    elif take == "redraw" and name:
        name = f"redraw/{name}"
    file = shelf.run(story) / name
    if not name or files.is_link_below(shelf.root, file) or not file.is_file():
        raise missing
    return file
