"""The API over a folder of stories: its routes, and its errors in the words and with the codes of the command line."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from fastory import __version__
from fastory.documents import parse_json, validated
from fastory.errors import FastoryError, InputError
from fastory.serve import bodies, changes
from fastory.serve.checks import check_story, notices_of
from fastory.serve.drawing import Drawing
from fastory.serve.gate import BodyRefused
from fastory.serve.given_pictures import pictures_for_next, what_is_read
from fastory.serve.pictures import pictures_api, takes_of
from fastory.serve.shelf import InUse, NoSuchStory, Shelf, drawn
from fastory.wording import last_words

STATUS = ((NoSuchStory, 404), (InUse, 409), (InputError, 422), (FastoryError, 503))
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": bodies.Failure} for status in (400, 401, 403, 404, 405, 408, 409, 413, 421, 422, 503)
}

STREAM: dict[str, Any] = {
    "response_class": StreamingResponse,
    "responses": {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
}


def taken(model: type[Any]) -> tuple[Any, dict[str, Any]]:
    """A dependency that reads a body as `model`, and the route's part of the OpenAPI document for it."""

    async def body(request: Request) -> Any:
        data = await request.body()
        where, words = Path("the request"), {"what": "JSON as /docs describes it", "todo": "correct it"}
        return validated(model, parse_json(data or b"{}", where, **words), where, **words)

    schema = _inlined(model.model_json_schema())
    wanted = bool(schema.get("required"))
    return Depends(body), {
        "requestBody": {"required": wanted, "content": {"application/json": {"schema": schema}}}
    }


def _inlined(schema: dict[str, Any]) -> Any:
    """A schema without $defs: each reference replaced with what it names."""
    defined = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inline(defined[value["$ref"].rsplit("/", 1)[-1]])
            return {name: inline(inner) for name, inner in value.items()}
        return [inline(inner) for inner in value] if isinstance(value, list) else value

    return inline(schema)


def make_app(shelf: Shelf, drawing: Drawing) -> FastAPI:
    """The application."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        drawing.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            drawing.close()

    bearer = HTTPBearer(auto_error=False, description="The token of the printed address; gate.py looks at it")
    app = FastAPI(
        title="fastory",
        version=__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        responses=FAILURES,
        dependencies=[Depends(bearer)],
    )
    app.include_router(stories_api(shelf, drawing))
    app.include_router(one_story_api(shelf, drawing))
    app.include_router(drawing_api(shelf, drawing))
    app.include_router(changes_api(shelf, drawing))
    app.include_router(pictures_api(shelf, drawing))
    for kind in (FastoryError, RequestValidationError, HTTPException, BodyRefused, Exception):
        app.add_exception_handler(kind, failure(shelf))
    return app


def failure(shelf: Shelf) -> Callable[[Request, Exception], JSONResponse]:
    """An error as an answer; paths are named from the server's folder on."""

    def answer(request: Request, error: Exception) -> JSONResponse:
        code = 2
        match error:
            case FastoryError():
                status, code = next(n for kind, n in STATUS if isinstance(error, kind)), error.exit_code
                said = str(error).replace(f"{shelf.root}/", "")
            case RequestValidationError():
                first = error.errors()[0]
                status, said = 422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            case HTTPException():
                status, said = error.status_code, str(error.detail)
            case BodyRefused():
                status, said = error.status, str(error)
            case _:
                status, code, said = 500, 1, last_words(error)
        headers = {"allow": allowed(request)} if status == 405 else getattr(error, "headers", None)
        return JSONResponse({"error": said, "exit_code": code}, status, headers=headers)

    return answer


def allowed(request: Request) -> str:
    """Methods of this address, all of them: a route by itself knows its own alone."""
    segments = request.url.path.split("/")
    found: set[str] = set()
    for path, methods in request.app.openapi()["paths"].items():
        parts = path.split("/")
        if len(parts) == len(segments) and all(
            p == a or p.startswith("{") for p, a in zip(parts, segments, strict=True)
        ):
            found.update(method.upper() for method in methods)
    return ", ".join(sorted(found or {"GET"}))


def summary(shelf: Shelf, drawing: Drawing, story: str) -> dict[str, Any]:
    """A row of the list. A run folder that cannot be read is one, too, with its error."""
    try:
        manifest, request, notes = shelf.manifest(story), shelf.request(story), shelf.notes(story)
        state = drawing.state(story)
        said = {} if manifest is not None else shelf.said(story)
    except FastoryError as error:
        broken = {"name": story, "state": "draft", "frames": 0, "newest": None, "progress": None}
        return {"id": story, **broken, "error": str(error), "disk_bytes": shelf.disk_bytes(story)}
    listed = said.get("frames")
    title = manifest["story"]["title"] if manifest is not None else said.get("title")
    rounds = drawn(manifest) if manifest is not None else []
    newest = next(((k, rounds[k]) for k in reversed(range(len(rounds))) if rounds[k]), None)
    first = min(map(int, newest[1])) if newest else 0
    return {
        "id": story,
        "name": notes.get("name") or (title if isinstance(title, str) and title.strip() else "Untitled"),
        "state": state,
        "frames": len(manifest["story"]["frames"])
        if manifest is not None
        else len(listed or ())
        if isinstance(listed, list)
        else 0,
        "disk_bytes": shelf.disk_bytes(story),
        "newest": (newest[0], first, newest[1][str(first)]) if newest else None,
        "progress": drawing.progress.shown() if state == "drawing" else None,
        "error": (request or {}).get("error"),
    }


