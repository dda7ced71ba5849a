"""Environments of this one's packages: without some of them, or with another version in one's metadata."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What an extra of setup.py brings, by extra: modules, and packages whose names differ from their modules'.
MODULES = {
    "xformers": ("xformers",),
    "ray": ("ray",),
    "s3": ("s3fs",),
    "gs": ("gcsfs",),
    "serve": ("fastapi", "starlette", "uvicorn"),
    "tune": ("tensorboard",),
    "eval": ("torchmetrics", "scipy"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "tensorrt": ("tensorrt", "tensorrt_bindings", "tensorrt_libs"),
    "rtx": (
        *("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt_rtx_libs"),
        *("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs"),
    ),
}


@dataclass(frozen=True)
class Environment:
    """A Python and the variables it is started with; what it starts finds the same packages."""

    python: str
    variables: Mapping[str, str]

    def but(self, **variables: str) -> Environment:
        """The same with other variables."""
        return Environment(self.python, {**self.variables, **variables})


def without(folder: Path, modules: Sequence[str]) -> Environment:
    """A virtual environment that has links to all packages of this one but these modules."""
    place = folder / "environment"
    site = place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True)
    (place / "bin").mkdir()
    base = Path(sys.executable).resolve()
    (place / "bin" / "python").symlink_to(base)
    (place / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
    hidden = {re.sub(r"[-_.]+", "-", name).lower() for name in modules}
    for path in map(Path, sys.path):
        if path.name not in ("site-packages", "dist-packages") or not path.is_dir():
            continue
        for entry in path.iterdir():
            # onnx-1.23.2.dist-info -> onnx, so that the metadata go with the module
            name = re.sub(r"[-_.]+", "-", entry.name.split("-")[0].removesuffix(".py")).lower()
            leads_elsewhere = entry.suffix == ".pth" or name == "fastory"
            if name not in hidden and not leads_elsewhere and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    _link_fastory(site)
    return Environment(str(place / "bin" / "python"), _variables())


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


def with_versions(folder: Path, versions: Mapping[str, str]) -> Environment:
    """This environment, in which the metadata of packages tell other versions than are there."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return Environment(sys.executable, {**_variables(), "PYTHONPATH": str(folder)})


def _variables() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**inherited, "PYTHONNOUSERSITE": "1", "COLUMNS": "200"}


def run(environment: Environment, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m fastory ARGUMENTS` in an environment."""
    return start(environment, cwd, "-m", "fastory", *arguments)


def start(environment: Environment, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in an environment."""
    return subprocess.run(
        [environment.python, *arguments],
        cwd=cwd,
        env=dict(environment.variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
