"""The built-in story model: a drawn world, its training, its weights and example stories."""

from pathlib import Path

WEIGHTS: Path = Path(__file__).with_name("weights")
"""The model's folder: diffusers layout, IP-Adapter file and fastory_defaults.json."""

EXAMPLES: dict[str, Path] = {
    path.stem: path for path in sorted(Path(__file__).with_name("stories").glob("*.yaml"))
}
"""Bundled stories, by the name the command line takes."""

DEFAULT_EXAMPLE: str = "flag"
"""The story of eight frames that a first run draws."""
