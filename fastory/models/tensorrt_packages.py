"""NVIDIA's packages, which build engines and run them, and where their records lie. Wants Python alone.

`fastory export --trt` puts this file into the export, beside build_engines.py, which runs where fastory is not installed.
"""

from __future__ import annotations

import importlib
from typing import Any

ENGINES, SCHEMA = "engines.json", 1
PACKAGES = {"tensorrt": "tensorrt>=11", "tensorrt_rtx": "fastory[rtx]"}
OLDEST = {"tensorrt": 11, "tensorrt_rtx": 1}


class MissingError(Exception):
    """TensorRT, its libraries or a GPU are not there."""


def load(package: str) -> Any:
    """`tensorrt` or `tensorrt_rtx`. Raises MissingError where it cannot be used."""
    try:
        if package == "tensorrt_rtx":
            # The wheel of the libraries must come first; there is no package of the plain name.
            importlib.import_module("tensorrt_rtx_libs")
            found = importlib.import_module("tensorrt_rtx_bindings")
        else:
            found = importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingError(
            f"{package} is not usable here ({error}); run: pip install '{PACKAGES[package]}'"
        ) from error
    # A package whose libraries are missing imports as an empty one.
    version = str(getattr(found, "__version__", ""))
    if not hasattr(found, "Builder") or not version:
        raise MissingError(
            f"{package} is installed without its libraries; run: pip install --force-reinstall '{PACKAGES[package]}'"
        )
    if int(version.split(".")[0]) < OLDEST[package]:
        raise MissingError(
            f"wanted {package} {OLDEST[package]} or newer, found {version}; run: pip install -U '{PACKAGES[package]}'"
        )
    return found
