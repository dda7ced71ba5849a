"""Where the time of a whole story goes: `python bench/story.py sd15 sdxl --out OUT`. Full-size models, random weights.

The real generate into a run folder: captions, steps, decoding, CLIP, PNG, manifest. `first` is the first story of the model,
which compiles and captures; `next` is another one after it. Parts are waited for where they end, so that each has its own
seconds; `else` is what none of them is.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from random_models import SIZES, random_model
from report import Report, arguments

from fastory import Story, StoryModel, generate
from fastory.events import FrameDrawn, StepDone
from fastory.runs.folder import RunFolder
from fastory.runtime import Placement

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# What is clocked, by the name it has in a row: methods of the model, of pictures and of run folders.
OF_THE_MODEL = {"captions": "encode_caption", "decode": "decode", "references": "encode_reference"}


@contextmanager
def clocked(
    owner: Any, method: str, part: str, seconds: Counter[str], device: torch.device
) -> Iterator[None]:
    """Adds what calls of a method take to seconds[part]; inner parts are taken off the outer one's."""
    original, own = getattr(owner, method), method in vars(owner)

    def call(*arguments: Any, **options: Any) -> Any:
        before, inside = time.perf_counter(), seconds.total()
        try:
            return original(*arguments, **options)
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[part] += time.perf_counter() - before - (seconds.total() - inside)

    setattr(owner, method, call)
    try:
        yield
    finally:
        setattr(owner, method, original) if own else delattr(owner, method)


def tell(model: StoryModel, story: Story, **settings: Any) -> dict[str, Any]:
    """Draws one story into a folder that is thrown away: seconds of its parts, and to the first picture."""
    seconds, steps, first, pictures, black = Counter[str](), 0.0, 0.0, 0, 0
    beside = Counter[str]()  # what threads do while the next pictures are drawn
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for part, method in OF_THE_MODEL.items():
            stack.enter_context(clocked(model, method, part, seconds, model.device))
        stack.enter_context(clocked(Image.Image, "save", "png", beside, torch.device("cpu")))
        for part, method in {"files": "record", "storybook": "finish"}.items():
            stack.enter_context(clocked(RunFolder, method, part, seconds, model.device))
        began = time.perf_counter()
        for event in generate(story, model=model, output=Path(folder) / "story", **settings):
            if isinstance(event, StepDone):
                steps += event.seconds
            elif isinstance(event, FrameDrawn):
                first = first or time.perf_counter() - began
                pictures, black = pictures + 1, black + (event.left_out is not None)
        whole = time.perf_counter() - began
    seconds["steps"] = steps
    seconds["else"] = whole - seconds.total()
    found: dict[str, Any] = {
        "seconds": round(whole, 3),
        "first_picture_s": round(first, 3),
        "pictures": pictures,
        "black": black,
        "png_beside_s": round(beside["png"], 3),
        "parts_s": {part: round(taken, 3) for part, taken in seconds.most_common()},
        "share": {part: round(taken / whole, 3) for part, taken in seconds.most_common()},
    }
    if model.device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def tell_with(
    made: list[StoryModel], name: str, placement: Placement, captions: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """tell() with the model in `made`, which the first call makes."""
    if not made:
        made.append(random_model(name, placement))
    return tell(made[0], Story.from_captions(captions), **settings)


def main() -> int:
    """Writes story.jsonl."""
    parser = arguments(__doc__, minutes=3)
    parser.add_argument("models", nargs="+", choices=list(SIZES))
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", choices=list(TYPES), default=["fp16"])
    options = parser.parse_args()
    report = Report("story", options)
    settings = {"steps": options.steps, "iterations": options.iterations, "batch_size": options.frames}
    for name in options.models:
        for dtype in options.dtypes:
            placement = Placement(
                torch.device(report.device), TYPES[dtype], torch.get_num_threads(), report.gpu
            )
            made: list[StoryModel] = []
            for n, which in enumerate(("first", "next")):
                cell = {"model": name, "dtype": dtype, "story": which, "frames": options.frames, **settings}
                captions = [f"story {n}: a fox swims in the sea {i}" for i in range(options.frames)]

                report.cell(cell, partial(tell_with, made, name, placement, captions, settings))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
