"""Which sizes an engine takes: the optimization profile of a component, from its axes and a user's bounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastory.errors import InputError
from fastory.export.choices import NAMES, SIDES, Bounds
from fastory.export.component import size_of
from fastory.models.export_folder import factored

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, of most calls, most


def profiles(
    manifest: Mapping[str, Any], components: Iterable[str], sizes: Mapping[str, Bounds]
) -> dict[str, dict[str, Shapes]]:
    """Component -> input with a dynamic axis -> its (least, usual, most) shape.

    manifest: fastory.json. sizes: bounds by name as parse_sizes gives them; what is not named gets the bounds of
    `default_bounds`. Raises InputError for components and names that the export does not have, bounds beyond those of
    the export, and pixels that are no multiple of what the UNet takes.
    """
    known, found = manifest["components"], {}
    for name in components:
        if name not in known:
            raise InputError(f"{name}: this export has no such component; it has {', '.join(known)}")
        found[name] = _profile(name, manifest, sizes)
    axes = {axis for name in found for axis in known[name]["ranges"]}
    used = [axis for axis in NAMES if axis in axes]
    for name in sizes:
        if name not in used:
            raise InputError(
                f"--size {name}: nothing of {', '.join(found)} has it; they have {', '.join(used)}"
            )
    return found


def default_bounds(name: str, hot: int) -> Bounds:
    """Least and most of an axis that the user did not bound, around the size of most calls.

    What the builder plans grows with the most that is taken, so the whole range of a graph would fit no GPU. References
    count one more per group, the unconditional one.
    """
    return {
        "batch": (1, max(32, hot)),  # both guidance rows of the largest micro-batch
        "height": (max(1, hot // 2), hot + hot // 2),
        "width": (max(1, hot // 2), hot + hot // 2),
        "text": (1, 4 * hot),
        "references": (1, max(128, hot)),
        "keys": (1, 8 * hot),
    }[name]


def _profile(name: str, manifest: Mapping[str, Any], sizes: Mapping[str, Bounds]) -> dict[str, Shapes]:
    component = manifest["components"][name]
    low, hot, high = {}, {}, {}
    for axis, (least, most) in component["ranges"].items():
        usual = component["hot"].get(axis, least)
        if axis in sizes:
            bounds = _bounds(
                name, axis, sizes[axis], (least, most), _pixels(component, axis, manifest), manifest
            )
        else:
            start, end = default_bounds(axis, usual)
            bounds = (max(start, least), min(end, most))
        low[axis], high[axis] = bounds
        hot[axis] = min(max(usual, bounds[0]), bounds[1])
    return {
        key: (_shape(described, low), _shape(described, hot), _shape(described, high))
        for key, described in component["inputs"].items()
        if any(isinstance(axis, str) for axis in described["shape"])
    }


def _shape(described: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size_of(axis, sizes) for axis in described["shape"])


def _pixels(component: Mapping[str, Any], axis: str, manifest: Mapping[str, Any]) -> int:
    """Pixels of one step of an axis; 1 where it does not count pixels. The side of a latent is a known number of them."""
    if axis not in SIDES:
        return 1
    expressions = [
        expression for described in component["inputs"].values() for expression in described["shape"]
    ]
    factors = [
        factored(expression)[0]
        for expression in expressions
        if isinstance(expression, str) and factored(expression)[1] == axis
    ]
    return int(max(factors)) * int(manifest["vae_factor"])


def _bounds(
    component: str, axis: str, bounds: Bounds, allowed: Bounds, pixels: int, manifest: Mapping[str, Any]
) -> Bounds:
    """The user's bounds in steps of the axis."""
    unit = " pixels" if axis in SIDES else ""
    if axis in SIDES and any(bound % int(manifest["size_factor"]) for bound in bounds):
        raise InputError(
            f"--size {axis}={bounds[0]}:{bounds[1]}: this model's sides are multiples of {manifest['size_factor']} pixels"
        )
    low, high = (bound // pixels for bound in bounds)
    if not allowed[0] <= low <= high <= allowed[1]:
        raise InputError(
            f"--size {axis}={bounds[0]}:{bounds[1]}: {component} was exported for {allowed[0] * pixels} to "
            f"{allowed[1] * pixels}{unit}; stay within it"
        )
    return low, high
