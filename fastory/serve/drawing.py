"""The queue: what is to be drawn, one request after the other, in a process of its own; and who listens to what happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastory import files
from fastory.serve.shelf import InUse, Shelf, is_finished

MOST_WAITING = 500  # events that a listener may be behind; then it is let go, and comes again
BETWEEN_STEPS = 0.1  # seconds between two StepDone of a story that are passed on
HEARTBEAT = 15.0  # seconds


@dataclass
class Progress:
    """How far the story that is being drawn is. steps: of the UNet and a frame; seconds_left: None before there was one."""

    round: int = 0
    rounds: int = 1
    step: int = 0
    steps: int = 0
    done: int = 0
    left: int = 0
    finished: int = 0
    total: int = 0
    seconds_left: float | None = None
    since: float = 0.0
    steps_of_round: int = 0

    def note(self, event: Mapping[str, Any]) -> None:
        """Take in one of the library's events."""
        match event["event"]:
            case "StoryStarted":
                self.left, self.rounds, self.since = event["steps_left"], event["rounds"], 0.0
                self.finished, self.total = event["finished"], event["total"]
            case "RoundStarted":
                self.round, self.steps_of_round = event["round"], event["steps"]
            case "StepDone" if not event["draft"]:
                now, count = time.monotonic(), len(event["frames"])
                self.since = self.since or now - event["seconds"]
                self.round, self.step, self.steps = event["round"], event["step"], event["steps"]
                self.done, self.left = self.done + count, max(0, self.left - count)
                self.seconds_left = (now - self.since) / self.done * self.left
            case "FrameDrawn":
                self.finished += 1
                if event["converged"] is not None:
                    self.left = max(0, self.left - self.steps_of_round)

    def shown(self) -> dict[str, Any]:
        """As the API has it."""
        left = None if self.seconds_left is None else round(self.seconds_left, 1)
        names = ("round", "rounds", "step", "steps", "finished", "total")
        return {**{name: getattr(self, name) for name in names}, "seconds_left": left}


