"""constraints.txt names every package that the README's commands install, so that both install the same next month."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

# Which build fits is the user's machine's, and each build of PyTorch brings its own of the others.
FREE = re.compile(r"torch|triton|setuptools|nvidia-.*|cuda-.*")


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def pinned() -> dict[str, str]:
    """The version of every package in constraints.txt."""
    lines = (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
    pairs = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {name_of(name): constraint for name, _, constraint in pairs}


def needed(package: str, extras: tuple[str, ...], found: set[str], pins: dict[str, str]) -> None:
    """Adds what an installed package needs here, directly or not, but for what FREE matches.

    A package that is installed in another version than its constraint is not followed: another release needs others.
    """
    if package != "fastory" and pins.get(package, version(package)) != version(package):
        return
    for requirement in map(Requirement, requires(package) or ()):
        name = name_of(requirement.name)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras or ("",)):
            continue
        if FREE.fullmatch(name) or name in found:
            continue
        try:
            requires(name)
        except PackageNotFoundError:
            continue  # not installed here: an extra of this machine's environment alone
        found.add(name)
        needed(name, tuple(requirement.extras), found, pins)


def test_every_installed_package_has_its_version() -> None:
    pins = pinned()
    named = set(pins)
    found: set[str] = set()
    needed("fastory", ("", "test"), found, pins)
    assert {"diffusers", "transformers", "pytest", "onnx", "tokenizers"} <= found
    assert not [name for name in named if FREE.fullmatch(name)]
    assert sorted(found - named) == []
