"""Environments of this one's packages: without some of them, or with another version in one's metadata."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# What an extra of setup.py brings, by extra: modules, and packages whose names differ from their modules'.
MODULES = {
    "xformers": ("xformers",),
    "tune": ("tensorboard",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "tensorrt": ("tensorrt", "tensorrt_bindings", "tensorrt_libs"),
    "rtx": (
        *("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt_rtx_libs"),
        *("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs"),
    ),
}


def without(folder: Path, modules: Sequence[str]) -> dict[str, str]:
    """The variables of an environment that has all packages of this one but these modules. Start Python with -S in it.

    folder: where links to the packages are put.
    """
    site = folder / "site"
    site.mkdir(parents=True)
    hidden = {re.sub(r"[-_.]+", "-", name).lower() for name in modules}
    for path in map(Path, sys.path):
        if path.name not in ("site-packages", "dist-packages") or not path.is_dir():
            continue
        for entry in path.iterdir():
            # onnx-1.23.2.dist-info -> onnx, so that the metadata go with the module
            name = re.sub(r"[-_.]+", "-", entry.name.split("-")[0].removesuffix(".py")).lower()
            if name not in hidden and name != "fastory" and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    _link_fastory(site)
    return _variables(site)


def _link_fastory(site: Path) -> None:
    """kernels/ and export/ install as fastory.kernels and fastory.export."""
    import fastory.export
    import fastory.kernels

    package = site / "fastory"
    package.mkdir()
    for entry in Path(fastory.__file__).parent.iterdir():
        if entry.name not in ("kernels", "export", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    for name, module in (("kernels", fastory.kernels), ("export", fastory.export)):
        (package / name).symlink_to(Path(module.__path__[0]))


def with_versions(folder: Path, versions: Mapping[str, str]) -> dict[str, str]:
    """The variables of this environment, in which the metadata of packages tell other versions than are there."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return _variables(folder)


def _variables(first: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(first), "PYTHONNOUSERSITE": "1", "COLUMNS": "200"}


def run(
    variables: Mapping[str, str], cwd: Path, *arguments: str, site: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python -m fastory ARGUMENTS` in an environment. site: with the packages of this environment beside it."""
    options = () if site else ("-S",)
    return subprocess.run(
        [sys.executable, *options, "-m", "fastory", *arguments],
        cwd=cwd,
        env=dict(variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