def stories_api(shelf: Shelf, drawing: Drawing) -> APIRouter:
    """All stories, and new ones."""
    api = APIRouter()
    new_story, new_schema = taken(bodies.NewStory)
    text, text_schema = taken(bodies.StoryText)

    @api.get("/stories", response_model=list[bodies.Summary], summary="All stories, the newest first")
    def list_stories() -> Any:
        return [summary(shelf, drawing, story) for story in shelf.ids()]

    @api.post(
        "/stories",
        status_code=201,
        response_model=bodies.Created,
        openapi_extra=new_schema,
        summary="A new story, as a draft or into the queue",
    )
    def create(body: bodies.NewStory = new_story) -> Any:
        if body.draw:
            check_story(body.story)
        story = shelf.create(body.story)
        if body.draw:
            drawing.submit(story, {"kind": "draw"})
        return {"id": story}

    @api.post(
        "/check",
        response_model=bodies.Checked,
        openapi_extra=text_schema,
        summary="What is wrong with a story, or will not come out as it says",
    )
    def check(body: bodies.StoryText = text) -> Any:
        try:
            checked = check_story(body.story)
        except InputError as error:
            return {"error": str(error), "notices": []}
        return {"error": None, "notices": notices_of(checked, drawing.model_name)}

    @api.get("/events", **STREAM, summary="What happens to any story, as server-sent events")
    async def events() -> StreamingResponse:
        return StreamingResponse(drawing.listen(""), media_type="text/event-stream")

    return api


def one_story_api(shelf: Shelf, drawing: Drawing) -> APIRouter:
    """A story: what it is, and what is kept of it."""
    api = APIRouter(prefix="/stories/{story}")
    text, text_schema = taken(bodies.StoryText)
    changed, changed_schema = taken(bodies.Changes)

    @api.get("", response_model=bodies.Shown, summary="All that is known of it")
    def show(story: str) -> Any:
        return shown(shelf, drawing, shelf.known(story))

    @api.put("", response_model=bodies.Created, openapi_extra=text_schema, summary="Write a draft anew")
    def write(story: str, body: bodies.StoryText = text) -> Any:
        shelf.known(story)
        if drawing.state(story) != "draft":
            raise InUse("the story is in the queue or drawn: duplicate it to change it")
        shelf.write_draft(story, body.story)
        return {"id": story}

    @api.patch(
        "",
        response_model=bodies.Created,
        openapi_extra=changed_schema,
        summary="Its name in the list, its locked frames, pictures that what is drawn next goes by",
    )
    def change(story: str, body: bodies.Changes = changed) -> Any:
        notes = shelf.notes(shelf.known(story))
        if body.locked is not None:
            manifest = shelf.manifest(story)
            count = len(manifest["story"]["frames"]) if manifest is not None else 0
            if outside := [frame for frame in body.locked if frame >= count]:
                raise InputError(
                    f"locked: wanted frames of the drawn story, 0 to {count - 1}, got {outside[0]}"
                )
            notes["locked"] = sorted(set(body.locked))
        if body.pictures is not None:
            if drawing.state(story) not in ("finished", "draft"):
                raise InUse("the story is in the queue or being drawn: give it pictures once it is finished")
            notes["pictures"] = pictures_for_next(shelf, story, body.pictures)
        if body.name is not None:
            notes["name"] = body.name
        shelf.write_notes(story, notes)
        drawing.publish(story, {"event": "StateChanged"})
        return {"id": story}

    @api.delete("", response_model=bodies.Created, summary="Into the trash folder")
    def delete(story: str) -> Any:
        if drawing.state(shelf.known(story)) == "drawing":
            raise InUse("the story is being drawn: pause it first")
        shelf.to_trash(story)
        drawing.publish(story, {"event": "Deleted"})
        return {"id": story}

    @api.post(
        "/duplicate", status_code=201, response_model=bodies.Created, summary="A draft that says the same"
    )
    def duplicate(story: str) -> Any:
        return {"id": shelf.duplicate(shelf.known(story))}

    return api


