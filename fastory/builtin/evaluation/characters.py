"""Two characters of a frame and where they stand: python -m fastory.builtin.evaluation.characters --stories 16

Held-out stories whose two characters are called by name, of two species and of one (`alike`), with the masks that a run finds
(`auto`) and with the boxes of the drawn scenes. Then controls, of two species: one round more from the last pictures, in which
the characters' references reach their own masks, each other's (looks must swap) or those of another frame (looks must suffer).
With --said 1 instead: stories whose characters' prompts say something of their looks, and how much of it is drawn.
Intervals are 95 % bootstrap intervals over stories.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastory import Story, StoryModel, generate
from fastory.builtin.evaluation.classifier import FILE, Classifier, load_classifier
from fastory.builtin.evaluation.distinct import FREE
from fastory.builtin.evaluation.iterative import (
    FirstRound,
    HeldOutStory,
    Judged,
    Rounds,
    by_round,
    held_out_stories,
    judge,
    print_rounds,
    scores,
    summary,
)
from fastory.builtin.training.loop import stream
from fastory.builtin.world.drawing import Box, draw_with_boxes
from fastory.modes.iterative import IterativeRun, draw_round
from fastory.modes.mode import StoryPlan
from fastory.modes.regions import Regions, Seen
from fastory.settings import Settings, resolve

CASES = tuple((cast, where) for cast in ("two", "alike") for where in ("auto", "boxes"))
SHOWN = ("distinct", "both right", "own colours", *(f"{n} {w}" for n in FREE for w in ("within", "across")))
SAID_CASES = (("mixed", "auto"), ("alike", "auto"))
SAID_SHOWN = tuple(f"said {name}{count}" for count in (1, 2) for name in ("", *(f"{n} " for n in FREE)))
BATCH = 4  # frames at once: with references from the latest round it is part of the rule
Last = Mapping[int, Seen]
Places = dict[str, Tensor | None]


def drawn_boxes(story: HeldOutStory) -> tuple[tuple[tuple[str, Box], ...], ...]:
    """The boxes of every frame's characters, by name, as the drawn world places them."""
    rng = stream("held-out boxes", story.seed, 0, 0)
    found = []
    for scene in story.tale.scenes:
        boxes = draw_with_boxes(story.tale.cast, scene, rng)[1]
        found.append(
            tuple((story.names[role.member], box) for role, box in zip(scene.roles, boxes, strict=True))
        )
    return tuple(found)


def as_story(story: HeldOutStory, boxes: bool = False) -> Story:
    """A held-out story with its characters. boxes: with those of the drawn scenes."""
    made = Story.from_captions(story.captions, characters=story.characters)
    if not boxes:
        return made
    frames = zip(made.frames, drawn_boxes(story), strict=True)
    return replace(made, frames=tuple(replace(frame, boxes=placed) for frame, placed in frames))


def draw(model: StoryModel, story: HeldOutStory, boxes: bool, settings: Mapping[str, Any]) -> np.ndarray:
    """The pictures (frames, H, W, 3) of the last round."""
    events = generate(as_story(story, boxes), model=model, seed=story.seed, batch_size=BATCH, **settings)
    return by_round(events)[-1]


class Misplaced(Regions):
    """Characters' references reach where `rule` says. Where they are found in pictures, and their words, stay as they are."""

    def __init__(self, regions: Regions, rule: Callable[[int, list[Places]], Places]) -> None:
        self.__dict__.update(vars(regions))
        self.rule = rule

    def places(self, i: int, last: Last) -> Places:
        """The masks of the characters in frame i that the rule makes of those of all frames."""
        return self.rule(i, [super(Misplaced, self).places(j, last) for j in range(len(self.casts))])


def own(i: int, places: list[Places]) -> Places:
    """As a run has them."""
    return places[i]


def swapped(i: int, places: list[Places]) -> Places:
    """In a frame of two each has the other's."""
    return dict(zip(places[i], reversed(places[i].values()), strict=True))


def of_another_frame(i: int, places: list[Places]) -> Places:
    """In a frame of two each has its own of the story's next frame of two; as it is where there is none."""
    count = len(places)
    others = (places[(i + n) % count] for n in range(1, count))
    fitting = (other for other in others if len(other) == 2 and set(other) == set(places[i]))
    return next(fitting, places[i]) if len(places[i]) == 2 else places[i]


RULES = {"own": own, "swapped": swapped, "another frame's": of_another_frame}


def one_round_more(
    model: StoryModel,
    story: HeldOutStory,
    pictures: np.ndarray,
    rule: Callable[[int, list[Places]], Places],
    settings: Settings,
) -> np.ndarray:
    """A whole round from the pictures (frames, H, W, 3), references from these alone, where the rule says."""
    last = settings.reference_scale[1]
    chosen = replace(
        settings,
        seed=story.seed,
        iterations=1,
        references_from="last",
        reference_scale=(last, last),
    )
    plan = StoryPlan(as_story(story), chosen, finished=FirstRound(pictures))
    run = IterativeRun.of(model, plan, [BATCH])
    assert run.regions is not None
    run.regions = run.drawn.regions = Misplaced(run.regions, rule)
    return by_round(draw_round(run, 1, BATCH))[-1]


