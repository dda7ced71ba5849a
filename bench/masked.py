"""What references of characters cost on this processor: `python bench/masked.py [--repeats 9]`. Paired, processor time.

Frames of two characters, drawn by the built-in model in one micro-batch from the same pictures: with the story's references
alone (`--regions off`), with groups and masks of the characters (`auto`), and with boxes, which keep words and self-attention
apart as well. The ways take turns. `step` is a denoising step; `before` what a round does once before its first: captions, the
last pictures as references, and with `auto` the UNet call of every frame of two that finds its characters.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median

import results

from fastory import Story, StoryModel, generate
from fastory.builtin.evaluation.iterative import FirstRound, by_round
from fastory.modes.iterative import prepare_round
from fastory.modes.mode import StoryPlan
from fastory.settings import resolve
from fastory.story import Character

CAPTIONS = (
    "Bo is standing in the forest",
    "Pip is reading a book in the snow",
    "Bo and Pip are jumping in the snow",
    "Bo is holding a flag on the mountain",
    "Bo and Pip are standing on the mountain",
    "Pip is playing with a ball on the beach",
    "Bo and Pip are reading a book on the beach",
    "Pip and Bo are sleeping in the house",
)
TWO = (2, 4, 6, 7)
BOXES = (("Bo", (0.0, 0.1, 0.5, 1.0)), ("Pip", (0.5, 0.1, 1.0, 1.0)))
STEPS = 5


def measured(model: StoryModel, plan: StoryPlan) -> tuple[float, float]:
    """Processor seconds of what comes before the steps, and of one step of the frames of two."""
    began = time.process_time()
    sampler, rows = prepare_round(model, plan, 1, len(TWO))
    before = time.process_time() - began
    steps = sampler.denoise([rows[i] for i in TWO])
    next(steps)  # allocates
    began = time.process_time()
    count = sum(1 for _ in steps)
    return before, (time.process_time() - began) / count


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    model = StoryModel.open("builtin", device="cpu")
    story = Story.from_captions(
        CAPTIONS, characters=(Character("Bo", "a bear"), Character("Pip", "a penguin"))
    )
    frames = [replace(frame, boxes=BOXES if i in TWO else ()) for i, frame in enumerate(story.frames)]
    boxed = replace(story, frames=tuple(frames))
    first = FirstRound(by_round(generate(story, model=model, seed=0, iterations=0))[0])
    plans = {}
    for name, drawn, regions in (("off", story, "off"), ("auto", story, "auto"), ("boxes", boxed, "auto")):
        settings = resolve({"iterations": 1, "steps": STEPS, "regions": regions}, {}, None, model.defaults)[0]
        plans[name] = StoryPlan(drawn, settings, finished=first)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in plans}
    for turn in range(options.repeats + 1):
        for name, plan in plans.items():
            both = measured(model, plan)
            if turn:  # the first fills caches
                taken[name].append(both)
    print(results.environment("cpu"))
    print(
        "| regions | before, ms | step, ms | step / step off, paired | round of 15 steps / off |\n|"
        + "---|" * 5
    )
    for name, rows in taken.items():
        pairs = list(zip(rows, taken["off"], strict=True))
        step = median(own[1] / off[1] for own, off in pairs)
        whole = median((own[0] + 15 * own[1]) / (off[0] + 15 * off[1]) for own, off in pairs)
        before, each = (1e3 * median(row[n] for row in rows) for n in (0, 1))
        print(f"| {name} | {before:.1f} | {each:.1f} | {step:.3f} | {whole:.3f} |")


if __name__ == "__main__":
    main()