def shown(shelf: Shelf, drawing: Drawing, story: str) -> dict[str, Any]:
    """All that is known of a story."""
    manifest, request = shelf.manifest(story) or {}, shelf.request(story)
    redraw, settings = manifest.get("redraw") or {}, manifest.get("settings")
    notes = shelf.notes(story)
    names = {
        number: sorted({name.rsplit("frame-", 1)[-1][:-4] for name in kept})
        for number, kept in manifest.get("history", {}).items()
    }
    return {
        **summary(shelf, drawing, story),
        "story": shelf.said(story),
        "settings": settings,
        "pictures": drawn(manifest) if manifest else [],
        "redrawn": {
            k: {i: record["sha256"][:12] for i, record in pictures.items()}
            for k, pictures in redraw.get("pictures", {}).items()
        },
        "history": {number: [str(int(frame)) for frame in frames] for number, frames in names.items()},
        "appended_by": manifest.get("appended", {}),
        "undoable": sorted(changes.undoable(manifest, notes)),
        "locked": notes.get("locked", []),
        "redraw": (request or {}).get("frames"),
        "appended": ((request or {}).get("appended") or {}).get("captions", []),
        "takes": takes_of(manifest),
        "reads": what_is_read(settings or shelf.said(story).get("settings")),
        "next_pictures": notes.get("pictures"),
        "recast": shelf.recast(story),
        "width": settings.get("width") if settings else None,
        "height": settings.get("height") if settings else None,
    }


def drawing_api(shelf: Shelf, drawing: Drawing) -> APIRouter:
    """A story's drawing: the queue, what happens, pictures."""
    api = APIRouter(prefix="/stories/{story}")
    wanted, wanted_schema = taken(bodies.Draw)

    @api.post(
        "/draw",
        status_code=202,
        response_model=bodies.Created,
        openapi_extra=wanted_schema,
        summary="Into the queue: a draft, or what was paused",
    )
    def draw(story: str, body: bodies.Draw = wanted) -> Any:
        state = drawing.state(shelf.known(story))
        drawing.submit(story, what_goes_on(shelf, story, state, body))
        return {"id": story}

    @api.post(
        "/cancel", status_code=202, response_model=bodies.Created, summary="Pause it: what is drawn is kept"
    )
    def cancel(story: str) -> Any:
        drawing.pause(shelf.known(story))
        return {"id": story}

    @api.post(
        "/stop",
        status_code=202,
        response_model=bodies.Created,
        summary="End it: an unfinished redraw is forgotten, an unfinished story is a draft again, its pictures in the trash",
    )
    def stop(story: str) -> Any:
        drawing.stop(shelf.known(story))
        return {"id": story}

    @api.get(
        "/events",
        **STREAM,
        summary="What happens to it, as server-sent events: the library's own, and StateChanged",
    )
    async def events(story: str) -> StreamingResponse:
        return StreamingResponse(drawing.listen(shelf.known(story)), media_type="text/event-stream")

    return api


CHANGES: tuple[tuple[str, type[Any], Callable[[Shelf, str, Any], dict[str, Any]], str], ...] = (
    (
        "redraw",
        bodies.Redraw,
        changes.redraw,
        "Draw some frames again, with other captions or seeds; all others stay as they are",
    ),
    (
        "append",
        bodies.Append,
        changes.append,
        "Go on with the story: new frames are drawn against the rest, which stays as it is",
    ),
    (
        "take-back",
        bodies.TakeBack,
        changes.take_back,
        "Put the pictures back that a redraw replaced, and what the frames said; frames that it appended leave the story",
    ),
)


def changes_api(shelf: Shelf, drawing: Drawing) -> APIRouter:
    """A finished story's changes: each body becomes a request of the queue."""
    api = APIRouter(prefix="/stories/{story}")

    def add(name: str, model: type[Any], request_of: Callable[..., dict[str, Any]], summary: str) -> None:
        change, schema = taken(model)

        def submit(story: str, body: Any = change) -> Any:
            drawing.submit(story, request_of(shelf, shelf.known(story), body))
            return {"id": story}

        api.post(
            f"/{name}",
            name=name,
            status_code=202,
            response_model=bodies.Created,
            openapi_extra=schema,
            summary=summary,
        )(submit)

    for row in CHANGES:
        add(*row)
    return api


def what_goes_on(shelf: Shelf, story: str, state: str, body: bodies.Draw) -> dict[str, Any]:
    """The request of a draft, or of what was paused. Raises InUse where there is nothing to draw."""
    manifest, request = shelf.manifest(story), shelf.request(story) or {}
    if state == "draft":
        check_story(shelf.said(story), draft=shelf.draft(story))
    if state == "finished":
        raise InUse("the story is finished: redraw frames of it, or duplicate it")
    if body.give_up_redraw:
        return {"kind": "draw"}
    if (manifest or {}).get("redraw") and request.get("kind") not in ("redraw", "take_back"):
        raise InUse("a redraw begun elsewhere is not finished: finish it there, or give it up")
    kept = ("kind", "frames", "seed", "number", "before", "replaces", "appended", "pictures")
    return {"kind": "draw", **{name: request[name] for name in kept if name in request}}


def new_token() -> str:
    """Not to be guessed."""
    return secrets.token_urlsafe(24)