def looks_in_frames_of_two(before: Judged, after: Judged) -> dict[str, float]:
    """How often a character in a frame of two shows its own look of before, and the other's.

    Of the attributes in which the most frequent values of the two differed; nothing for a story where none did.
    """
    shows: list[tuple[bool, bool]] = []
    for name in FREE:
        looks = [np.bincount(values).argmax() for values in before.shown(name)]
        if looks[0] == looks[1]:
            continue
        for frame, scene in enumerate(after.story.tale.scenes):
            if len(scene.roles) == 2:
                values = zip(after.free[name][frame], scene.roles, strict=True)
                shows += [(v == looks[role.member], v == looks[1 - role.member]) for v, role in values]
    if not shows:
        return {}
    self, other = np.mean(np.array(shows, float), 0)
    return {"own look": float(self), "the other's": float(other)}


def measure(
    model: StoryModel,
    classifier: Classifier,
    stories: Sequence[HeldOutStory],
    title: str,
    boxes: bool,
    settings: Mapping[str, Any],
) -> tuple[list[np.ndarray], dict[str, tuple[float, float, float]]]:
    """Draw the stories and print their scores."""
    drawn = []
    for number, story in enumerate(stories):
        drawn.append(draw(model, story, boxes, settings))
        print(f"{title}: story {number + 1} of {len(stories)}", flush=True)
    rows = [scores(judge(classifier, *pair)) for pair in zip(stories, drawn, strict=True)]
    found = summary([{name: row[name] for name in (*SHOWN, *SAID_SHOWN) if name in row} for row in rows])
    print_rounds(f"{title}, {len(stories)} stories", [found])
    return drawn, found


def controls(
    model: StoryModel,
    classifier: Classifier,
    stories: Sequence[HeldOutStory],
    drawn: Sequence[np.ndarray],
    settings: Settings,
) -> Iterator[tuple[str, list[np.ndarray], dict[str, tuple[float, float, float]]]]:
    """By rule: one round more from the drawn pictures, and whose look the characters show in it."""
    before = [judge(classifier, *pair) for pair in zip(stories, drawn, strict=True)]
    for name, rule in RULES.items():
        pictures, rows = [], []
        for story, first, seen in zip(stories, drawn, before, strict=True):
            pictures.append(one_round_more(model, story, first, rule, settings))
            judged = judge(classifier, story, pictures[-1])
            right = {key: value for key, value in scores(judged).items() if key == "both right"}
            rows.append({**looks_in_frames_of_two(seen, judged), **right})
        found = summary(rows)
        print_rounds(f"control, masks: {name}", [found])
        yield name, pictures, found


def save_sheet(columns: Sequence[Rounds], file: Path) -> None:
    """The first four stories, a row for each way they were drawn."""
    rows = [np.concatenate(list(way[n]), 1) for n in range(min(4, len(columns[0]))) for way in columns]
    Image.fromarray(np.concatenate(rows)).save(file)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Every setting is as shipped unless given."""
    parser = argparse.ArgumentParser(
        prog="python -m fastory.builtin.evaluation.characters", description=__doc__
    )
    parser.add_argument("--stories", type=int, default=16)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--said", type=float, default=0.0, help="share of stories whose prompts tell of looks"
    )
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--classifier", type=Path, default=FILE)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--inner-steps", type=int)
    parser.add_argument("--references-from", choices=("last", "latest"))
    parser.add_argument("--reference-scale", type=float, help="of all rounds")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path, help="a folder for evaluation.json and sheets of pictures")
    options = parser.parse_args(arguments)
    if options.stories < 1:
        parser.error("wanted --stories 1 or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; with --output also write them."""
    options = parse(arguments)
    names = ("iterations", "inner_steps", "references_from", "reference_scale", "steps")
    values = {name: getattr(options, name) for name in names}
    settings = {name: value for name, value in values.items() if value is not None}
    model, classifier = StoryModel.open(options.model), load_classifier(options.classifier)
    shipped = resolve(settings, {}, None, model.defaults)[0]
    print(shipped)
    report: dict[str, Any] = {"stories": options.stories, "seed": options.seed, "settings": settings}
    sheets: dict[str, list[Any]] = {}
    for cast, where in SAID_CASES if options.said else CASES:
        stories = held_out_stories(options.stories, options.seed, cast=cast, said=options.said, named=True)
        title = f"{cast}, {where}"
        drawn, report[title] = measure(model, classifier, stories, title, where == "boxes", settings)
        sheets.setdefault(cast, []).append(drawn)
        if (cast, where) == ("two", "auto"):
            for name, pictures, found in controls(model, classifier, stories, drawn, shipped):
                report[f"masks: {name}"] = found
                sheets[cast].append(pictures)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            save_sheet(sheets[cast], options.output / f"{cast}.png")
            (options.output / "evaluation.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
