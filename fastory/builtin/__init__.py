"""The built-in story model: its weights, its words and example stories; world/, training/ and evaluation/ made it."""

from pathlib import Path

WEIGHTS: Path = Path(__file__).with_name("weights")
"""The model's folder: diffusers layout, IP-Adapter file and fastory_defaults.json."""

EXAMPLES: dict[str, Path] = {
    path.stem: path for path in sorted(Path(__file__).with_name("stories").glob("*.yaml"))
}
"""Bundled stories, by the name the command line takes."""

DEFAULT_EXAMPLE: str = "flag"
"""The story of eight frames that a first run draws."""

# The commands answer to the names that they had when they all lay here, too.
__path__.append(str(Path(__file__).with_name("moved")))
