"""Build the engines of this folder with NVIDIA's TensorRT. Wants Python 3.11, TensorRT and a GPU, nothing else.

    pip install 'tensorrt>=11'
    python build_engines.py               every component of build_engines.json
    python build_engines.py unet ...      only these

An engine is <component>.engine; engines.json says what it was built from and for. `fastory export --trt` runs this file
in a process of its own, since the builder can crash, and puts it and tensorrt_packages.py beside the graphs for another
machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt as trt

try:  # the copy that lies beside this file in an export
    from tensorrt_packages import ENGINES, SCHEMA, MissingError, load
except ImportError:
    from fastory.models.tensorrt_packages import ENGINES, SCHEMA, MissingError, load

PLAN = "build_engines.json"
MISSING = 3  # exit status: TensorRT or a GPU is not there
# cuDeviceGetAttribute's numbers for the compute capability, of cuda.h.
MAJOR, MINOR = 75, 76


class BuildError(Exception):
    """No engine was built; the message says why."""


def gpu(number: int = 0) -> tuple[str, str]:
    """Name and compute capability ("8.9") of a CUDA device, from the driver. Raises MissingError without one."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise MissingError(
            "no NVIDIA driver is installed here; run this on a machine with an NVIDIA GPU"
        ) from error
    device, name, found = ctypes.c_int(), ctypes.create_string_buffer(256), [ctypes.c_int(), ctypes.c_int()]
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), number)
    failed = failed or cuda.cuDeviceGetName(name, len(name), device)
    for value, attribute in zip(found, (MAJOR, MINOR), strict=True):
        failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    if failed:
        raise MissingError(f"the NVIDIA driver finds no usable GPU here (CUDA error {failed})")
    return name.value.decode(), f"{found[0].value}.{found[1].value}"


