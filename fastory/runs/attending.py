"""Which backend computes self-attention in a run: measured once a shape on a machine, stored there and in the run's manifest.

Backends differ in their last bits. So a clock never decides twice: a run has what its manifest says, a new one what this
machine has stored, and only a shape that is not stored is measured, before the run begins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastory.documents import read_json
from fastory.errors import FastoryError, InputError
from fastory.files import atomic_write, cache_folder, folder_for, locked_folder
from fastory.models.copies import attending_copy, self_attention_shapes
from fastory.models.protocol import Model
from fastory.processors.attention_backends import BACKENDS, quickest, time_backends
from fastory.runtime import Placement
from fastory.settings import Settings

Measured = dict[str, dict[str, float]]
"""By the shape with its rows, the seconds of each backend."""


def measured(model: Model, settings: Settings, rows: int) -> tuple[Model, str | None]:
    """The model as it draws a run that begins now, and the line that says how it attends where that was asked for.

    rows: of a UNet call.
    """
    if model.attention != "measured":
        return model, None
    width, height = settings.width or 0, settings.height or 0
    shapes = self_attention_shapes(model, width, height)
    machine, placement = machine_of(model.placement), model.placement
    names = {shape: f"{placement.dtype_name} {rows}x{shape}" for shape in shapes}
    known = _read().get(machine, {})
    missing = [shape for shape in shapes if names[shape] not in known]
    fresh = {names[shape]: time_backends(shape, rows, placement.device, placement.dtype) for shape in missing}
    if fresh:
        known = _keep(machine, fresh)
    found = {str(shape): known[names[shape]] for shape in shapes}
    chosen = {shape: quickest(seconds) for shape, seconds in found.items() if seconds}
    said = ", ".join(f"{shape} {name} ({_times(found[shape])})" for shape, name in chosen.items())
    how = "measured now" if missing else "measured before"
    line = f"self-attention: {said or 'by PyTorch, none of its backends takes it'}; {how}, kept in {_file()}"
    return attending_copy(model, chosen, width, height), line


def as_began(model: Model, machine: Mapping[str, Any], settings: Settings) -> Model:
    """The model as a run began on `machine`, a manifest's: with the backends that it names, whatever is stored here.

    Raises InputError for a backend that is not here, and where measuring is asked for in a run that began without.
    """
    chosen = machine.get("attention")
    if chosen is None:
        if model.attention == "measured":
            raise InputError(
                "this run began with PyTorch's own choice of self-attention; leave out --attention to go on with it, or give "
                "--overwrite to begin anew"
            )
        return model
    here = BACKENDS[model.placement.device.type]
    unknown = sorted(set(chosen.values()) - here.keys())
    if unknown:
        raise InputError(
            f"this run began with self-attention by {', '.join(unknown)}; wanted one of {', '.join(here)} on "
            f"{model.placement.device}: go on with the fastory that began it, or --overwrite to begin anew"
        )
    return attending_copy(model, chosen, settings.width or 0, settings.height or 0)


def machine_of(placement: Placement) -> str:
    """The device and the libraries that decide how quick a backend is."""
    if placement.device.type == "cuda":
        name = torch.cuda.get_device_name(placement.device)
        return f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    name = torch.backends.cpu.get_cpu_capability()
    return f"CPU {name}, {placement.threads} threads, torch {torch.__version__}"


def _times(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {1e6 * value:.0f} us" for name, value in seconds.items())


def _file() -> Path:
    return cache_folder() / "attention.json"


def _read() -> dict[str, Measured]:
    """What is stored, by machine; a file that is missing or spoilt only costs the time to measure again."""
    with suppress(InputError, RuntimeError):
        stored = read_json(_file(), what="measured self-attention")
        if isinstance(stored, dict) and all(_is_measured(value) for value in stored.values()):
            return stored
    return {}


def _is_measured(value: object) -> bool:
    known = {name for backends in BACKENDS.values() for name in backends}
    return isinstance(value, dict) and all(
        isinstance(seconds, dict)
        and seconds.keys() <= known
        and all(isinstance(number, float) and number > 0 for number in seconds.values())
        for seconds in value.values()
    )


def _keep(machine: str, fresh: Measured) -> Measured:
    """All that is known of the machine: what another process has stored meanwhile stays, and counts here, too.

    Where the place cannot be written, or another process writes just now, this run alone has what was measured.
    """
    with suppress(FastoryError, RuntimeError):
        path = _file()
        folder_for(path.parent, "nothing is stored")
        with locked_folder(path.parent, "stores what it measures in", "nothing is stored"):
            stored = _read()
            fresh = {**stored.get(machine, {}), **fresh, **stored.get(machine, {})}
            atomic_write(path, json.dumps({**stored, machine: fresh}, indent=1, sort_keys=True).encode())
            return fresh
    return {**_read().get(machine, {}), **fresh}
