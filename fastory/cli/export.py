"""`fastory export`: a model as ONNX graphs, and as TensorRT engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from fastory import packages
from fastory.cli.options import (
    METHOD,
    OUTPUT,
    TENSORRT,
    Adapter,
    Config,
    Distilled,
    Dtype,
    ImageEncoder,
    IpAdapter,
    JsonLines,
    Loras,
    ModelName,
    ModelOptions,
    Offline,
    Quiet,
    among,
    choice,
    flag,
    option,
)
from fastory.cli.progress import show_export, show_json
from fastory.cli.reporting import reported
from fastory.errors import InputError
from fastory.export.choices import BINDINGS, RTX_TARGETS, check_target, parse_sizes

Onnx = Annotated[bool, option(OUTPUT, "--onnx", help="ONNX graphs (the default).")]
Trt = Annotated[
    bool, option(OUTPUT, "--trt", help="TensorRT engines from the graphs, for this machine's GPU.")
]
Output = Annotated[
    Path | None,
    option(OUTPUT, "--output", "-o", help="Folder (default: ./engines/<model>-<hash>)."),
]
Overwrite = Annotated[bool, option(OUTPUT, "--overwrite", help="Replace the export that is there.")]
Groups = Annotated[
    int,
    option(METHOD, help="Groups of references: 1 for the frames, and 1 for every character with pictures."),
]
Characters = Annotated[
    int,
    option(
        METHOD, help="Groups for characters' own appearances (--regions), of which masks are inputs then."
    ),
]
Boxes = Annotated[
    bool,
    option(METHOD, "--boxes", help="With --characters: their words and self-attention keep to boxes, too."),
]
Bind = Annotated[str, choice(METHOD, BINDINGS, help="What computes attention (default ort, ONNX Runtime).")]
Rtx = Annotated[
    str | None,
    option(
        TENSORRT,
        metavar="SM",
        autocompletion=among(RTX_TARGETS),
        help="TensorRT for RTX, for another machine's GPU, such as sm89.",
    ),
]
Size = Annotated[
    list[str] | None,
    option(TENSORRT, metavar="NAME=LEAST:MOST", help="Sizes that an engine takes; repeatable."),
]
Component = Annotated[list[str] | None, option(TENSORRT, help="Build only this component; repeatable.")]
Refit = Annotated[bool, option(TENSORRT, "--refit", help="Engines that take other weights later.")]
VersionCompatible = Annotated[
    bool, option(TENSORRT, "--version-compatible", help="Engines for later TensorRT versions as well.")
]
HardwareCompatible = Annotated[
    bool, option(TENSORRT, "--hardware-compatible", help="Engines for every GPU from Ampere on.")
]


def export(
    onnx: Onnx = False,
    trt: Trt = False,
    output: Output = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_lines: JsonLines = False,
    model: ModelName = "builtin",
    config: Config = None,
    ip_adapter: IpAdapter = None,
    image_encoder: ImageEncoder = None,
    adapter: Adapter = None,
    lora: Loras = None,
    distilled: Distilled = None,
    offline: Offline = False,
    dtype: Dtype = "float32",
    groups: Groups = 1,
    characters: Characters = 0,
    boxes: Boxes = False,
    bind: Bind = "ort",
    rtx: Rtx = None,
    size: Size = None,
    component: Component = None,
    refit: Refit = False,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = False,
) -> None:
    """Write a model as ONNX graphs, each compared with torch, for `fastory generate --engine FOLDER`.

    The weight of the references, their number and who sees them are inputs of the graphs. The same command with another
    --bind changes the small graph files of a finished export alone. With --trt engines are built beside them; where
    TensorRT or a GPU is missing, the graphs and a build script are written, and the exit code is 3.
    """
    requested = locals()
    with reported():
        events = exported(requested)
        show_json(events) if json_lines else show_export(events, quiet)


def exported(requested: Mapping[str, Any]) -> Iterator[Any]:
    """The events of the export that these options name, and with --trt of its engines. Raises InputError before the first."""
    flags = {name: requested[name] for name in ("refit", "version_compatible", "hardware_compatible")}
    check_engine_options(requested, flags)
    packages.require("fastory export", "onnx", "onnx", "onnxscript", "onnxruntime")
    from fastory import door

    groups = [requested[name] for name in ("groups", "characters", "boxes")]
    door.check_export(requested["output"], requested["dtype"], requested["bind"], *groups)
    bounds = engine_bounds(requested["rtx"], requested["size"] or []) if requested["trt"] else {}
    model = ModelOptions.among(requested).open("cpu", requested["dtype"], "off")
    return export_and_build(model, requested, bounds, flags)


def export_and_build(
    model: Any, requested: Mapping[str, Any], bounds: Mapping[str, tuple[int, int]], flags: Mapping[str, Any]
) -> Iterator[Any]:
    """The events of the graphs, and with --trt of the engines beside them. flags: of the builder."""
    from fastory.export.onnx import Finished, export_onnx
    from fastory.export.tensorrt import build, build_rtx

    how = {name: requested[name] for name in ("groups", "characters", "boxes", "overwrite")}
    for event in export_onnx(model, requested["output"], binding=requested["bind"], **how):
        yield event
    if requested["trt"]:
        assert isinstance(event, Finished)
        which: dict[str, Any] = {"components": requested["component"] or [], "sizes": bounds}
        if requested["rtx"] is not None:
            yield from build_rtx(event.folder, requested["rtx"], **which)
        else:
            yield from build(event.folder, **which, **flags)


def check_engine_options(requested: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
    """InputError for options of engines without --trt, and for those that TensorRT for RTX does not have."""
    said = [
        flag(name)
        for name in (*flags, "rtx", "size", "component")
        if requested[name] not in (None, False, [])
    ]
    if said and not requested["trt"]:
        raise InputError(f"{said[0]} is about engines; give --trt as well")
    if requested["rtx"] is not None and any(flags.values()):
        raise InputError(f"TensorRT for RTX has no {said[0]}; leave it out")


def engine_bounds(rtx: str | None, sizes: list[str]) -> dict[str, tuple[int, int]]:
    """The bounds of --size. Raises InputError for those and for a target before anything is exported."""
    if rtx is not None:
        check_target(rtx)
    return parse_sizes(sizes)
