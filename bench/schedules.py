"""Fewer UNet calls: which schedule of rounds, steps and references keeps agreement and captions at the fewest calls.

    python bench/schedules.py --out FILE [--model MODEL] [--minutes N] [--stories 4 8 16]

Successive halving (Jamieson and Talwalkar, AISTATS 2016) over CANDIDATES: all are drawn on a few held-out stories of the drawn
world; of each price band, in UNet calls a frame, the better half goes on to more. Stories of the seeds that figures are
reported on are never searched on. A row is appended as soon as a story is judged, so the same command goes on where it
was ended, and rows of other weights are left alone. `--only NAME ...` measures these candidates, on any seed; `--table` prints
what a file holds. What the rows say is judged by the classifier of the drawn world: it wants a model that draws that world.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from results import environment

from fastory import Story, StoryModel, generate
from fastory.builtin.evaluation.classifier import Classifier, load_classifier
from fastory.builtin.evaluation.iterative import (
    FRAMES,
    HeldOutStory,
    Rounds,
    by_round,
    held_out_stories,
    judge,
    scores,
)
from fastory.builtin.evaluation.quality import calibrate, pixel_diversity, quality_scores, restore
from fastory.events import FrameDrawn, StepDone
from fastory.intervals import interval
from fastory.modes.iterative import iterative
from fastory.modes.mode import StoryPlan
from fastory.presets import PRESETS
from fastory.settings import Settings, own_steps, resolve

REPORTED_SEEDS = (1, 5)
PAPER, ONE_REFERENCE = "paper's rule", "one reference"
AGREEMENT = ("colour", "hat", "scarf")
CAPTIONS = ("species", "place", "action", "both right")
COLUMNS = (
    *AGREEMENT,
    *CAPTIONS,
    "own colours",
    "distinct",
    "purity",
    "patched",
    "edge energy",
    "diversity",
    "changed",
)
RISING = "0.3:0.9"  # the weights of the first round with references and the last
SETTLED = 3  # the round after which no story should change its common colour
# What of the preset `paper` is its schedule; guidance, noise and regions stay the model's own.
SCHEDULE = (
    *("iterations", "inner_steps", "reference_scale", "references_from", "scheduler", "until", "restart"),
    *("reference_rise", "reference_momentum", "reference_weighting", "reference_ramp"),
    "reference_saturation",
)
CALIBRATED = 16  # stories, whose drawn pictures say from which purity on a body counts as patched
BANDS = (
    16.5,
    20.0,
    27.5,
    55.0,
    1e9,
)  # UNet calls a frame: a tenth of the paper's rule's 165, a sixth, a third, ..


@dataclass(frozen=True, eq=False)
class Candidate:
    """A schedule. settings: of fastory, beside the paper's rule in the steps of the model. batch_size: frames at once, part of
    the rule where references are the latest ones. one_reference: frame 0 of round 0 is the only reference, the Reference-Image
    paradigm.
    """

    name: str
    settings: Mapping[str, Any]
    batch_size: int = 4
    one_reference: bool = False

    @property
    def key(self) -> str:
        """Equal for candidates that draw the same."""
        return json.dumps([dict(self.settings), self.batch_size, self.one_reference], sort_keys=True)


def schedule(
    iterations: int, inner: int, seen: str, size: int = 4, scale: float | str = 0.5, **more: Any
) -> Candidate:
    """So many rounds after round 0, all but the last in `inner` steps. scale: as `--reference-scale` takes it. more: further
    settings, which the name tells.
    """
    settings = {"iterations": iterations, "inner_steps": inner, "references_from": seen}
    name = f"{iterations} x {inner} {seen}, {size} at once, weight {scale}{named(more)}"
    return Candidate(name, {**settings, "reference_scale": scale, **more}, size)


def papers(**more: Any) -> Candidate:
    """The paper's rule, and further settings."""
    return Candidate(f"{PAPER}{named(more)}", more)


def named(settings: Mapping[str, Any]) -> str:
    """Settings as the end of a name."""
    return "".join(f", {name} {value}" for name, value in settings.items() if name != "until")


