"""What is drawn goes into the run folders beside the drawing: files on threads of their own, one manifest a micro-batch."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastory.events import BatchHalved, Event, FrameDrawn, RoundFinished, RoundStarted, StepDone
from fastory.runs.folder import RunFolder
from fastory.runs.provenance import png_chunks
from fastory.runs.story_run import StoryRun

# Threads that compress and write. A CPU that draws has one to spare; a GPU's host has little else to do.
THREADS = {"cpu": 1, "cuda": 4}


@dataclass(frozen=True)
class Writing:
    """A picture on its way to the disk. sha256: of the file, when it is written. seconds: that drawing it took."""

    drawn: FrameDrawn
    folder: RunFolder
    sha256: Future[str]
    seconds: float


class Recorder:
    """Writes the pictures of stories that are drawn together.

    An event of a picture is passed on when its file and its record are written: a kill costs the micro-batch whose pictures
    are being written, and the steps of the next one. On the CPU they are waited for before the next micro-batch's first step
    is passed on, on a GPU they are looked at after every step, which is on its way by then.
    """

    def __init__(self, group: Sequence[StoryRun]) -> None:
        """group: the runs that are drawn together."""
        self._runs: Mapping[int, StoryRun] = {run.index: run for run in group}
        device = group[0].model.placement.device.type
        self._waits = device == "cpu"
        self._threads = ThreadPoolExecutor(THREADS.get(device, 1), "fastory-pictures")
        self._writing: list[Writing] = []
        self._between = False  # whether another event came since the last picture
        self._any = False
        self._before = time.monotonic()

    def watch(self, events: Iterator[Event | None]) -> Iterator[Event | None]:
        """Pass events on; pictures and halvings are in the run folders by then."""
        try:
            for event in events:
                if isinstance(event, FrameDrawn):
                    yield from self._picture(event)
                    continue
                self._between = True
                if isinstance(event, StepDone | None) and not self._waits and not self._written():
                    yield event
                    continue
                yield from self._record()
                if isinstance(event, BatchHalved):
                    self._halve(event)
                if isinstance(event, BatchHalved | RoundStarted | RoundFinished):
                    self._before = time.monotonic()
                yield event
            yield from self._record()
        finally:
            try:
                self._record()  # what is drawn is kept, whatever ended the drawing
            finally:
                self._threads.shutdown()

    def _picture(self, drawn: FrameDrawn) -> Iterator[FrameDrawn]:
        """Begin to write a picture, after those of the micro-batch before it are recorded."""
        run = self._runs[drawn.story_index]
        if run.folder is None:
            yield drawn
            return
        now = time.monotonic()
        seconds, self._before = now - self._before, now
        if self._between:
            yield from self._record()
        self._between = False
        chunks = png_chunks(run.story.title, run.prompts[drawn.frame], run.settings, run.model, drawn)
        name = run.folder.place_of(drawn.round, drawn.frame)
        run.folder.make_folder_of(name)
        sha256 = self._threads.submit(write_png, run.folder, name, drawn.image, chunks)
        self._writing.append(Writing(drawn, run.folder, sha256, seconds))
        if not self._any:  # the first picture is shown as soon as it is there
            self._any = True
            yield from self._record()

    def _written(self) -> bool:
        return bool(self._writing) and all(writing.sha256.done() for writing in self._writing)

    def _record(self) -> Sequence[FrameDrawn]:
        """Wait for what is being written and record it, a manifest a folder; returns the pictures in their order.

        Raises FastoryError for the first that could not be written, when the others are recorded.
        """
        writing = self._writing
        failed = [error for picture in writing if (error := picture.sha256.exception()) is not None]
        written = [picture for picture in writing if picture.sha256.exception() is None]
        self._writing = []
        for folder in {id(picture.folder): picture.folder for picture in written}.values():
            folder.record(
                (picture.drawn, picture.sha256.result(), picture.seconds)
                for picture in written
                if picture.folder is folder
            )
        if failed:
            raise failed[0]
        return [
            replace(
                picture.drawn,
                path=picture.folder.path / picture.folder.place_of(picture.drawn.round, picture.drawn.frame),
            )
            for picture in written
        ]

    def _halve(self, event: BatchHalved) -> None:
        for run in self._runs.values():
            if run.folder is None:
                continue
            if event.frame is None:
                run.folder.halve(event.round, event.size)
            else:
                run.folder.halve_from(event.frame, event.size)


def write_png(folder: RunFolder, name: str, image: Image.Image, chunks: Mapping[str, str]) -> str:
    """Write a picture with its text chunks at `name` of a run folder; returns the file's sha256."""
    info = PngInfo()
    for key, text in chunks.items():
        info.add_itxt(key, text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return folder.write(name, buffer.getvalue())
