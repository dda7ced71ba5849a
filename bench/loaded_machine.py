"""Two rounds on a quiet machine and beside busy loops, in one paired run.

    python bench/loaded_machine.py [--repeats 5] [--loops 2] [--all] [--save]

A process stays open and opens the model and draws whenever it is told to: first quiet, then beside the busy loops,
`repeats` times, so that what disturbs the machine disturbs both alike. `fastory` is the command's own choice of waiting
and threads. --all adds what that choice is worth: fixed numbers of threads, waiting passively and spinning, OpenMP's
default, all taking turns with it (minutes, as spinning beside other work is what it measures).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import psutil
import results

# What would take the place of a way's own waiting and threads.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
TARGET = 3.0  # loaded, in multiples of quiet

DRAW = """
import sys, time
if {fastory}:
    from fastory.threads import wait_passively
    wait_passively()
from fastory import Story, StoryModel, generate
story = Story.from_captions(["a fox is sleeping in the snow", "a cat is reading a book", "a bear is jumping"])
def draw():
    model = StoryModel.open("builtin", device="cpu")
    began = time.perf_counter()
    list(generate(story, model=model, steps=2, iterations=1))
    return f"{{time.perf_counter() - began}} {{model.placement.threads}}"
draw()
print("ready", flush=True)
for line in sys.stdin:
    print(draw(), flush=True)
"""


class Way:
    """A process that draws two rounds whenever it is asked."""

    def __init__(self, name: str, environment: dict[str, str], stack: ExitStack) -> None:
        self.name = name
        self.seconds: dict[str, list[float]] = {"quiet": [], "loaded": []}
        self.threads: dict[str, list[int]] = {"quiet": [], "loaded": []}
        clean = {key: value for key, value in os.environ.items() if key not in VARIABLES}
        self.process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", DRAW.format(fastory=name == "fastory")], env=clean | environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )
        )  # fmt: skip
        stack.callback(self.process.kill)
        self._answer()

    def draw(self, state: str) -> None:
        """state: quiet or loaded, under which the seconds are kept."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, threads = self._answer().split()
        self.seconds[state].append(float(seconds))
        self.threads[state].append(int(threads))
        print(f"  {self.name}, {state}: {float(seconds):.3f} s with {threads} threads", flush=True)

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name!r} ended")
        return line

    def as_dict(self) -> dict[str, Any]:
        """Medians, their ratio, and all that was measured."""
        quiet, loaded = (median(self.seconds[state]) for state in ("quiet", "loaded"))
        return {
            "way": self.name,
            "quiet_s": round(quiet, 3),
            "loaded_s": round(loaded, 3),
            "loaded_over_quiet": round(loaded / quiet, 2),
            "all_s": {state: [round(s, 3) for s in taken] for state, taken in self.seconds.items()},
            "threads": self.threads,
        }


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Processes that compute for as long as the body runs."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        time.sleep(0.5)  # until they run
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ways(everything: bool, stack: ExitStack) -> Iterator[Way]:
    """fastory's choice, and with `everything` what it could have chosen."""
    yield Way("fastory", {}, stack)
    if everything:
        for count in sorted({1, len(os.sched_getaffinity(0))}):
            fixed = {"OMP_NUM_THREADS": str(count)}
            yield Way(f"passive, {count}", {**fixed, "OMP_WAIT_POLICY": "PASSIVE"}, stack)
            yield Way(f"spinning, {count}", fixed, stack)


def measure(repeats: int, loops: int, everything: bool) -> dict[str, Any]:
    """All ways in turn. Load and idle time are the machine's before anything of ours ran."""
    load, idle = os.getloadavg()[0], 100 - psutil.cpu_percent(interval=1)
    with ExitStack() as stack:
        all_ways = list(ways(everything, stack))
        for _ in range(repeats):
            for way in all_ways:
                way.draw("quiet")
            with busy(loops):
                for way in all_ways:
                    way.draw("loaded")
    rows = [way.as_dict() for way in all_ways]
    return {
        "what": "3 frames of the built-in model, 2 rounds, 2 steps; medians",
        "loops": loops,
        "repeats": repeats,
        "load_before": round(load, 2),
        "idle_before_percent": round(idle, 1),
        "target": f"fastory: loaded at most {TARGET:g} times quiet",
        "met": rows[0]["loaded_over_quiet"] <= TARGET,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loops", type=int, default=2, help="busy loops (default 2)")
    parser.add_argument("--all", action="store_true", help="fixed numbers of threads and spinning beside it")
    parser.add_argument("--save", action="store_true", help="write bench/results/loaded-machine-cpu.json")
    options = parser.parse_args()
    found = measure(options.repeats, options.loops, options.all)
    for row in found["rows"]:
        print(
            f"{row['way']:<12} quiet {row['quiet_s']:7.3f} s, loaded {row['loaded_s']:7.3f} s, "
            f"{row['loaded_over_quiet']:.2f} times"
        )
    print(f"{found['target']}: {'met' if found['met'] else 'missed'}")
    if options.save:
        results.FOLDER.mkdir(exist_ok=True)
        file = results.FOLDER / "loaded-machine-cpu.json"
        record = {"kind": "measured", "environment": results.environment("cpu"), **found}
        file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