def candidates() -> list[Candidate]:
    """What is searched, and first what it is held against: the paper's rule, and one round with one reference."""
    compared = [Candidate(PAPER, {}), Candidate(ONE_REFERENCE, {"iterations": 1}, one_reference=True)]
    few = [
        schedule(iterations, inner, seen, size)
        for iterations, inner in ((1, 10), (2, 4), (2, 6), (3, 4), (4, 3), (6, 2))
        for seen, size in (("last", 4), ("latest", 4), ("latest", 2))
    ]
    heavier = [schedule(2, 6, "latest", scale=0.7), schedule(3, 4, "latest", scale=0.7)]
    more = [schedule(10, 4, "last"), schedule(5, 6, "latest")]
    converged = [papers(until="converged", tolerance=tolerance) for tolerance in (0.02, 0.01, 0.005)]
    restarted = [papers(restart=0.6), papers(restart=0.3)]
    restarted += [
        schedule(iterations, inner, "latest", restart=share)
        for iterations, inner, share in ((2, 6, 0.6), (3, 4, 0.6), (3, 4, 0.8), (4, 6, 0.4))
    ]
    risen = [papers(reference_rise=1), papers(reference_rise=3), papers(iterations=5, reference_rise=3)]
    weighted = [
        schedule(3, 4, "latest", **chosen)
        for chosen in (
            {"reference_momentum": 0.3},
            {"reference_momentum": 0.6},
            {"reference_momentum": 0.8},
            {"reference_weighting": "majority"},
            {"reference_momentum": 0.6, "reference_weighting": "majority"},
            {"reference_ramp": "0.5:1.5"},
            {"reference_ramp": "1.5:0.5"},
        )
    ]
    weighted += [papers(reference_weighting="majority"), papers(reference_momentum=0.5)]
    return [
        *compared,
        *few,
        *heavier,
        *more,
        *converged,
        *restarted,
        *risen,
        *weighted,
        *solved(),
        *dearer(),
    ]


def solved() -> list[Candidate]:
    """27 UNet calls by solvers of a higher order, which leave steps of the last round for further rounds."""
    multistep = partial(schedule, seen="latest", scheduler="unipc")
    few = [
        schedule(3, 4, "latest", scheduler="dpm++"),
        schedule(4, 4, "latest", scheduler="dpm++", steps=11),
        schedule(4, 4, "latest", steps=11),
        multistep(3, 4),
        multistep(4, 4, steps=11),
        multistep(5, 3, steps=12),
        multistep(6, 3, steps=9),
        multistep(6, 3, steps=9, scale=0.6),
    ]
    few += [multistep(5, 4, steps=7, scale=scale) for scale in (0.5, 0.6, 0.7)]
    few += [
        multistep(5, 4, steps=7, **more)
        for more in (
            {"noise": "per-round"},
            {"noise": "per-round", "reference_momentum": 0.3},
            {"reference_momentum": 0.3},
            {"reference_weighting": "majority"},
            {"restart": 0.75},
        )
    ]
    again = partial(multistep, 5, 4, steps=7, noise="per-round")
    few += [again(scale=scale) for scale in (0.6, 0.7, "0.4:0.7", "0.4:0.9", RISING)]
    few += [again(cast_limit=3), again(reference_ramp="0.5:1.5")]
    few += [
        again(scale=scale, reference_weighting="majority") for scale in (0.5, "0.4:0.7", RISING, "0.3:1.1")
    ]
    majority = partial(again, scale=RISING, reference_weighting="majority")
    few += [majority(reference_saturation=factor) for factor in (1.15, 1.3, 1.6)]
    return [*few, schedule(5, 4, "last", scheduler="unipc", steps=7)]