class Drawing:
    """Draws the requests of a shelf in their order. Requests are files: a server that is killed finds them again."""

    def __init__(self, shelf: Shelf, model: Mapping[str, Any]) -> None:
        """model: arguments of StoryModel.open."""
        self.shelf, self._model = shelf, dict(model)
        self.current: str | None = None
        self.progress = Progress()
        self._process: subprocess.Popen[str] | None = None
        self._condition = threading.Condition()
        self._closing = False
        self._listeners: dict[str, set[asyncio.Queue[str | None]]] = defaultdict(set)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._passed_on = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin with what is left of the last time. loop: where listeners wait."""
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """End the process that draws, and let all listeners go."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for listeners in self._listeners.values():
            for waiting in listeners:
                self._put(waiting, None)

    @property
    def model_name(self) -> str:
        """builtin, or whatever --model named."""
        return str(self._model["model"])

    # -- what is wanted ------------------------------------------------------------------------------------------

    def state(self, story: str) -> str:
        """draft, queued, drawing, paused or finished."""
        if self.current == story:
            return "drawing"
        request, manifest = self.shelf.request(story), self.shelf.manifest(story)
        if request is not None and not request.get("paused") and not request.get("error"):
            return "queued"
        if manifest is None:
            return "draft"
        return "finished" if is_finished(manifest) else "paused"

    def submit(self, story: str, request: Mapping[str, Any]) -> None:
        """Put a request behind the others. Raises InUse where the story has one that is not paused."""
        with self._condition:
            if self.state(story) in ("queued", "drawing"):
                raise InUse("the story is in the queue already: pause it first")
            self.shelf.write_request(story, {**request, "order": time.time_ns()})
            self._condition.notify_all()
        self.publish(story, {"event": "StateChanged"})

    def pause(self, story: str) -> None:
        """Stop drawing it, or take it from the queue; what is drawn is kept. Raises InUse where it is in neither."""
        with self._condition:
            request = self.shelf.request(story)
            if request is None or self.state(story) not in ("queued", "drawing"):
                raise InUse("the story is not being drawn: there is nothing to pause")
            self.shelf.write_request(story, {**request, "paused": True})
            if self.current == story:
                self._tell({"kind": "stop"})
        self.publish(story, {"event": "StateChanged"})

    def stop(self, story: str) -> None:
        """End what is wanted of it: see give_up. Raises InUse where nothing is."""
        with self._condition:
            request, state = self.shelf.request(story), self.state(story)
            if state in ("draft", "finished"):
                raise InUse("the story is not being drawn: there is nothing to stop")
            if state == "drawing" and request is not None:
                self.shelf.write_request(story, {**request, "paused": True, "stopped": True})
                self._tell({"kind": "stop"})
            else:
                self._give_up(story)
        self.publish(story, {"event": "StateChanged"})

    def _give_up(self, story: str) -> None:
        """Forget the request: a finished run stays, an unfinished redraw of it is given up, another run is a draft again."""
        manifest = self.shelf.manifest(story)
        if manifest is not None and manifest.get("redraw"):
            self.shelf.write_request(story, {"kind": "draw", "order": time.time_ns()})
            self._condition.notify_all()
            return
        if manifest is not None and not is_finished(manifest):
            self.shelf.back_to_draft(story)
        self.shelf.write_request(story, None)

    # -- drawing -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            with self._condition:
                found = self._next()
                if found is None:
                    self._condition.wait()
                    continue
                self.current, self.progress = found[0], Progress()
            story, request = found
            self.publish(story, {"event": "StateChanged"})
            end = self._draw(story, request)
            with self._condition:
                if not self._closing:
                    self._settle(story, end)
                self.current = None
            self.publish(story, {"event": "StateChanged"})

    def _next(self) -> tuple[str, dict[str, Any]] | None:
        waiting = self.shelf.requests()
        return next(
            (pair for pair in waiting if not pair[1].get("paused") and not pair[1].get("error")), None
        )

    def _draw(self, story: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Pass the events on. Returns the last one."""
        self._tell({**request, "story": story})
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            self.progress.note(event)
            if event["event"].startswith("Request"):
                return dict(event)
            self.publish(story, event)
        code = self._process.wait()
        message = f"the process that draws ended ({code}); what is drawn is kept, and going on continues it"
        return {"event": "RequestFailed", "message": message, "exit_code": 1}

    def _settle(self, story: str, end: Mapping[str, Any]) -> None:
        """Write down how a request ended."""
        request = self.shelf.request(story) or {}
        match end["event"]:
            case "RequestDone":
                if "replaces" in request:
                    remember(self.shelf, story, request)
                self.shelf.write_request(story, None)
                if not self.shelf.notes(story).get("pictures"):
                    files.remove(self.shelf.draft(story))  # the run folder has the story and its pictures
            case "RequestStopped" if request.get("stopped"):
                self._give_up(story)
            case "RequestStopped":
                self.shelf.write_request(story, {**request, "paused": True})
            case _:
                self.shelf.write_request(
                    story, {**request, "error": end["message"], "exit_code": end["exit_code"]}
                )

    def _tell(self, message: Mapping[str, Any]) -> None:
        """Send a line to the process that draws, which is started where there is none."""
        if self._process is None or self._process.poll() is not None:
            if message["kind"] == "stop":
                return
            command = [sys.executable, "-m", "fastory.serve.worker"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
            self._write({"root": str(self.shelf.root), "model": self._model})
        self._write(message)

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has just ended: its stdout says so
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    # -- listening -----------------------------------------------------------------------------------------------

    def publish(self, story: str, event: Mapping[str, Any]) -> None:
        """Pass an event on to all who listen to the story; steps at most ten times a second. From any thread."""
        now = time.monotonic()
        if event["event"] == "StepDone":
            if now - self._passed_on < BETWEEN_STEPS:
                return
            self._passed_on = now
        values = {**event, "story": story}
        if self.current == story:
            values["progress"] = self.progress.shown()
        line = json.dumps(values)
        if self._loop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # the loop was closed just now
                self._loop.call_soon_threadsafe(self._send, story, line)

    def _send(self, story: str, line: str) -> None:
        for name in (story, ""):
            for waiting in self._listeners.get(name, ()):
                self._put(waiting, line)

    @staticmethod
    def _put(waiting: asyncio.Queue[str | None], line: str | None) -> None:
        if waiting.qsize() >= MOST_WAITING:
            line = None
        if waiting.qsize() <= MOST_WAITING:
            waiting.put_nowait(line)

    async def listen(self, story: str) -> AsyncIterator[str]:
        """Server-sent events of a story, or of all under "", until whoever listens is gone or too far behind."""
        waiting: asyncio.Queue[str | None] = asyncio.Queue()
        self._listeners[story].add(waiting)
        try:
            yield 'retry: 1000\ndata: {"event": "Listening"}\n\n'
            while True:
                try:
                    line = await asyncio.wait_for(waiting.get(), HEARTBEAT)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if line is None:
                    return
                yield f"data: {line}\n\n"
        finally:
            self._listeners[story].discard(waiting)
            if not self._listeners[story]:
                del self._listeners[story]


def remember(shelf: Shelf, story: str, request: Mapping[str, Any]) -> None:
    """Keep what the frames of a redraw said before it under its number in the run folder's history; it may have drawn none."""
    history, replaced = (shelf.manifest(story) or {}).get("history", {}), request["replaces"]
    number, notes = max(history, key=int, default="0"), shelf.notes(story)
    if int(number) > replaced["after"]:
        notes.setdefault("before", {})[number] = replaced["before"]
        if replaced.get("given"):
            notes.setdefault("given", {})[number] = replaced["given"]
    if request["kind"] == "redraw" and request.get("pictures") == notes.get("pictures"):
        notes.pop("pictures", None)  # the story has them now
    shelf.write_notes(story, notes)
