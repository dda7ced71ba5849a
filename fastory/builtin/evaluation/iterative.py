"""Measure the built-in model on held-out stories: python -m fastory.builtin.evaluation.iterative --stories 100

Draws stories of 8 frames through the fastory runtime, with the settings that the model's folder ships, from captions
of scenes that no training picture shows. An independent classifier (classifier.py) names what the pictures show.
Half of the stories have two characters. Intervals are 95 % bootstrap intervals over stories.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastory import Settings, Story, StoryModel, generate
from fastory.builtin.evaluation.classifier import (
    FILE,
    Classifier,
    accuracies,
    drawn_and_labelled,
    load_classifier,
)
from fastory.builtin.evaluation.distinct import (
    FREE,
    chance_of_modal_share,
    distinct_scores,
    modal_share,
    pairwise_share,
    shares_of_one_look,
)
from fastory.builtin.evaluation.quality import (
    calibrate,
    drawn_diversity,
    pixel_diversity,
    quality_scores,
    restore,
)
from fastory.builtin.training.loop import stream
from fastory.builtin.words import NAMES
from fastory.builtin.world.captions import caption, described
from fastory.builtin.world.corpus import sample_tale
from fastory.builtin.world.drawing import ACTIONS, PLACES, SPECIES, Scene, Tale
from fastory.builtin.world.looks import NOTHING, Said, sample_said
from fastory.events import FrameDrawn
from fastory.intervals import interval
from fastory.modes.iterative import iterative
from fastory.modes.mode import StoryPlan
from fastory.settings import resolve
from fastory.story import Character as StoryCharacter

FRAMES = 8
CASTS = ("mixed", "two", "alike")
Rounds = np.ndarray  # uint8 (rounds, frames, height, width, 3)


@dataclass(frozen=True)
class HeldOutStory:
    """A story to draw: its scenes, captions and noise seed. Of the cast's free attributes only what is said is used.

    said: for each frame which attributes of each member the caption tells; empty where none tells any. names: of the cast,
    where captions call it by name and the story tells who that is, in prompts.
    """

    tale: Tale
    captions: tuple[str, ...]
    seed: int
    said: tuple[tuple[Said, ...], ...] = ()
    names: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def characters(self) -> tuple[StoryCharacter, ...]:
        """Those that have names, each with its prompt."""
        return tuple(StoryCharacter(*pair) for pair in zip(self.names, self.prompts, strict=True))


def held_out_stories(
    count: int,
    seed: int,
    frames: int = FRAMES,
    cast: str = "mixed",
    said: float = 0.0,
    named: bool = False,
) -> list[HeldOutStory]:
    """Stories of held-out scenes.

    cast: `mixed`, one and two characters in turn; `two`, of two species; `alike`, two of one species. said: the share of
    captions that tell something of a look; then all looks are held out too. named: captions call everybody by name, and the
    story says who that is in prompts, of species alone or, in a share `said` of the stories, of something of the look, too,
    which then is said in every frame.
    """
    stories: list[HeldOutStory] = []
    index = 0
    while len(stories) < count:
        rng = stream("held-out story", seed, 0, index)
        size = 1 + index % 2 if cast == "mixed" else 2
        looks = "held" if said else "any"
        tale = sample_tale(rng, frames, size, held=True, alike=cast == "alike", looks=looks)
        index += 1
        present = {role.member for scene in tale.scenes for role in scene.roles}
        if len(present) < size:
            continue  # `across` is of two characters that are seen
        several = tale.scenes[:1] if named else tale.scenes  # prompts say in all frames what they say in one
        said_looks = tuple(sample_said(rng, size, said, named) for _ in several) if said else ()
        said_looks *= frames // max(1, len(said_looks))
        looks_of = said_looks or ((NOTHING,) * size,) * frames
        pairs = zip(tale.scenes, looks_of, strict=True)
        names = tuple(str(name) for name in rng.permutation(NAMES)[:size]) if named else ()
        texts = tuple(
            caption(rng, tale.cast, scene, names or None, say, described=not named) for scene, say in pairs
        )
        whom = zip(tale.cast, looks_of[0], strict=True) if named else ()
        prompts = tuple(described(rng, *pair) for pair in whom)
        stories.append(HeldOutStory(tale, texts, 1000 * seed + index - 1, said_looks, names, prompts))
    return stories


def draw_rounds(model: StoryModel, captions: Sequence[str], seed: int, **settings: Any) -> Rounds:
    """Every round of a story, drawn by the runtime without writing anything."""
    return by_round(generate(Story.from_captions(captions), model=model, seed=seed, **settings))


def by_round(events: Iterable[object]) -> Rounds:
    """The pictures among events, in the order of rounds and frames: (rounds, frames, H, W, 3)."""
    pictures: dict[int, dict[int, np.ndarray]] = {}
    for event in events:
        if isinstance(event, FrameDrawn):
            pictures.setdefault(event.round, {})[event.frame] = np.asarray(event.image)
    return np.stack([np.stack([frames[i] for i in sorted(frames)]) for _, frames in sorted(pictures.items())])


@dataclass(frozen=True)
class FirstRound:
    """Round 0 as given (frames, H, W, 3): what one round more starts from."""

    pictures: np.ndarray

    def has(self, round: int, frame: int) -> bool:
        return round == 0

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        return Image.fromarray(self.pictures[frame]), None


def draw_with_foreign_references(model: StoryModel, story: HeldOutStory, pictures: np.ndarray) -> np.ndarray:
    """One round at the last round's scale with another story's pictures (8, H, W, 3) as the only references."""
    alone = {"references": "all", "references_from": "last", "iterations": 1}
    settings, _ = resolve({"seed": story.seed, **alone}, {}, None, model.defaults)
    last = settings.reference_scale[1]
    settings = replace(settings, reference_scale=(last, last))
    plan = StoryPlan(Story.from_captions(story.captions), settings, finished=FirstRound(pictures))
    return by_round(iterative(model, plan, batch_sizes=[4]))[-1]


@dataclass(frozen=True)
class Judged:
    """One story's pictures of one round, judged. species, action and free[name] are (frames, 2), left and right."""

    story: HeldOutStory
    two: np.ndarray
    place: np.ndarray
    species: np.ndarray
    action: np.ndarray
    free: dict[str, np.ndarray]

    def appearances(self) -> Iterator[list[tuple[int, int]]]:
        """For each character, its (frame, slot) in the order of the frames, by the captions."""
        for member in range(len(self.story.tale.cast)):
            yield [
                (frame, slot)
                for frame, scene in enumerate(self.story.tale.scenes)
                for slot, role in enumerate(scene.roles)
                if role.member == member
            ]

    def shown(self, name: str) -> list[np.ndarray]:
        """For each character, the value of a free attribute in its appearances."""
        return [np.array([self.free[name][place] for place in places]) for places in self.appearances()]