def dearer() -> list[Candidate]:
    """What more UNet calls than a sixth bring, up to as many as the paper's rule has."""
    multistep = partial(schedule, seen="latest", scheduler="unipc")
    several = [multistep(10, 4), multistep(10, 4, scale=0.7), multistep(20, 6, scale=0.7)]
    again = [multistep(10, 4, noise="per-round"), multistep(10, 4, noise="per-round", reference_momentum=0.3)]
    again += [multistep(10, 4, scale=0.7, noise="per-round", reference_weighting="majority")]
    risen = partial(multistep, scale=RISING)
    more: dict[str, Any] = {"reference_weighting": "majority", "reference_rise": 4}
    again += [risen(10, inner, noise="per-round", **more) for inner in (4, 10, 15)]
    again += [risen(10, inner, noise="per-round", **more, reference_saturation=1.15) for inner in (4, 15)]
    again += [risen(12, 4, steps=7, noise="per-round", **more, reference_saturation=1.15)]
    again += [risen(10, 4, noise="per-frame", **more)]
    return [*several, *again, multistep(10, 15), multistep(16, 9)]


@dataclass(frozen=True)
class OneReference:
    """Round 0 as drawn, of which frame 0 alone may be a reference: the Reference-Image paradigm."""

    pictures: Mapping[int, Image.Image]

    def has(self, round: int, frame: int) -> bool:
        return round == 0

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        return self.pictures[frame], "not the reference" if frame else None


@dataclass(frozen=True)
class Drawn:
    """The pictures (rounds, frames, H, W, 3), the UNet calls of a frame, mean over frames, and seconds."""

    rounds: Rounds
    calls: float
    seconds: float


def draw(model: StoryModel, story: HeldOutStory, candidate: Candidate) -> Drawn:
    """One story by one schedule. A call with two rows, conditional and unconditional, counts one."""
    started, calls = time.monotonic(), 0
    pictures: list[FrameDrawn] = []
    for event in events_of(model, story, candidate):
        if isinstance(event, StepDone):
            calls += len(event.frames)
        elif isinstance(event, FrameDrawn):
            pictures.append(event)
    seconds, rounds = time.monotonic() - started, by_round(pictures)
    return Drawn(rounds, calls / len(rounds[-1]), seconds)


def changed(classifier: Classifier, story: HeldOutStory, rounds: Sequence[np.ndarray]) -> bool:
    """Whether a character's most frequent body colour is another one in a round after SETTLED than in the one before."""
    common = [
        [int(np.bincount(values).argmax()) for values in judge(classifier, story, pictures).shown("colour")]
        for pictures in rounds[SETTLED:]
    ]
    return any(before != after for before, after in pairwise(common))


def rule(model: StoryModel) -> dict[str, Any]:
    """The paper's schedule in the model's own steps: what a candidate stands beside where it says nothing else."""
    own = {"steps": own_steps(model.defaults), "noise": model.defaults.get("noise", Settings.noise)}
    return {name: PRESETS["paper"][name] for name in SCHEDULE} | own


def events_of(model: StoryModel, held_out: HeldOutStory, candidate: Candidate) -> Iterator[Any]:
    """The events of a story drawn by a schedule, without a folder."""
    story, size = Story.from_captions(held_out.captions), candidate.batch_size
    settings = {**rule(model), **candidate.settings} | ({"iterations": 0} if candidate.one_reference else {})
    first: dict[int, Image.Image] = {}
    for event in generate(story, model=model, seed=held_out.seed, batch_size=size, **settings):
        if isinstance(event, FrameDrawn):
            first[event.frame] = event.image
        yield event
    if candidate.one_reference:
        flags = {**rule(model), **candidate.settings, "seed": held_out.seed}
        chosen, _ = resolve(flags, {}, None, model.defaults)
        last = chosen.reference_scale[1]
        chosen = replace(chosen, reference_scale=(last, last), references="all", regions="off")
        yield from iterative(
            model, StoryPlan(story, chosen, finished=OneReference(first)), batch_sizes=[size]
        )


