"""Measure causal mode on the built-in world: python -m fastory.builtin.evaluation.causal --stories 100 --output DIR

Draws the held-out stories of `evaluate` in causal mode with several windows, and the same stories in two ways without a
history: "no history" is causal mode's UNet with every frame as frame 0 of a story of its own, without drafts, with the noise
that the frame has in its story; "round 0" is round 0 of the iterative mode as the model's folder sets it, the base without
anything tuned. Noise, scheduler, steps and guidance are the same in all the others. "first frame given" is the widest window
with a continuation: frame 0 is the true picture through the autoencoder. "drawn world" is the true pictures through the
autoencoder: what can be reached.

The classifier of `evaluate` judges them. `first colour`, `first hat`, `first scarf`: the share of a character's later
appearances that show what its first one shows; no caption mentions them. Intervals are 95 % bootstrap intervals over
stories. With --output, finished stories are kept, and the same command goes on where it was interrupted.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from fastory import Settings, Story, StoryModel, generate
from fastory.builtin.evaluation.classifier import FILE, load_classifier
from fastory.builtin.evaluation.distinct import FREE
from fastory.builtin.evaluation.iterative import (
    CASTS,
    HeldOutStory,
    Judged,
    draw_rounds,
    held_out_stories,
    judge,
    print_rounds,
    scores,
    summary,
)
from fastory.builtin.training.autoencoder import to_pictures, to_tensor
from fastory.builtin.training.loop import stream
from fastory.builtin.world.drawing import SIZE, draw
from fastory.errors import InputError
from fastory.events import Event, FrameDrawn
from fastory.modes.causal import window_of
from fastory.runtime import MOST_FRAMES
from fastory.sampling.noise import noise_seed
from fastory.settings import check, resolve
from fastory.story import Frame

CAPTIONED = ("species", "place", "action", "both right")
SHEET_STORIES = 6
Stories = Sequence[HeldOutStory]
Pictures = np.ndarray  # uint8 (frames, height, width, 3)
Seconds = tuple[
    float, float
]  # by the clock, and of the processor: the same on a machine that does nothing else


def drawn_frames(events: Iterable[Event], stories: int) -> list[Pictures]:
    """The pictures of every story of a call, in the order of its frames."""
    frames: list[dict[int, np.ndarray]] = [{} for _ in range(stories)]
    for event in events:
        if isinstance(event, FrameDrawn):
            frames[event.story_index][event.frame] = np.asarray(event.image)
    return [np.stack([found[i] for i in sorted(found)]) for found in frames]


def with_history(
    model: StoryModel, settings: Settings, stories: Stories, first_frames: Sequence[Path | None] = ()
) -> list[Pictures]:
    """Causal mode, the stories side by side. first_frames: one a story."""
    pairs = zip(stories, first_frames or [None] * len(stories), strict=True)
    prepared = [
        replace(Story.from_captions(s.captions), settings={"seed": s.seed}, first_frame=file)
        for s, file in pairs
    ]
    own: dict[str, Any] = {"window": settings.window, "drafts": settings.drafts}
    events = generate(prepared, model=model, **_sampling(settings), mode="causal", **own)
    return drawn_frames(events, len(prepared))


def with_first_frame(model: StoryModel, settings: Settings, stories: Stories) -> list[Pictures]:
    """The same as continuations of the true frame 0."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.png" for number in range(len(stories))]
        for file, pictures in zip(files, drawn_world(model, settings, stories), strict=True):
            Image.fromarray(pictures[0]).save(file)
        return with_history(model, settings, stories, files)


def frames_alone(stories: Stories, settings: Settings) -> list[Story]:
    """Every frame as a story of its own: its caption, and the noise it has in its story."""
    return [
        Story("frame", (Frame(text, noise_seed(None, story.seed, settings.noise, number)),))
        for story in stories
        for number, text in enumerate(story.captions)
    ]


def without_history(model: StoryModel, settings: Settings, stories: Stories) -> list[Pictures]:
    """Causal mode's UNet from captions alone."""
    alone = frames_alone(stories, settings)
    events = generate(alone, model=model, **_sampling(settings), mode="causal", window=1, drafts=0)
    pictures = iter(np.concatenate(drawn_frames(events, len(alone))))
    return [np.stack([next(pictures) for _ in story.captions]) for story in stories]


def round_zero(model: StoryModel, settings: Settings, stories: Stories) -> list[Pictures]:
    """Round 0 of the iterative mode: the base as it is, from captions alone."""
    sampling = _sampling(settings)
    return [draw_rounds(model, s.captions, s.seed, iterations=0, **sampling)[0] for s in stories]


