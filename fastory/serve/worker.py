"""The process that draws: requests on stdin, events on stdout, a line of JSON each. It ends with the server, however that ends.

Drawing has a process of its own so that the server answers while it goes on. What is in flight when it is killed is one
micro-batch, and the same request goes on from there.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastory.errors import FastoryError
from fastory.serve.given_pictures import given_before, with_given
from fastory.serve.shelf import Shelf
from fastory.story import Frame
from fastory.story.self_contained import with_pictures_inside
from fastory.threads import wait_passively
from fastory.wording import last_words

PATHS = ("folder", "path", "sheet", "storybook")  # of events; a story is known by its id


@dataclass(frozen=True)
class RequestDone:
    """All that was wanted is drawn."""


@dataclass(frozen=True)
class RequestStopped:
    """It was stopped; what is drawn is kept."""


@dataclass(frozen=True)
class RequestFailed:
    """It cannot be drawn. message, exit_code: as the command line says it."""

    message: str
    exit_code: int


class Worker:
    """Draws a request at a time, with one model that is opened for the first."""

    def __init__(self, root: Path, model: Mapping[str, Any]) -> None:
        """root: the server's folder. model: arguments of StoryModel.open."""
        self.shelf = Shelf(root)
        self._options = dict(model)
        self._model: Any = None
        self._stop = threading.Event()
        self._requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what a library prints is no event

    def run(self) -> None:
        """Draw what comes, until stdin ends."""
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            self._draw(self._requests.get())

    def _listen(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if message["kind"] == "stop":
                self._stop.set()
            else:
                self._stop.clear()
                self._requests.put(message)
        os._exit(0)  # the server is gone: a kill at any moment is what the run folder is made for

    def _draw(self, request: Mapping[str, Any]) -> None:
        try:
            end: object = self._events(request)
        except FastoryError as error:
            end = RequestFailed(str(error), error.exit_code)
        except Exception as error:
            end = RequestFailed(last_words(error), 1)
        self._send(end)

    def _events(self, request: Mapping[str, Any]) -> object:
        from fastory.models.torch_model import StoryModel
        from fastory.runs.generate import generate

        if request["kind"] == "take_back":
            take_back_as_requested(self.shelf, request)
        if self._model is None:
            self._model = StoryModel.open(**self._options)
        events = generate(model=self._model, **generate_arguments(self.shelf, request))
        try:
            for event in events:
                self._send(event)
                if self._stop.is_set():
                    return RequestStopped()
        finally:
            events.close()  # type: ignore[attr-defined]  # releases the run folder
        return RequestDone()

    def _send(self, event: object) -> None:
        from fastory.events import as_json

        values = {name: value for name, value in json.loads(as_json(event)).items() if name not in PATHS}
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()


def generate_arguments(shelf: Shelf, request: Mapping[str, Any]) -> dict[str, Any]:
    """What fastory.generate takes for a request: the story, its run folder and, of a run that has begun, its settings."""
    from fastory.runs.manifest import settings_of

    name = request["story"]
    story, manifest = shelf.read(name), shelf.manifest(name)
    arguments: dict[str, Any] = {"output": shelf.run(name)}
    if manifest is None or story.source == shelf.draft(name) / "story.json":
        story = with_pictures_inside(story)
    if manifest is not None:
        arguments["settings"] = settings_of(manifest)
    if request["kind"] == "redraw":
        if pictures := request.get("pictures"):
            story = with_given(shelf, name, story, pictures)
        changes = {int(frame): change for frame, change in request["frames"].items()}
        frames = tuple(_changed(frame, changes.get(i, {})) for i, frame in enumerate(story.frames))
        if appended := request.get("appended"):  # once: story.yaml may have them already
            after = appended["after"]
            frames = (*frames[:after], *map(Frame, appended["captions"]))
            changes |= dict.fromkeys(range(after, len(frames)))
        story = replace(story, frames=frames)
        arguments |= {"frames": sorted(changes), "redraw_seed": request.get("seed")}
    return {"stories": story, **arguments}


def take_back_as_requested(shelf: Shelf, request: Mapping[str, Any]) -> None:
    """Put the pictures of a redraw's history back; what is drawn after it makes sheet and storybook anew."""
    from fastory.runs.take_back import take_back
    from fastory.story.schema import FrameEntry

    frames, seeds, casts = {}, {}, {}
    for number, before in request["before"].items():
        said = before["frame"] if isinstance(before["frame"], dict) else {"caption": before["frame"]}
        entry = FrameEntry.model_validate(said)
        boxes = tuple((name, (box[0], box[1], box[2], box[3])) for name, box in entry.boxes.items())
        masks = tuple((name, shelf.run(request["story"]) / mask) for name, mask in entry.masks.items())
        frames[int(number)] = Frame(entry.caption, entry.seed, tuple(entry.characters), boxes, masks)
        seeds[int(number)] = before["seed"]
        if before.get("cast"):
            casts[int(number)] = before["cast"]
    pictures = request.get("pictures")
    earlier = given_before(shelf, request["story"], pictures) if pictures else None
    run = shelf.run(request["story"])
    take_back(run, request["number"], frames, seeds, casts=casts, given_pictures=earlier)


def _changed(frame: Any, change: Mapping[str, Any]) -> Any:
    boxes = change.get("boxes")
    values = {name: change[name] for name in ("caption", "seed") if name in change}
    if boxes is not None:
        values["boxes"] = tuple((name, tuple(box)) for name, box in boxes.items())
    return replace(frame, **values)


if __name__ == "__main__":
    wait_passively()
    options = json.loads(sys.stdin.readline())
    Worker(Path(options["root"]), options["model"]).run()