class Rows:
    """The file of rows: one a story and candidate. weights: of the model that is measured now. frames: of its stories."""

    def __init__(self, file: Path, weights: str, frames: int = FRAMES) -> None:
        self.file, self.weights, self.frames = file, weights, frames
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def of(self, candidate: Candidate, seed: int) -> dict[int, dict[str, Any]]:
        """Its rows by story."""
        wanted = (self.weights, candidate.key, seed, self.frames)
        return {
            row["story"]: row
            for row in self.rows
            if (row["weights"], row["key"], row["seed"], row.get("frames", FRAMES)) == wanted
        }

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, on disk before the next story begins."""
        row = {**row, "weights": self.weights, "frames": self.frames}
        self.rows.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@dataclass(frozen=True)
class Search:
    """What every candidate is measured with. stories: as many as the last rung has. until: by the monotonic clock."""

    model: StoryModel
    classifier: Classifier
    stories: Sequence[HeldOutStory]
    seed: int
    patched_below: float
    rows: Rows
    until: float

    def measure(self, candidate: Candidate, count: int) -> bool:
        """Rows of the first `count` stories, those that are missing. False where the time ended before."""
        there = self.rows.of(candidate, self.seed)
        for number, story in enumerate(self.stories[:count]):
            if number in there:
                continue
            if time.monotonic() > self.until:
                return False
            drawn = draw(self.model, story, candidate)
            found = scores(judge(self.classifier, story, drawn.rounds[-1]))
            found |= quality_scores(story, drawn.rounds[-1], self.patched_below)
            found["diversity"] = pixel_diversity(drawn.rounds[-1])
            found["changed"] = float(changed(self.classifier, story, drawn.rounds))
            self.rows.add(
                {
                    "name": candidate.name,
                    "key": candidate.key,
                    "seed": self.seed,
                    "story": number,
                    "calls": drawn.calls,
                    "seconds": round(drawn.seconds, 2),
                    "scores": {name: round(value, 5) for name, value in found.items()},
                    "environment": environment("cpu"),
                }
            )
            print(
                f"{candidate.name}: story {number}, {drawn.calls:g} calls, {drawn.seconds:.1f} s", flush=True
            )
        return True

    def halve(self, several: Sequence[Candidate], counts: Sequence[int]) -> list[Candidate]:
        """Successive halving within the bands of price. Returns those that were drawn on all stories of the last rung."""
        compared = [c for c in several if c.name in (PAPER, ONE_REFERENCE)]
        left = [c for c in several if c not in compared]
        for rung, count in enumerate(counts):
            if not all(self.measure(candidate, count) for candidate in [*left, *compared]):
                print("the time ended; the same command goes on from here")
                break
            if rung < len(counts) - 1:
                left = self.better_half(left, count)
                print(f"after {count} stories: {', '.join(candidate.name for candidate in left)}")
        return [*compared, *left]

    def better_half(self, several: Sequence[Candidate], count: int) -> list[Candidate]:
        """Of each band of UNet calls the better half by merit, at least one."""
        found = {c: [row for n, row in self.rows.of(c, self.seed).items() if n < count] for c in several}
        kept: list[Candidate] = []
        for low, high in zip((0.0, *BANDS), BANDS, strict=False):
            band = [c for c in several if low < found[c][0]["calls"] <= high]
            band.sort(key=lambda c: -merit(found[c]))
            kept += band[: -(-len(band) // 2)]
        return kept


def mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """A score's mean over the stories that have it; NaN where none has."""
    values = [row["scores"][name] for row in rows if name in row["scores"]]
    return float(np.mean(values)) if values else float("nan")


def merit(rows: Sequence[Mapping[str, Any]]) -> float:
    """Agreement, captions kept, and characters told apart, each in 0 to 1, added up."""
    parts = [np.nanmean([mean_of(rows, name) for name in names]) for names in (AGREEMENT, CAPTIONS)]
    return float(np.sum(parts) + np.nan_to_num(mean_of(rows, "distinct")))


def pareto(prices: Sequence[float], merits: Sequence[float]) -> list[bool]:
    """Which have no other that costs at most as much, is at least as good and in one of the two better."""
    pairs = list(zip(prices, merits, strict=True))
    return [
        not any(p <= price and m >= good and (p, m) != (price, good) for p, m in pairs)
        for price, good in pairs
    ]


