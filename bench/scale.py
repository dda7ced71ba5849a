"""How far more GPUs carry: a story over ranks, many stories over workers, and what binds; predicted, checked where it can be.

    python bench/scale.py [--frame-seconds S --frames N --rounds K ...]      # predicted tables for 1 to 1,000 GPUs
    python bench/scale.py --measure [--repeats 3]                            # this machine's points beside their predictions

The model. A round of N frames in micro-batches over G ranks takes the time of the rank with most of them, lengthened by
the slowest device, then an exchange: rank 0 sends the tokens of N references to every other rank and receives N pictures.
Rank 0 writes meanwhile, and where that takes longer it is what a round takes. A batch of M stories over G workers draws each
story on one of them, fewer on a slow one; whoever holds the queue receives and writes every picture. What binds is the
largest part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

GPUS = (1, 2, 4, 8, 16, 32, 64, 100, 250, 1000)
STORIES = (1, 100, 10_000, 1_000_000)


@dataclass(frozen=True)
class Costs:
    """What the model is given. Times in seconds, sizes in bytes, links in bytes a second.

    frame_seconds: a frame of a round on one device. batch: frames at once, fewer where ranks would have
    none. slowest: how much longer the slowest of all devices takes, as a share. load_seconds: until a model is open.
    write_seconds: a picture and its manifest on rank 0, or by the queue. finish_seconds: sheet and storybook. latency: of a
    message. price: of a GPU hour.
    """

    frame_seconds: float = 2.0
    frames: int = 100
    rounds: int = 11
    batch: int = 4
    slowest: float = 0.05
    load_seconds: float = 20.0
    write_seconds: float = 0.02
    finish_seconds: float = 5.0
    picture_bytes: float = 450e3
    token_bytes: float = 2.5e3
    link: float = 1.25e9
    latency: float = 1e-3
    price: float = 2.0


@dataclass(frozen=True)
class Prediction:
    """Seconds of a whole run on `gpus` devices, and the part that binds."""

    gpus: int
    seconds: float
    binds: str


def story_over_ranks(costs: Costs, gpus: int) -> Prediction:
    """One story by torchrun."""
    batch = min(costs.batch, math.ceil(costs.frames / gpus))
    share = math.ceil(math.ceil(costs.frames / batch) / gpus) * batch
    even = costs.frames / gpus * costs.frame_seconds
    slowest = costs.slowest if gpus > 1 else 0.0
    compute = min(share, costs.frames) * costs.frame_seconds * (1 + slowest)
    away = costs.frames * (1 - 1 / gpus)
    tokens = (gpus - 1) * costs.frames * costs.token_bytes / costs.link
    exchange = (
        tokens + away * costs.picture_bytes / costs.link + (2 * costs.latency * (gpus - 1) if gpus > 1 else 0)
    )
    write = costs.frames * costs.write_seconds
    step = max(compute + exchange, write)
    ends = costs.load_seconds + costs.finish_seconds
    waits = {
        "the frames themselves": costs.rounds * even,
        "uneven shares": costs.rounds * (compute / (1 + slowest) - even),
        "the slowest rank": costs.rounds * compute * slowest / (1 + slowest),
        "the exchange": costs.rounds * exchange,
        "the writer": costs.rounds * max(0.0, write - compute - exchange),
        "loading and the storybook": ends,
    }
    return Prediction(gpus, costs.rounds * step + ends, max(waits, key=lambda name: waits[name]))


def stories_over_workers(costs: Costs, stories: int, gpus: int) -> Prediction:
    """Many stories by `fastory batch`."""
    pictures = costs.frames * costs.rounds
    alone = pictures * costs.frame_seconds + costs.finish_seconds
    even = stories / gpus * alone
    slowest = costs.slowest if min(gpus, stories) > 1 else 0.0
    drawn = (math.ceil(stories / gpus) + slowest) * alone
    write = stories * pictures * (costs.write_seconds + costs.picture_bytes / costs.link)
    waits = {
        "the frames themselves": even,
        "uneven shares": drawn - slowest * alone - even,
        "the slowest worker": slowest * alone,
        "the writer": max(0.0, write - drawn),
        "loading": costs.load_seconds,
    }
    return Prediction(gpus, max(drawn, write) + costs.load_seconds, max(waits, key=lambda name: waits[name]))


def tables(costs: Costs) -> Iterator[str]:
    """Markdown, predicted."""
    yield f"predicted with {costs}"
    base = story_over_ranks(costs, 1).seconds
    yield from ("", f"One story of {costs.frames} frames:", "", *head())
    for gpus in GPUS:
        yield row(story_over_ranks(costs, gpus), base, costs.price)
    for stories in STORIES:
        base = stories_over_workers(costs, stories, 1).seconds
        yield from (
            "",
            f"{stories:,} {'story' if stories == 1 else 'stories'} of {costs.frames} frames, a batch:",
            "",
            *head(),
        )
        for gpus in GPUS:
            yield row(stories_over_workers(costs, stories, gpus), base, costs.price)


def head() -> tuple[str, str]:
    """Of a table."""
    return "| GPUs | hours | times faster | GPU hours | cost | binds |", "|---|---|---|---|---|---|"


def row(predicted: Prediction, base: float, price: float) -> str:
    """A prediction beside the time of one GPU. price: of a GPU hour."""
    hours = predicted.seconds / 3600
    return (
        f"| {predicted.gpus} | {hours:,.3f} | {base / predicted.seconds:,.1f} | {hours * predicted.gpus:,.1f} | "
        f"{hours * predicted.gpus * price:,.0f} | {predicted.binds} |"
    )


# -- measured ----------------------------------------------------------------------------------------------------

CAPTIONS = ("a cat is jumping", "a fox in the snow", "a bear", "a rabbit in the forest")
SMALL = ("--steps=20", "--iterations=2", "--batch-size=2", "--device=cpu", "--json")


@dataclass(frozen=True)
class Measured:
    """A command's seconds: of a later round and of the whole by the clock, and of all its processes by the CPU.

    Other work on the machine lengthens the first two, and the third hardly.
    """

    round: float
    wall: float
    cpu: float


def measured(folder: Path, frames: int, ranks: int, threads: int, name: str) -> Measured:
    """A story drawn with `ranks` processes of `threads` threads; 0 ranks: no torchrun."""
    story = folder / "story.txt"
    story.write_text("\n".join(CAPTIONS[i % len(CAPTIONS)] for i in range(frames)) + "\n", encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    command = [
        sys.executable,
        *torchrun,
        "-m",
        "fastory",
        "generate",
        str(story),
        "-o",
        str(folder / name),
        *SMALL,
    ]
    started, before = time.perf_counter(), _cpu_seconds()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    wall, cpu = time.perf_counter() - started, _cpu_seconds() - before
    events = [json.loads(line) for line in done.stdout.splitlines()]
    seconds = [event["seconds"] for event in events if event["event"] == "RoundFinished"]
    return Measured(statistics.median(seconds[1:]), wall, cpu)


def _cpu_seconds() -> float:
    """Of all processes that this one started and that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(repeats: int, frames: int = 8) -> Iterator[str]:
    """Every layout in turn, `repeats` times; the median, and what the model says of it from one process of one thread."""
    layouts = {
        "one process, 1 thread": (0, 1),
        "torchrun, 1 rank, 1 thread": (1, 1),
        "torchrun, 2 ranks, 1 thread each": (2, 1),
        "one process, 2 threads": (0, 2),
    }
    found: dict[str, list[Measured]] = {name: [] for name in layouts}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for number, (name, (ranks, threads)) in enumerate(layouts.items()):
                run = measured(Path(folder), frames, ranks, threads, f"run-{repeat}-{number}")
                found[name].append(run)
    first = statistics.median(run.round for run in found["one process, 1 thread"])
    costs = Costs(frame_seconds=first / frames, frames=frames, rounds=1, batch=2, slowest=0, load_seconds=0, write_seconds=0,
                  finish_seconds=0, picture_bytes=6e3, token_bytes=2e3)  # fmt: skip
    load = os.getloadavg()[0]
    yield f"{os.cpu_count()} cores, load {load:.1f} at the end, {frames} frames, {' '.join(SMALL)}, {repeats} repeats"
    yield from (
        "",
        "| layout | round, s (all) | predicted | command, s | CPU of all its processes, s (all) |",
        "|---|---|---|---|---|",
    )
    for name, (ranks, threads) in layouts.items():
        said = f"{story_over_ranks(costs, max(1, ranks)).seconds:.2f}" if threads == 1 else ""
        wall = statistics.median(run.wall for run in found[name])
        round, cpu = ([getattr(run, what) for run in found[name]] for what in ("round", "cpu"))
        yield f"| {name} | {_listed(round)} | {said} | {wall:.1f} | {_listed(cpu)} |"


def _listed(values: Sequence[float]) -> str:
    """The median, and all of them."""
    return f"{statistics.median(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"


def parsed(arguments: Sequence[str] | None) -> tuple[Mapping[str, float], bool, int]:
    """Costs by name, whether to measure, and how often."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    for field in fields(Costs):
        kind = int if field.type == "int" else float
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    said = vars(parser.parse_args(arguments))
    return {field.name: said[field.name] for field in fields(Costs)}, said["measure"], said["repeats"]


if __name__ == "__main__":
    values, measuring, count = parsed(None)
    for line in measure(count) if measuring else tables(Costs(**values)):  # type: ignore[arg-type]
        print(line, flush=True)
