"""A story's pictures: those that are drawn, those that it is given, and the forms in which it is taken along."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from PIL import Image
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from fastory import files
from fastory.errors import InputError
from fastory.runs.film import ffmpeg
from fastory.runs.manifest import picture_name, rounds_of
from fastory.runs.render import Layout, render
from fastory.serve import bodies
from fastory.serve.drawing import Drawing
from fastory.serve.gate import MOST_PIXELS
from fastory.serve.shelf import PICTURE, InUse, NoSuchStory, Shelf, is_finished


def file_of(kind: str) -> dict[str, Any]:
    """A route's part of the OpenAPI document, for answers of this media type."""
    content = {kind: {"schema": {"type": "string", "format": "binary"}}}
    return {"response_class": Response, "responses": {200: {"content": content}}}


def pictures_api(shelf: Shelf, drawing: Drawing) -> APIRouter:
    """A story's pictures: those that it is given, and those that are drawn."""
    api = APIRouter(prefix="/stories/{story}")
    add_drawn(api, shelf)
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
        summary="A picture of a character, or a first frame: of a draft, or for what is drawn next of a finished story",
    )
    async def upload(story: str, request: Request) -> Any:
        if shelf.has_run(shelf.known(story)) and drawing.state(story) != "finished":
            raise InUse("the story is being drawn: give it pictures once it is finished")
        data = await request.body()
        return {"name": await run_in_threadpool(shelf.add_picture, story, data, MOST_PIXELS)}

    @api.get("/inputs/{name}", **file_of("image/bmp"), summary="A picture that its run was given")
    def given_picture(story: str, name: str) -> Response:
        manifest, missing = shelf.manifest(shelf.known(story)) or {}, NoSuchStory("there is no such picture")
        file = shelf.run(story) / "inputs" / name
        if f"inputs/{name}" not in manifest.get("inputs", {}) or files.is_link_below(shelf.root, file):
            raise missing
        try:
            return Response(file.read_bytes(), media_type="image/bmp")
        except FileNotFoundError:
            raise missing from None

    @api.get("/pictures/{name}", **file_of("image/*"), summary="A picture that was uploaded")
    def uploaded(story: str, name: str) -> Response:
        shelf.known(story)
        missing = NoSuchStory("there is no such picture")
        if not PICTURE.fullmatch(f"pictures/{name}"):
            raise missing
        try:
            data = (shelf.draft(story) / "pictures" / name).read_bytes()
        except FileNotFoundError:
            raise missing from None
        return Response(data, media_type=f"image/{name.rpartition('.')[2].replace('jpg', 'jpeg')}")

    return api


def add_drawn(api: APIRouter, shelf: Shelf) -> None:
    """Routes of what is drawn, and of what is taken along."""

    @api.get(
        "/frames/{frame}",
        **file_of("image/png"),
        summary="A picture as PNG: of a round, the last unless given",
    )
    def picture(story: str, frame: int, round: int | None = None, take: str | None = None) -> Response:
        """take: `redraw` for the picture of a redraw, which may be on its way in, or a number of the history."""
        data = picture_bytes(shelf, shelf.known(story), frame, round, take)
        return Response(data, media_type="image/png", headers={"cache-control": "private, no-cache"})

    @api.get(
        "/frames/{frame}/drawn-from",
        response_model=bodies.DrawnFrom,
        summary="What a picture was drawn from: prompt, seed, scale, settings",
    )
    def drawn_from(story: str, frame: int, round: int | None = None, take: str | None = None) -> Any:
        """round, take: as for the picture."""
        chunks = chunks_of(picture_bytes(shelf, shelf.known(story), frame, round, take))
        return {"values": json.loads(chunks["fastory"]), "parameters": chunks["parameters"]}

    @api.get("/take/{name}", **file_of("*/*"), summary="A finished story to print, send and keep")
    def take(story: str, name: str) -> FileResponse:
        """name: one of storybook.html, sheet.png, story.yaml, pictures.zip, pages.pdf, comic.pdf, strip.png, animated.webp,
        film.mp4; GET /stories/{story} says under takes which of them there are now.
        """
        return taken_along(shelf, shelf.known(story), name)