def table(rows: Rows, seed: int, several: Sequence[Candidate]) -> str:
    """Markdown: a line a candidate, cheapest first, a star where none is cheaper and better by `merit`.

    Beside each mean, the 95 % interval of its difference from the paper's rule on the same stories.
    """
    found = {c: rows.of(c, seed) for c in several}
    found = {c: by_story for c, by_story in found.items() if by_story}
    compared = next((by_story for c, by_story in found.items() if c.name == PAPER), {})
    ordered = sorted(found, key=lambda c: next(iter(found[c].values()))["calls"])
    prices = [float(np.mean([row["calls"] for row in found[c].values()])) for c in ordered]
    stars = pareto(prices, [merit(list(found[c].values())) for c in ordered])
    lines = [
        f"| UNet calls a frame | schedule | stories | {' | '.join(COLUMNS)} |",
        "|" + "---|" * (3 + len(COLUMNS)),
    ]
    for candidate, price, star in zip(ordered, prices, stars, strict=True):
        by_story = found[candidate]
        cells = [cell(by_story, compared if candidate.name != PAPER else {}, name) for name in COLUMNS]
        lines.append(
            f"| {price:g}{' *' if star else ''} | {candidate.name} | {len(by_story)} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def cell(
    by_story: Mapping[int, Mapping[str, Any]], compared: Mapping[int, Mapping[str, Any]], name: str
) -> str:
    """A mean, and the interval of the difference from the paper's rule on the stories that both have."""
    mean = mean_of(list(by_story.values()), name)
    both = [
        by_story[n]["scores"][name] - compared[n]["scores"][name]
        for n in by_story
        if n in compared and name in by_story[n]["scores"] and name in compared[n]["scores"]
    ]
    if not both:
        return "" if np.isnan(mean) else f"{mean:.3f}"
    _, low, high = interval(both)
    return f"{mean:.3f} ({low:+.3f}, {high:+.3f})"


def weights_of(model: StoryModel) -> str:
    """A short hash of all that is drawn with."""
    return hashlib.sha256(json.dumps(sorted(model.hashes.items())).encode()).hexdigest()[:12]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the file of rows, JSON lines")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--seed", type=int, default=7, help="of the stories")
    parser.add_argument("--stories", type=int, nargs="+", default=[4, 8, 16], help="of each rung")
    parser.add_argument("--frames", type=int, default=FRAMES, help="of a story")
    parser.add_argument("--minutes", type=float, default=1e6, help="no story is begun after them")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="measure these candidates, and halve nothing"
    )
    parser.add_argument("--table", action="store_true", help="print what the file holds and draw nothing")
    options = parser.parse_args(arguments)
    if options.seed in REPORTED_SEEDS and not (options.only or options.table):
        parser.error(f"--seed {options.seed}: its stories are reported on; search on others")
    known = {candidate.name for candidate in candidates()}
    if unknown := [name for name in options.only or () if name not in known]:
        parser.error(f"--only: {unknown[0]!r} is no candidate; wanted some of {', '.join(sorted(known))}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Search, or measure, and print the table."""
    options = parse(arguments)
    until = time.monotonic() + 60 * options.minutes
    model = StoryModel.open(options.model)
    several = [c for c in candidates() if options.only is None or c.name in options.only]
    rows = Rows(options.out, weights_of(model), options.frames)
    if not options.table:
        stories = held_out_stories(max(options.stories), options.seed, options.frames)
        few = held_out_stories(
            CALIBRATED, options.seed
        )  # always as many, so that rows of two calls can be compared
        patched_below = calibrate(few, partial(restore, model))["patched below"]
        search = Search(model, load_classifier(), stories, options.seed, patched_below, rows, until)
        if options.only:
            all(search.measure(candidate, max(options.stories)) for candidate in several)
        else:
            several = search.halve(several, options.stories)
    print(table(rows, options.seed, several))


if __name__ == "__main__":
    main()
