"""Held-out stories of the drawn world as a file: python -m fastory.builtin.evaluation.held_out --stories 100 --output FILE

A story a line, as `fastory compare` and `fastory generate` read them: its captions, a title, and the seed of its noise. With
--named captions call everybody by name, and the story says who that is; two of one species are told apart by that alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fastory.builtin.evaluation.characters import drawn_boxes
from fastory.builtin.evaluation.iterative import CASTS, FRAMES, HeldOutStory, held_out_stories
from fastory.files import atomic_write


def as_line(story: HeldOutStory, boxes: bool = False) -> str:
    """One story in the shape of a .json story file. boxes: with where the drawn world places its characters."""
    said: dict[str, Any] = {
        "title": f"held out {story.seed}",
        "frames": list(story.captions),
        "settings": {"seed": story.seed},
    }
    if story.names:
        said["characters"] = {character.name: {"prompt": character.prompt} for character in story.characters}
    if boxes:
        placed = zip(story.captions, drawn_boxes(story), strict=True)
        said["frames"] = [{"caption": caption, "boxes": dict(found)} for caption, found in placed]
    return json.dumps(said, ensure_ascii=False)


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        prog="python -m fastory.builtin.evaluation.held_out", description=__doc__
    )
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of every story, 4 to 40")
    parser.add_argument("--cast", choices=CASTS, default="mixed", help="alike wants --named")
    parser.add_argument("--named", action="store_true", help="with characters that captions call by name")
    parser.add_argument(
        "--boxes", action="store_true", help="with the boxes of the drawn scenes; wants --named"
    )
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file")
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"--output {options.output} exists; wanted a name that is free")
    if not options.named and (options.boxes or options.cast == "alike"):
        parser.error("--boxes and --cast alike are of characters with names; wanted --named beside them")
    sizes = (options.stories, options.seed, options.frames)
    stories = held_out_stories(*sizes, options.cast, named=options.named)
    atomic_write(options.output, "".join(as_line(story, options.boxes) + "\n" for story in stories).encode())


if __name__ == "__main__":
    main()
