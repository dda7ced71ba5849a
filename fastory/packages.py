"""Which installed packages are known not to work together, and which packages a command needs.

setup.py, `fastory doctor`, the LoRA loader and the tests read the one table. Nothing but the standard library is
imported on the way in: setup.py runs this file before anything is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import NamedTuple


class Combination(NamedTuple):
    """Releases that are known not to work together.

    packages: a version or range (PEP 440) by name; all of them have to match. left_out: the one whose version setup.py
    leaves out; empty where none is, since the packages do work for most of what users do.
    """

    packages: dict[str, str]
    fails: str
    mended_by: str
    left_out: str = ""


KNOWN = {
    # transformers 5.24.0 asks for peft 0.22.0, which does not exist yet: peft's newest release is 0.21.2 (2026-11-24).
    "text-encoder-lora": Combination(
        {"transformers": "==5.24.0", "peft": "<0.22"},
        "transformers' add_adapter refuses this peft on a text encoder; LoRA files were loaded all the same",
        "pip install transformers==5.23.0",
        left_out="transformers",
    ),
    # Compiled kernels do not come by here, so a user of torch 2.11, which pins triton 3.6, needs no older numpy.
    "triton-interpreter": Combination(
        {"triton": "==3.6.*", "numpy": ">=2.4"},
        "Triton's interpreter (TRITON_INTERPRET=1, the tests without a GPU) fails; compiled kernels work",
        "pip install 'numpy<2.4'",
    ),
}


def installed(name: str) -> str | None:
    """The version of an installed package; None where it is not there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def found(name: str) -> str | None:
    """One line on a combination of KNOWN that is installed here: the versions, what fails, what mends it. Else None."""
    from packaging.specifiers import SpecifierSet

    known = KNOWN[name]
    versions = {package: installed(package) for package in known.packages}
    for package, wanted in known.packages.items():
        version = versions[package]
        if version is None or not SpecifierSet(wanted).contains(version, prereleases=True):
            return None
    pair = " with ".join(f"{package} {version}" for package, version in versions.items())
    return f"{pair}: {known.fails}; run: {known.mended_by}"


def broken_torchvision() -> str | None:
    """One line on a torchvision that is installed and cannot be imported. transformers imports it wherever it is there."""
    from fastory.wording import last_words

    version = installed("torchvision")
    if version is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # of another PyTorch: RuntimeError, OSError, ImportError, AttributeError
        torch = installed("torch")
        return (
            f"torchvision {version} cannot be imported beside torch {torch} ({last_words(error)}), and transformers needs it "
            "where it is installed; run: pip uninstall torchvision, which nothing here uses, or install the one for this torch"
        )
    return None


def known_not_to_work() -> Iterator[str]:
    """`found` for every combination that is installed here, and a broken torchvision."""
    yield from filter(None, (*map(found, KNOWN), broken_torchvision()))


def excluded(package: str) -> str:
    """What setup.py appends to the requirement of a package, such as ",!=5.24.0"."""
    versions = [known.packages[package] for known in KNOWN.values() if known.left_out == package]
    return "".join(f",{version.replace('==', '!=')}" for version in versions)


def require(what: str, extra: str, *packages: str) -> None:
    """Raises InputError with the extra to install where one of these packages, by import name, is missing."""
    from importlib.util import find_spec

    from fastory.errors import InputError

    if missing := [package for package in packages if find_spec(package) is None]:
        these = "package " + missing[0] if len(missing) == 1 else "packages " + " and ".join(missing)
        raise InputError(f"{what} needs the {these}, not installed here; run: pip install 'fastory[{extra}]'")