def judge(classifier: Classifier, story: HeldOutStory, pictures: np.ndarray) -> Judged:
    """Classify the pictures (frames, 128, 128, 3) of one round."""
    seen = classifier.see(pictures)
    free = {name: seen.slots[name] for name in FREE}
    return Judged(story, seen.two, seen.place, seen.slots["species"], seen.slots["action"], free)


def _frame_scores(judged: Judged) -> dict[str, list[float]]:
    names = ("species", "place", "action", "both right", "own colours")
    scores: dict[str, list[float]] = {name: [] for name in names}
    modal = [np.bincount(values).argmax() for values in judged.shown("colour")]
    for frame, scene in enumerate(judged.story.tale.scenes):
        scores["place"].append(judged.place[frame] == PLACES.index(scene.place))
        right = _roles_right(judged, frame, scene)
        if len(scene.roles) == 1:
            scores["species"].append(right[0][0] and not judged.two[frame])
            scores["action"].append(right[0][1])
        else:
            scores["both right"].append(bool(judged.two[frame]) and all(a and b for a, b in right))
            if modal[0] != modal[1]:
                shown = judged.free["colour"][frame]
                swapped = [shown[slot] == modal[1 - role.member] for slot, role in enumerate(scene.roles)]
                scores["own colours"].append(not any(swapped))
    return scores


def _roles_right(judged: Judged, frame: int, scene: Scene) -> list[tuple[bool, bool]]:
    """Species and action as captioned, for each role."""
    return [
        (
            judged.species[frame, slot] == SPECIES.index(judged.story.tale.cast[role.member].species),
            judged.action[frame, slot] == ACTIONS.index(role.action),
        )
        for slot, role in enumerate(scene.roles)
    ]


def said_scores(judged: Judged) -> dict[str, float]:
    """Shares of what captions say of looks that is drawn, for frames with one character and with two: `said hat 2`."""
    found: dict[str, list[bool]] = {}
    for frame, (scene, said_looks) in enumerate(
        zip(judged.story.tale.scenes, judged.story.said, strict=False)
    ):
        for slot, role in enumerate(scene.roles):
            for name in said_looks[role.member]:
                wanted = FREE[name].index(getattr(judged.story.tale.cast[role.member], name))
                right = bool(judged.free[name][frame, slot] == wanted)
                found.setdefault(f"said {name} {len(scene.roles)}", []).append(right)
                found.setdefault(f"said {len(scene.roles)}", []).append(right)
    return {name: float(np.mean(found[name])) for name in sorted(found)}