WHOLE_FILES = ("storybook.html", "sheet.png", "story.yaml")
RENDERED = {
    "pictures.zip": ("zip", Layout()),
    "pages.pdf": ("pdf", Layout()),
    "comic.pdf": ("pdf", Layout(per_page=4)),
    "strip.png": ("strip", Layout(captions="box")),
    "animated.webp": ("webp", Layout()),
    "film.mp4": ("mp4", Layout()),
}


def takes_of(manifest: Mapping[str, Any]) -> list[str]:
    """What can be taken along of a story now: nothing before it is finished, and a film where ffmpeg is there."""
    if not manifest or not is_finished(manifest):
        return []
    return [name for name in (*WHOLE_FILES, *RENDERED) if name != "film.mp4" or ffmpeg() is not None]


def taken_along(shelf: Shelf, story: str, name: str) -> FileResponse:
    """A file to be saved. Raises NoSuchStory for another name, InUse before the story is finished."""
    if name not in (*WHOLE_FILES, *RENDERED):
        raise NoSuchStory("there is no such file of a story")
    manifest, folder = shelf.manifest(story), shelf.run(story)
    if manifest is None or not is_finished(manifest):
        raise InUse("the story is not finished: draw it to its end first")
    made = Path(tempfile.mkdtemp(prefix="fastory-take-"))  # the story may go to the trash while it is sent
    try:
        if name in WHOLE_FILES:
            _copy(shelf, folder / name, made / name)
        else:
            render(folder, RENDERED[name][0], made / name, RENDERED[name][1])
    except BaseException:
        files.remove(made)
        raise
    return FileResponse(
        made / name, filename=f"{story}-{name}", background=BackgroundTask(files.remove, made)
    )


def _copy(shelf: Shelf, file: Path, to: Path) -> None:
    missing = NoSuchStory("there is no such file of a story")
    if files.is_link_below(shelf.root, file):
        raise missing
    try:
        shutil.copyfile(file, to)
    except FileNotFoundError:
        raise missing from None


def picture_bytes(shelf: Shelf, story: str, frame: int, round: int | None, take: str | None) -> bytes:
    """A picture that the manifest lists. One that a redraw moves just now is looked for again, in its place."""
    for _ in range(2):
        try:
            return picture_file(shelf, story, frame, round, take).read_bytes()
        except FileNotFoundError:
            continue
    raise NoSuchStory("there is no such picture: it was moved")


def chunks_of(data: bytes) -> dict[str, str]:
    """The text chunks of a PNG of ours, as runs/provenance.py makes them. Raises InputError where there are none."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            chunks = {name: str(image.text[name]) for name in ("parameters", "fastory")}  # type: ignore[attr-defined]
            json.loads(chunks["fastory"])
            return chunks
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            "the picture does not say what it was drawn from: it is damaged; draw it again"
        ) from error


def picture_file(shelf: Shelf, story: str, frame: int, round: int | None, take: str | None) -> Path:
    """A picture that the manifest lists. Raises NoSuchStory for any other."""
    missing = NoSuchStory(f"there is no such picture of frame {frame if 0 <= frame < 10**6 else '?'}")
    manifest = shelf.manifest(story)
    if manifest is None:
        raise missing
    if take == "redraw" and not manifest.get("redraw"):
        take = None  # it has moved in since it was asked for
    pictures = manifest["pictures"] if take != "redraw" else manifest["redraw"]["pictures"]
    rounds = [k for k in range(rounds_of(manifest["settings"])) if str(frame) in pictures.get(str(k), {})]
    chosen = (rounds[-1] if rounds else -1) if round is None else round
    name = picture_name(chosen, frame) if chosen in rounds else ""
    if take is not None and take != "redraw":
        name = f"history/{take}/{name}" if name in manifest.get("history", {}).get(take, ()) else ""
    elif take == "redraw" and (shelf.run(story) / "redraw" / name).is_file():
        name = f"redraw/{name}"  # or in its place already: it is moving in
    file = shelf.run(story) / name
    if not name or files.is_link_below(shelf.root, file) or not file.is_file():
        raise missing
    return file
