"""`fastory export --trt`: engines of an exported folder, for the GPU of this machine or, with RTX, for one elsewhere.

What builds is build_engines.py, in a process of its own. Where TensorRT or a GPU is missing, the folder keeps that
file and what it imports with the graphs and the plan, to be run where they are.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastory import files
from fastory.errors import FastoryError
from fastory.export import build_engines
from fastory.export.choices import RTX_TARGETS, Bounds, check_target
from fastory.export.profiles import Shapes, profiles
from fastory.models import tensorrt_packages
from fastory.models.export_folder import DOING, HINT, MANIFEST, ExportFolder, engine_name


class NotBuiltError(FastoryError):
    """Graphs and a build script are written, an engine is not: TensorRT or a GPU is missing. Exit code 3."""

    exit_code = 3


@dataclass(frozen=True)
class Built:
    """An engine is written. bytes: its size; peak_memory: the builder's, in bytes, None where the system does not say."""

    component: str
    engine: Path
    seconds: float
    bytes: int
    peak_memory: int | None


def build(
    folder: str | Path,
    *,
    components: Sequence[str] = (),
    sizes: Mapping[str, Bounds] | None = None,
    refit: bool = False,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
) -> Iterator[Built]:
    """<component>.engine of TensorRT 11 for the GPU of this machine, and engines.json; yields an event for each.

    folder: a finished export. components: all unless given. sizes: bounds by name, see fastory.export.profiles.
    refit: other weights can be put in later. version_compatible: later TensorRT of the same major version can run it.
    hardware_compatible: every GPU from Ampere on can. The graphs, build_engines.py and its plan are written before
    anything is built. Raises InputError before the first event for a folder or sizes that cannot be used; later
    NotBuiltError where TensorRT or a GPU is missing, and FastoryError where the builder fails, crashes, or the disk is full.
    """
    export = ExportFolder.open(Path(folder))
    names = components or tuple(export.components)
    shapes = profiles(export.manifest, names, sizes or {})
    chosen = {
        "refit": refit,
        "version-compatible": version_compatible,
        "hardware-compatible": hardware_compatible,
    }
    flags = [name for name, wanted in chosen.items() if wanted]
    return _build(export, shapes, "tensorrt", None, flags)


def build_rtx(
    folder: str | Path,
    target: str,
    *,
    components: Sequence[str] = (),
    sizes: Mapping[str, Bounds] | None = None,
) -> Iterator[Built]:
    """<component>.rtx-<target>.engine of TensorRT for RTX, on any machine; see `build` for the rest.

    target: sm75, sm80, sm86, sm89, sm120 or sm121; InputError for others.
    """
    check_target(target)
    export = ExportFolder.open(Path(folder))
    shapes = profiles(export.manifest, components or tuple(export.components), sizes or {})
    return _build(export, shapes, "tensorrt_rtx", target.lower(), [])


def graph_name(component: str) -> str:
    """The file that TensorRT reads: the exported graph with other bodies, beside it, over the same weights."""
    return f"{component}.trt.onnx"


def write_graph(export: ExportFolder, component: str) -> Path:
    """<component>.trt.onnx."""
    from fastory.export.operators import bound_bytes

    graph = export.path / export.components[component]["file"]
    target = export.path / graph_name(component)
    files.atomic_write(target, bound_bytes(graph, "trt", export.groups, export.dtype))
    return target


def _build(
    export: ExportFolder,
    shapes: Mapping[str, Mapping[str, Shapes]],
    builder: str,
    target: str | None,
    flags: Sequence[str],
) -> Iterator[Built]:
    """Write the graphs and, for a machine like this one, the plan; then build. Holds the lock of an export meanwhile."""
    with files.disk_errors(export.path), files.unfinished(export.path, DOING, HINT, last=MANIFEST):
        plans = _plans(export, shapes, builder, target, flags)
        if target is None:
            text = json.dumps({"schema": tensorrt_packages.SCHEMA, "jobs": plans}, indent=1)
            files.atomic_write(export.path / build_engines.PLAN, (text + "\n").encode())
            for source in (tensorrt_packages.__file__, build_engines.__file__):
                files.atomic_write(export.path / Path(source).name, Path(source).read_bytes())
        yield from _run(export.path, plans)


def _plans(
    export: ExportFolder,
    shapes: Mapping[str, Mapping[str, Shapes]],
    builder: str,
    target: str | None,
    flags: Sequence[str],
) -> list[dict[str, Any]]:
    """What build_engines.build is given for each component; the graphs are written."""
    plans = []
    for component, profile in shapes.items():
        graph = write_graph(export, component)
        data = export.components[component]["data"]
        plans.append(
            {
                "component": component,
                "graph": graph.name,
                "data": data,
                "engine": engine_name(component, target),
                "builder": builder,
                "target": RTX_TARGETS[target] if target else None,
                "profile": {name: [list(shape) for shape in three] for name, three in profile.items()},
                "flags": list(flags),
                "sha256": {graph.name: files.sha256_of(graph), data: export.manifest["files"][data]},
            }
        )
    return plans


def _run(folder: Path, plans: Sequence[Mapping[str, Any]]) -> Iterator[Built]:
    for plan in plans:
        done = _apart(folder, plan)
        engine = folder / plan["engine"]
        yield Built(plan["component"], engine, done["seconds"], engine.stat().st_size, done["peak_memory"])


def _apart(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Build one engine in a process of its own, whose crash is an error here and whose memory goes back."""
    # -P: the script's folder holds modules named like the packages that it imports.
    command = [sys.executable, "-P", build_engines.__file__, "--job", str(folder)]
    done = subprocess.run(
        command, input=json.dumps(plan), capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0:
        # NVIDIA's libraries print as well; ours is the last line.
        reported: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return reported
    said = done.stderr.strip()
    if done.returncode == build_engines.MISSING:
        raise NotBuiltError(_not_built(folder, plan, said))
    files.remove(files.partial_of(folder / plan["engine"]))
    if done.returncode == 1:
        raise FastoryError(f"{plan['engine']} was not built: {said}")
    raise FastoryError(
        f"{plan['engine']} was not built: NVIDIA's builder crashed ({_ending(done.returncode)}) on {plan['graph']}; other "
        f"sizes, another --dtype or another version of {plan['builder']} may build. {said[-500:]}".rstrip()
    )


def _not_built(folder: Path, plan: Mapping[str, Any], said: str) -> str:
    if plan["target"]:
        return f"no engine was built: {said}"
    wanted = tensorrt_packages.PACKAGES["tensorrt"]
    return (
        f"no engine was built: {said}. The graphs are in {folder}; copy it to a machine with an NVIDIA GPU and "
        f"TensorRT (pip install '{wanted}') and run there: python {folder.name}/build_engines.py"
    )


def _ending(status: int) -> str:
    """The end of a process in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