def build(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Build one engine of `folder` and note it in engines.json; returns its record there.

    job: component, graph, data and engine (file names), builder (tensorrt or tensorrt_rtx), target (None, or a compute
    capability such as "8.9" that TensorRT for RTX builds for without a GPU), profile (input -> three shapes), flags, and
    the sha256 of graph and data. Raises BuildError; nothing half-written stays.
    """
    library = load(plan["builder"])
    name, capability = (None, plan["target"]) if plan["target"] else gpu()
    refuse_changed(folder, plan)
    made = {"name": name, "capability": capability, "version": str(library.__version__)}
    engine = folder / plan["engine"]
    write(engine, _serialized(library, folder, plan, made))
    record = {
        "component": plan["component"],
        "builder": plan["builder"],
        **made,
        "profile": plan["profile"],
        "flags": sorted(plan["flags"]),
        "sha256": {**plan["sha256"], plan["engine"]: sha256(engine)},
    }
    note(folder, plan["engine"], record)
    return record


def refuse_changed(folder: Path, plan: Mapping[str, Any]) -> None:
    """BuildError for a graph or weights that are not those of the plan."""
    for file in (plan["graph"], plan["data"]):
        if sha256(folder / file) != plan["sha256"][file]:
            raise BuildError(
                f"{folder / file} is not the file that this build was planned for; export the model anew"
            )


def _serialized(trt: Any, folder: Path, plan: Mapping[str, Any], made: Mapping[str, Any]) -> Any:
    """The engine's bytes, an IHostMemory."""
    logger = _logger(trt)
    builder: trt.Builder = trt.Builder(logger)
    network = _parsed(trt, builder, logger, folder / plan["graph"])
    config = builder.create_builder_config()
    _configure(trt, config, plan)
    profile = builder.create_optimization_profile()
    for name, shapes in plan["profile"].items():
        profile.set_shape(name, *(tuple(shape) for shape in shapes))
    if plan["profile"] and config.add_optimization_profile(profile) < 0:
        raise BuildError(f"NVIDIA's builder refuses the sizes of {plan['component']}: {_said(logger)}")
    with _timed(config, folder / timing_cache(made), plan):
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BuildError(f"NVIDIA's builder made no engine of {plan['graph']}: {_said(logger)}")
    return serialized


def _parsed(trt: Any, builder: trt.Builder, logger: Any, graph: Path) -> trt.INetworkDefinition:
    # Ignored since TensorRT 11, which knows no other networks: types are those of the graph.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [_explained(parser.get_error(number)) for number in range(parser.num_errors)]
        raise BuildError(f"NVIDIA's parser refuses {graph.name}: {'; '.join(errors) or _said(logger)}")
    for number in range(network.num_inputs):
        if network.get_input(number).is_shape_tensor:
            raise BuildError(f"{graph.name}: sizes depend on the values of {network.get_input(number).name}")
    return network


def _configure(trt: Any, config: trt.IBuilderConfig, plan: Mapping[str, Any]) -> None:
    """Flags and, for RTX, the target."""
    if "refit" in plan["flags"]:
        config.set_flag(trt.BuilderFlag.REFIT)
    if "version-compatible" in plan["flags"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if "hardware-compatible" in plan["flags"]:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if plan["target"]:
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, "SM" + plan["target"].replace(".", ""))
        config.set_compute_capability(capability, 0)


@contextmanager
def _timed(config: trt.IBuilderConfig, file: Path, plan: Mapping[str, Any]) -> Iterator[None]:
    """Kernel timings of earlier builds on this GPU are used, and those of this one kept."""
    if plan["target"]:  # TensorRT for RTX measures nothing while it builds
        yield
        return
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    config.set_timing_cache(cache, False)
    yield
    write(file, cache.serialize())


def timing_cache(made: Mapping[str, Any]) -> str:
    """File name of the kernel timings of a GPU and a version of TensorRT."""
    name = re.sub(r"[^a-z0-9]+", "-", str(made["name"]).lower()).strip("-")
    return f"timing-{name}-sm{made['capability'].replace('.', '')}-{made['version']}.cache"


def _logger(trt: Any) -> Any:
    """A logger that keeps the errors; what the parser remarks on names is left out."""

    class Errors(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.messages.append(message)

    return Errors()


def _explained(error: trt.ParserError) -> str:
    return f"{error.node_name()} ({error.node_operator()}): {error.desc()}"


def _said(logger: Any) -> str:
    return "; ".join(dict.fromkeys(logger.messages)) or "it did not say why"


# This file runs where fastory is not installed, so it has small copies of what fastory/files.py does: sha256 and write.


def sha256(file: Path) -> str:
    """The SHA-256 of a file. Raises BuildError where it is missing."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        raise BuildError(f"{file} is missing; export the model anew") from None


def write(file: Path, data: Any) -> None:
    """Beside its place, synced, renamed, and the folder synced: a kill or a full disk leaves no half of it."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # a link of this name would be written through
        with partial.open("xb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
        sync_folder(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the system write a folder's list of names to the disk; Windows has no handle for one."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def note(folder: Path, engine: str, record: Mapping[str, Any]) -> None:
    """Set the record of one engine in engines.json."""
    try:
        known = json.loads((folder / ENGINES).read_text(encoding="utf-8"))["engines"]
    except (OSError, ValueError, KeyError, TypeError):
        known = {}  # an engine without a record is not opened, so it is built anew
    engines = {"schema": SCHEMA, "engines": dict(sorted({**known, engine: record}.items()))}
    write(folder / ENGINES, (json.dumps(engines, indent=1) + "\n").encode())


def _planned(folder: Path, components: list[str]) -> Iterator[Mapping[str, Any]]:
    plans = json.loads((folder / PLAN).read_text(encoding="utf-8"))["jobs"]
    known = [plan["component"] for plan in plans]
    if unknown := [name for name in components if name not in known]:
        raise BuildError(f"{', '.join(unknown)}: wanted some of {', '.join(known)}")
    yield from (plan for plan in plans if not components or plan["component"] in components)


def _peak_memory() -> int | None:
    """Bytes of this process at its largest; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: list[str]) -> int:
    """Build what is planned; with --job FOLDER, the job on standard input, whose seconds and memory are printed."""
    try:
        if arguments[:1] == ["--job"]:
            started = time.monotonic()
            build(Path(arguments[1]), json.load(sys.stdin))
            print(json.dumps({"seconds": time.monotonic() - started, "peak_memory": _peak_memory()}))
            return 0
        folder = Path(__file__).resolve().parent
        for plan in _planned(folder, arguments):
            build(folder, plan)
            print(folder / plan["engine"], flush=True)
    except MissingError as error:
        print(error, file=sys.stderr)
        return MISSING
    except (BuildError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