@torch.inference_mode()
def drawn_world(model: StoryModel, settings: Settings, stories: Stories) -> list[Pictures]:
    """The true pictures of the scenes, as the autoencoder gives them back."""
    found = []
    for story in stories:
        rng = stream("drawn world", story.seed, 0, 0)
        true = to_tensor(np.stack([np.asarray(draw(story.tale.cast, s, rng)) for s in story.tale.scenes]))
        parts = true.to(model.device, model.dtype).split(8)
        found.append(np.concatenate([to_pictures(model.vae(part).sample) for part in parts]))
    return found


def _sampling(settings: Settings) -> dict[str, Any]:
    """What all ways of drawing have in common."""
    return {name: getattr(settings, name) for name in ("scheduler", "steps", "guidance_scale", "noise")}


Way = Callable[[StoryModel, Settings, Stories], list[Pictures]]
WITHOUT: dict[str, Way] = {
    "drawn world": drawn_world,
    "round 0": round_zero,
    "no history": without_history,
}


def later_appearances(judged: Judged, name: str) -> Iterator[tuple[int, bool]]:
    """(frame, whether it shows what the first one shows) of every appearance of a character but its first."""
    values = judged.free[name]
    for places in judged.appearances():
        for frame, slot in places[1:]:
            yield frame, bool(values[frame, slot] == values[places[0]])


def causal_scores(judged: Judged) -> dict[str, float]:
    """evaluate's scores of a story, and agreement with the first appearance, also by the number of characters."""
    found = scores(judged)
    cast = ("one character", "two characters")[len(judged.story.tale.cast) - 1]
    for name in FREE:
        agree = [same for _, same in later_appearances(judged, name)]
        if agree:
            found[f"first {name}"] = found[f"first {name}, {cast}"] = float(np.mean(agree))
    return found


def by_frame(judged: Sequence[Judged], name: str) -> list[float | None]:
    """Agreement with the first appearance at frame 1, 2, ..: whether a long story drifts. None: nobody's later one."""
    at: list[list[bool]] = [[] for _ in judged[0].story.captions]
    for story in judged:
        for frame, same in later_appearances(story, name):
            at[frame].append(same)
    return [round(float(np.mean(values)), 4) if values else None for values in at[1:]]


def differences(
    rows: Sequence[dict[str, float]], base: Sequence[dict[str, float]]
) -> dict[str, tuple[float, float, float]]:
    """Of what the captions say: the mean difference to `base`, story by story, and its interval."""
    pairs = list(zip(rows, base, strict=True))
    return summary([{n: row[n] - other[n] for n in CAPTIONED if n in row} for row, other in pairs])


def draw_kept(
    way: Way, model: StoryModel, settings: Settings, stories: Stories, folder: Path | None
) -> Iterator[tuple[list[Pictures], Seconds | None]]:
    """The stories in groups that are drawn together, with what each took; None for a group that was kept in `folder`.

    A story is one strip of pictures, written beside its place and renamed.
    """
    size = MOST_FRAMES[model.device.type]
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(stories), size):
        group = stories[first : first + size]
        files = [folder / f"story-{first + n:04d}.png" for n in range(len(group))] if folder else []
        if files and all(file.exists() for file in files):
            yield [_read_strip(file) for file in files], None
            continue
        before = time.monotonic(), time.process_time()
        drawn = way(model, settings, group)
        seconds = (time.monotonic() - before[0]) / len(group), (time.process_time() - before[1]) / len(group)
        for file, pictures in zip(files, drawn, strict=bool(files)):
            unfinished = file.with_suffix(".unfinished")
            Image.fromarray(np.concatenate(list(pictures), 1)).save(unfinished, "PNG")
            unfinished.replace(file)
        yield drawn, seconds


