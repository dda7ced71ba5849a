"""Held-out stories of the drawn world as a file: python -m fastory.builtin.evaluation.held_out --stories 100 --output FILE

A story a line, as `fastory compare` and `fastory generate` read them: its captions, a title, and the seed of its noise.
"""

import argparse
import json
from pathlib import Path

from fastory.builtin.evaluation.iterative import CASTS, FRAMES, HeldOutStory, held_out_stories
from fastory.files import atomic_write


def as_line(story: HeldOutStory) -> str:
    """One story in the shape of a .json story file."""
    said = {
        "title": f"held out {story.seed}",
        "frames": list(story.captions),
        "settings": {"seed": story.seed},
    }
    return json.dumps(said, ensure_ascii=False)


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        prog="python -m fastory.builtin.evaluation.held_out", description=__doc__
    )
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of every story, 4 to 40")
    parser.add_argument("--cast", choices=[name for name in CASTS if name != "alike"], default="mixed")
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file")
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"--output {options.output} exists; wanted a name that is free")
    stories = held_out_stories(options.stories, options.seed, options.frames, options.cast)
    atomic_write(options.output, "".join(as_line(story) + "\n" for story in stories).encode())


if __name__ == "__main__":
    main()