def scores(judged: Judged) -> dict[str, float]:
    """One story's and round's scores, those of `distinct` and `said` among them; a key is missing where there is no such frame.

    species and action: frames with one character; place: all; both right: frames with two, each with its species and
    action on its side; own colours: neither of the two shows the colour that is the other one's most frequent.
    """
    found = {name: float(np.mean(values)) for name, values in _frame_scores(judged).items() if values}
    for name in FREE:
        shown = [values for values in judged.shown(name) if len(values) > 1]
        if shown:
            found[name] = float(np.mean([modal_share(values) for values in shown]))
            found[f"{name}, pairs"] = float(np.mean([pairwise_share(values) for values in shown]))
    return {**found, **distinct_scores(judged), **said_scores(judged)}


def summary(rows: Sequence[dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    """The interval of every score over the stories that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: interval([row[name] for row in rows if name in row]) for name in names}


def print_rounds(title: str, by_round: Sequence[dict[str, tuple[float, float, float]]]) -> None:
    """One line a score, one column a round, with the interval of the last one; a dash where no story has the score."""
    print(f"\n{title}")
    names = list(dict.fromkeys(name for row in by_round for name in row))
    for name in names:
        curve = " ".join(f"{row[name][0]:.3f}" if name in row else "    -" for row in by_round)
        last = by_round[-1].get(name)
        interval_of_last = f"[{last[1]:.3f}, {last[2]:.3f}]" if last else ""
        print(f"  {name:{max(map(len, names))}s} {curve}   {interval_of_last}")


def measure(
    model: StoryModel,
    classifier: Classifier,
    stories: Sequence[HeldOutStory],
    title: str,
    patched_below: float,
    **settings: Any,
) -> tuple[list[Rounds], list[dict[str, tuple[float, float, float]]]]:
    """Draw the stories and print their scores round by round. patched_below: as `calibrate` finds it."""
    drawn = []
    for number, story in enumerate(stories):
        drawn.append(draw_rounds(model, story.captions, story.seed, **settings))
        print(f"{title}: story {number + 1} of {len(stories)}", flush=True)
    pairs = list(zip(stories, drawn, strict=True))
    judged = [[judge(classifier, s, pictures[k]) for s, pictures in pairs] for k in range(len(drawn[0]))]
    rows = [
        [
            scores(seen) | quality_scores(s, pictures[k], patched_below)
            for seen, (s, pictures) in zip(seen_in_k, pairs, strict=True)
        ]
        for k, seen_in_k in enumerate(judged)
    ]
    by_round = [summary(row) for row in rows]
    print_rounds(f"{title}, {len(stories)} stories, rounds 0..{len(drawn[0]) - 1}", by_round)
    ends = [shares_of_one_look(rows[k], judged[k]) for k in (0, -1)]
    print("first and last round:", *ends, sep="\n  ")
    return drawn, by_round


def own_picture_alone(model: StoryModel, story: HeldOutStory, **settings: Any) -> Rounds:
    """The control in which a frame's only reference is its own last picture: each frame is a story of its own."""
    frames = [
        draw_rounds(model, [text], story.seed + 7919 * (i + 1), references="all", **settings)[:, 0]
        for i, text in enumerate(story.captions)
    ]
    return np.stack(frames, 1)


def controls(
    model: StoryModel,
    classifier: Classifier,
    stories: Sequence[HeldOutStory],
    drawn: Sequence[Rounds],
    patched_below: float,
    **settings: Any,
) -> dict[str, Any]:
    """Own last picture alone; another story's last pictures; one noise for all frames."""
    found: dict[str, Any] = {}
    alone = [own_picture_alone(model, story, **settings) for story in stories]
    pairs = list(zip(stories, alone, strict=True))
    found["own picture alone"] = [
        summary([scores(judge(classifier, s, pictures[k])) for s, pictures in pairs]) for k in (0, -1)
    ]
    print_rounds("control: own last picture alone, first and last round", found["own picture alone"])
    found["another story"] = foreign_agreement(model, classifier, stories, drawn)
    print(f"\ncontrol: another story's frames as references: {found['another story']}")
    found["shared noise"] = measure(
        model, classifier, stories, "control: shared noise", patched_below, noise="shared", **settings
    )[1]
    return found


def foreign_agreement(
    model: StoryModel, classifier: Classifier, stories: Sequence[HeldOutStory], drawn: Sequence[Rounds]
) -> dict[str, float]:
    """How often frames show the other story's most frequent value, without references and with its last frames.

    Stories with one character are paired with the next one of the same kind, and judged if the species differ or not.
    """
    alone = [i for i, story in enumerate(stories) if len(story.tale.cast) == 1]
    found: dict[str, list[bool]] = {}
    for this, other in zip(alone, alone[1:] + alone[:1], strict=True):
        after = draw_with_foreign_references(model, stories[this], drawn[other][-1])
        target = judge(classifier, stories[other], drawn[other][-1])
        for when, pictures in (("round 0", drawn[this][0]), ("with them", after)):
            judged = judge(classifier, stories[this], pictures)
            for name in FREE:
                wanted = np.bincount(target.shown(name)[0]).argmax()
                found.setdefault(f"{name}, {when}", []).extend(judged.shown(name)[0] == wanted)
    return {name: round(float(np.mean(values)), 3) for name, values in found.items()}


def judge_accuracies(
    classifier: Classifier, model: StoryModel, count: int = 1000
) -> dict[str, dict[str, float]]:
    """The judge on drawn pictures that it was not trained on, and on the same ones through the autoencoder."""
    pictures, answers = drawn_and_labelled(np.random.default_rng(123_456), count)
    restored = restore(model, pictures)
    error = np.mean((restored.astype(np.float64) - pictures) ** 2)
    return {
        "drawn": accuracies(classifier, pictures, answers),
        "restored": accuracies(classifier, restored, answers),
        "autoencoder": {"psnr": round(float(10 * np.log10(255**2 / error)), 2)},
    }


def save_sheet(drawn: Sequence[Rounds], file: Path) -> None:
    """First, second and last round of up to twelve stories, one row each."""
    rows = [
        np.concatenate(list(pictures[k]), 1)
        for pictures in drawn[:12]
        for k in sorted({0, 1, len(pictures) - 1})
    ]
    Image.fromarray(np.concatenate(rows)).save(file)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastory.builtin.evaluation.iterative", description=__doc__
    )
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--control-stories", type=int, default=10)
    parser.add_argument(
        "--cast", choices=CASTS, default="mixed", help="one and two characters, two, two of a species"
    )
    parser.add_argument("--said", type=float, default=0.0, help="share of captions that tell of a look")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--classifier", type=Path, default=FILE)
    parser.add_argument(
        "--references", nargs="+", choices=("all", "others", "cast"), default=["others", "all"]
    )
    parser.add_argument("--iterations", type=int, help="as shipped unless given")
    parser.add_argument("--steps", type=int, help="as shipped unless given")
    parser.add_argument("--inner-steps", type=int, help="as shipped unless given")
    parser.add_argument("--regions", choices=("auto", "on", "off"), help="as shipped unless given")
    parser.add_argument("--guidance-scale", type=float, help="as shipped unless given")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a folder for evaluation.json and sheets of pictures")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Print the table; with --output also write it."""
    options = parse(arguments)
    names = ("iterations", "steps", "inner_steps", "guidance_scale", "regions")
    values = {name: getattr(options, name) for name in names}
    settings = {name: value for name, value in values.items() if value is not None}
    model, classifier = StoryModel.open(options.model), load_classifier(options.classifier)
    shipped: Settings = resolve(settings, {}, None, model.defaults)[0]
    print(shipped)
    report: dict[str, object] = {"judge": judge_accuracies(classifier, model), "stories": options.stories}
    print(json.dumps(report["judge"], indent=1))
    stories = held_out_stories(options.stories, options.seed, cast=options.cast, said=options.said)
    counts = [
        len([1 for s in t.tale.scenes for r in s.roles if r.member == m])
        for t in stories
        for m in range(len(t.tale.cast))
    ]
    report["chance"] = {
        name: chance_of_modal_share([c for c in counts if c > 1], len(v)) for name, v in FREE.items()
    }
    print(
        f"chance of agreement: {report['chance']}; pairs: { {n: round(1 / len(v), 3) for n, v in FREE.items()} }"
    )
    quality = calibrate(stories, partial(restore, model))
    report["quality"] = quality
    print(
        f"the drawn world on the same scenes: { {name: round(value, 3) for name, value in quality.items()} }"
    )
    below = quality["patched below"]
    for references in options.references:
        title = f"references {references}"
        drawn, by_round = measure(model, classifier, stories, title, below, references=references, **settings)
        ends = [round(pixel_diversity(np.concatenate([p[k] for p in drawn])), 1) for k in (0, -1)]
        print(f"pixel diversity, first and last round: {ends}; drawn world: {drawn_diversity(stories):.1f}")
        report[references] = {"rounds": by_round, "diversity": ends}
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            save_sheet(drawn, options.output / f"{references}.png")
    if options.control_stories:
        few = options.control_stories
        report["controls"] = controls(model, classifier, stories[:few], drawn[:few], below, **settings)
    if options.output:
        (options.output / "evaluation.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