def _read_strip(file: Path) -> Pictures:
    with Image.open(file) as image:
        strip = np.asarray(image.convert("RGB"))
    return np.stack(np.split(strip, strip.shape[1] // strip.shape[0], 1))


def folder_of(
    output: Path, name: str, model: StoryModel, settings: Settings, options: argparse.Namespace
) -> Path:
    """Where a way's pictures are kept: another model, seed or setting has another folder."""
    said = [sorted(model.hashes.items()), sorted(asdict(settings).items()), options.frames, options.seed]
    if options.cast != "mixed":
        said.append([options.cast])
    digest = hashlib.sha256(json.dumps([*said, str(model.dtype)]).encode()).hexdigest()[:8]
    return output / "pictures" / f"{name.replace(' ', '-')}-{digest}"


def ways(
    model: StoryModel, settings: Settings, windows: Sequence[int | str], frames: int
) -> Iterator[tuple[str, Way | str, Settings]]:
    """Every way of drawing with its name and settings; for a window that this encoder cannot have, why."""
    iterative = resolve({"mode": "iterative", "noise": settings.noise}, {}, None, model.defaults)[0]
    yield from ((name, way, iterative if way is round_zero else settings) for name, way in WITHOUT.items())
    config = model.require_history().encoder.config
    widest: Settings | None = None
    for window in windows:
        own = replace(settings, window=window)
        try:
            window_of(config, own, frames)
        except InputError as error:
            yield f"window {window}", str(error), own
        else:
            yield f"window {window}", with_history, own
            widest = own
    if widest is not None:
        yield "first frame given", with_first_frame, widest


def save_sheet(drawn: dict[str, list[Pictures]], file: Path) -> None:
    """The first stories, a row for each way of drawing."""
    rows = []
    for number in range(min(SHEET_STORIES, *(len(stories) for stories in drawn.values()))):
        for name, stories in drawn.items():
            label = Image.new("RGB", (SIZE, stories[number].shape[1]), "white")
            ImageDraw.Draw(label).text((6, SIZE // 2), f"{number}: {name}", fill="black")
            rows.append(np.concatenate([np.asarray(label), *stories[number]], 1))
    Image.fromarray(np.concatenate(rows)).save(file)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fastory.builtin.evaluation.causal", description=__doc__)
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--frames", type=int, default=8, help="of every story, 4 to 40")
    parser.add_argument("--windows", default="1,2,4,all", help="L_M, in frames, or all")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--adapter", help="causal weights, where the model's folder has none")
    parser.add_argument("--classifier", type=Path, default=FILE)
    parser.add_argument("--steps", type=int, help="as shipped unless given")
    parser.add_argument("--guidance-scale", type=float, help="as shipped unless given")
    parser.add_argument("--drafts", type=int, help="of frame 0; as shipped unless given")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cast", choices=CASTS, default="mixed", help="as in evaluate")
    parser.add_argument("--output", type=Path, help="a folder for evaluation.json, a sheet, and the pictures")
    options = parser.parse_args(arguments)
    if options.stories < 1 or not 4 <= options.frames <= 40:
        parser.error("wanted --stories 1 or more and --frames 4 to 40")
    try:
        options.windows = [check("window", text, "--windows") for text in options.windows.split(",")]
    except InputError as error:
        parser.error(str(error))
    return options


def measure(
    model: StoryModel, settings: Settings, stories: Stories, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, list[Pictures]]]:
    """Draw and judge every way; prints each as it is done. Returns what the report says of them, and the pictures."""
    classifier = load_classifier(options.classifier)
    report: dict[str, Any] = {}
    drawn: dict[str, list[Pictures]] = {}
    rows: dict[str, list[dict[str, float]]] = {}
    for name, way, own in ways(model, settings, options.windows, options.frames):
        if isinstance(way, str):
            report[name] = {"not drawn": way}
            print(f"\n{name}: not drawn: {way}")
            continue
        folder = folder_of(options.output, name, model, own, options) if options.output else None
        taken, drawn[name] = [], []
        for pictures, seconds in draw_kept(way, model, own, stories, folder):
            drawn[name] += pictures
            taken += [seconds] * len(pictures) if seconds is not None else []
            print(f"{name}: {len(drawn[name])} of {len(stories)} stories", flush=True)
        judged = [judge(classifier, *pair) for pair in zip(stories, drawn[name], strict=True)]
        rows[name] = [causal_scores(story) for story in judged]
        report[name] = {
            "scores": summary(rows[name]),
            "by frame": {f"first {free}": by_frame(judged, free) for free in FREE},
            "seconds a story": np.mean(taken, 0).round(2).tolist() if taken else None,
        }
        if "round 0" in rows:
            report[name]["difference to round 0"] = differences(rows[name], rows["round 0"])
        if taken:
            wall, processor = report[name]["seconds a story"]
            print(f"{name}: {wall} seconds a story, {processor} of the processor", flush=True)
    by_way = [report[name]["scores"] for name in rows]
    print_rounds(f"{len(stories)} stories of {options.frames} frames; columns: {', '.join(rows)}", by_way)
    return report, drawn


def main(arguments: list[str] | None = None) -> None:
    """Print the figures; with --output also write them, and a sheet of some stories."""
    options = parse(arguments)
    model = StoryModel.open(options.model, adapter=options.adapter)
    named = ("steps", "guidance_scale", "drafts")
    values = {**{name: getattr(options, name) for name in named}, "mode": "causal"}
    settings = resolve(values, {}, None, model.defaults)[0]
    print(settings)
    stories = held_out_stories(options.stories, options.seed, options.frames, options.cast)
    report, drawn = measure(model, settings, stories, options)
    if options.output:
        recorded = ("stories", "frames", "cast", "windows", "steps", "guidance_scale", "drafts", "seed")
        whole = {
            "command": {name: getattr(options, name) for name in recorded},
            "settings": settings.identity(),
            "placement": model.placement.as_dict(),
            "model": model.hashes,
            "time embeddings": model.require_history().encoder.config.positions,
            "ways": report,
        }
        (options.output / "evaluation.json").write_text(json.dumps(whole, indent=1))
        save_sheet(drawn, options.output / "sheet.png")


if __name__ == "__main__":
    main()
