"""`fastory batch`: a queue of many stories, drawn by this machine's devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastory.cli import generate as single
from fastory.cli.options import (
    OUTPUT,
    RUN,
    ModelOptions,
    option,
)
from fastory.cli.progress import show_batch, show_json
from fastory.cli.reporting import reported, stdout_for_results
from fastory.errors import FastoryError, InputError
from fastory.wording import counted

if TYPE_CHECKING:
    from fastory.batch.messages import Drawing, StoryFailed
    from fastory.batch.queue import Event, Workers

MOST_WORKERS = 10_000

Stories = Annotated[
    list[str],
    typer.Argument(
        help="Story files, folders of them, .jsonl files with a story a line, or names of bundled examples.",
        show_default=False,
    ),
]
Output = Annotated[
    str,
    option(
        OUTPUT,
        "--output",
        "-o",
        metavar="DIR|URL",
        help="The batch's folder, which gets a run folder for each story; or a URL, such as s3://bucket/folder.",
    ),
]
WorkerCount = Annotated[
    int | None,
    option(
        RUN,
        "--workers",
        help="Processes that draw (default: one for each CUDA device, on the CPU one in all).",
    ),
]
Ray = Annotated[
    str | None,
    option(
        RUN,
        "--ray",
        metavar="[HOST:PORT]",
        help="Draw on a Ray cluster that runs: this one, RAY_ADDRESS, or this machine's.",
    ),
]
GpusPerWorker = Annotated[
    float, option(RUN, help="--ray: GPUs of a worker, or the share of one (default 1).")
]

ActorsPerStory = Annotated[
    int,
    option(RUN, metavar="K", help="--ray: actors that draw the frames of a story together (default 1)."),
]


def queued(
    stories: Stories,
    output: Output,
    workers: WorkerCount = None,
    ray: Ray = None,
    gpus_per_worker: GpusPerWorker = 1.0,
    actors_per_story: ActorsPerStory = 1,
) -> None:
    """The options that `batch` has beside those of `generate`."""


def batch(**requested: Any) -> None:
    """Draw many stories, each into a run folder of its own, with every device of this machine or of a Ray cluster.

    A story that fails does not stop the others. The same command goes on where a batch was interrupted.
    """
    show(requested)


# Whatever setting `generate` gets, a batch has it too: Typer reads both of these.
OF_A_RUN = ("stories", "output", "first_frame", "overwrite", "frames", "redraw_seed")
PARAMETERS = {
    **signature(queued, eval_str=True).parameters,
    **{
        name: parameter
        for name, parameter in signature(single.generate, eval_str=True).parameters.items()
        if name not in OF_A_RUN
    },
}
batch.__signature__ = Signature(list(PARAMETERS.values()))  # type: ignore[attr-defined]
batch.__annotations__ = {name: parameter.annotation for name, parameter in PARAMETERS.items()}


def show(requested: Mapping[str, Any]) -> None:
    """Draw, and print what happens. Exit code 1 where stories failed."""
    output = requested["output"]
    with reported(resumable=True), stdout_for_results():  # Ray prints what it notices
        failures: list[StoryFailed] = []
        events = noting_failures(drawn(requested), failures)
        if requested["json_lines"]:
            show_json(events)
        else:
            show_batch(events, requested["quiet"])
        if failures:
            raise FastoryError(
                f"{counted(len(failures), 'story')} failed; {output}/batch.json says why. The same command tries again"
            )


def noting_failures(events: Iterator[Event], failures: list[StoryFailed]) -> Iterator[Event]:
    """Pass events on; stories that failed are added to `failures`."""
    from fastory.batch.messages import StoryFailed

    for event in events:
        if isinstance(event, StoryFailed):
            failures.append(event)
        yield event


def drawn(requested: Mapping[str, Any]) -> Iterator[Event]:
    """The events of a batch. All that can be told without the model is checked first, and PyTorch is not imported for it."""
    from fastory import door
    from fastory.batch.messages import Drawing
    from fastory.batch.queue import NoWorkers, Queue
    from fastory.batch.record import BatchFolder
    from fastory.batch.store import Store, path_or_url
    from fastory.batch.stories import read_stories
    from fastory.builtin import EXAMPLES
    from fastory.settings import Settings

    settings = {field.name: requested[field.name] for field in fields(Settings)}
    door.check_flags(settings, requested["preset"])
    door.check_placement(
        requested["device"], requested["dtype"], requested["graphs"], requested["batch_size"]
    )
    check_workers(requested)
    output = path_or_url(requested["output"])
    if isinstance(output, Path):
        door.check_paths({"--output": output})
    stories = read_stories(
        requested["stories"], EXAMPLES, lambda story: door.check_stories([story], requested["style"])
    )
    single.check_named(requested)
    options = options_of(requested, settings)
    if isinstance(output, Path):
        folder = BatchFolder(output, stories, options)
    else:
        store = Store(output)
        folder = BatchFolder(store.working_folder(options), stories, options, store)
    try:
        folder.wait_for_others()
        arguments = {name: requested[name] for name in ("preset", "batch_size")}
        drawing = Drawing(partial(single.opened_as, requested), {**arguments, **settings})
        left = len(folder.left())
        workers = workers_of(requested, drawing, left) if left else NoWorkers()
        yield from Queue(stories, folder, workers).draw()
    finally:
        folder.close()


def check_workers(requested: Mapping[str, Any]) -> None:
    """InputError for processes that cannot be."""
    from fastory import packages

    workers = requested["workers"]
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise InputError(f"--workers: wanted 1 to {MOST_WORKERS}, got {workers}")
    gpus = requested["gpus_per_worker"]
    if not (0 < gpus < 1 or gpus in range(1, 65)):
        raise InputError(f"--gpus-per-worker: wanted a share of one, or 1 to 64, got {gpus:g}")
    together = requested["actors_per_story"]
    if not 1 <= together <= MOST_WORKERS:
        raise InputError(f"--actors-per-story: wanted 1 to {MOST_WORKERS}, got {together}")
    if workers is not None and workers < together:
        raise InputError(
            f"--workers {workers} are fewer than the {together} of --actors-per-story, which draw a story together"
        )
    if requested["ray"] is None:
        if together != 1:
            raise InputError(
                "--actors-per-story is for --ray; on this machine `torchrun ... -m fastory generate` draws a story by several "
                "processes"
            )
        if gpus != 1:
            raise InputError(
                "--gpus-per-worker is for --ray; on this machine every worker has a device, see --workers"
            )
        return
    packages.require("--ray", "ray", "ray")
    if requested["device"].startswith("cuda:"):
        raise InputError(
            f"--device {requested['device']}: Ray chooses each worker's GPU; wanted auto, cpu or cuda"
        )


def options_of(requested: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the pictures of a batch and was said on the command line, as its folder keeps it."""
    named = [field.name for field in fields(ModelOptions) if field.name != "offline"]
    others = {name: requested[name] for name in ("preset", "engine", "batch_size", "dtype", *named)}
    return {name: value for name, value in {**settings, **others}.items() if value not in (None, [], ())}


def workers_of(requested: Mapping[str, Any], drawing: Drawing, stories: int) -> Workers:
    """The processes that draw, no more than there are stories left; they open their models at once."""
    if requested["ray"] is not None:
        from fastory.batch.ray_workers import RayWorkers

        together, workers = requested["actors_per_story"], requested["workers"]
        most = min(workers // together if workers else stories, stories)
        how = (requested["device"], requested["gpus_per_worker"], most, together)
        return RayWorkers(drawing, requested["ray"], *how)
    from fastory.batch.local import LocalWorkers, devices_here, threads_each

    devices = devices_here(requested["device"], requested["workers"])[:stories]
    return LocalWorkers(drawing, devices, threads_each(devices))
