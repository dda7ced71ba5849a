"""`fastory export`: a model as ONNX graphs, and as TensorRT engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from fastory import packages
from fastory.cli.options import (
    METHOD,
    OUTPUT,
    TENSORRT,
    Adapter,
    Config,
    ImageEncoder,
    IpAdapter,
    Loras,
    ModelName,
    Offline,
    open_model,
    option,
)
from fastory.cli.progress import show_engines, show_export
from fastory.cli.reporting import reported, say
from fastory.errors import InputError


def export(
    onnx: Annotated[bool, option(OUTPUT, "--onnx", help="ONNX graphs (the default).")] = False,
    trt: Annotated[
        bool, option(OUTPUT, "--trt", help="TensorRT engines from the graphs, for this machine's GPU.")
    ] = False,
    output: Annotated[
        Path | None,
        option(OUTPUT, "--output", "-o", help="Folder (default: ./engines/<model>-<hash>)."),
    ] = None,
    overwrite: Annotated[
        bool, option(OUTPUT, "--overwrite", help="Replace the export that is there.")
    ] = False,
    quiet: Annotated[bool, option(OUTPUT, "--quiet", help="Print the folder and nothing else.")] = False,
    model: ModelName = "builtin",
    config: Config = None,
    ip_adapter: IpAdapter = None,
    image_encoder: ImageEncoder = None,
    adapter: Adapter = None,
    lora: Loras = None,
    offline: Offline = False,
    dtype: Annotated[str, option(METHOD, help="float32 (the default), float16 or bfloat16.")] = "float32",
    groups: Annotated[
        int,
        option(
            METHOD, help="Groups of references: 1 for the frames, and 1 for every character with pictures."
        ),
    ] = 1,
    bind: Annotated[
        str,
        option(METHOD, help="What computes attention: ort (ONNX Runtime, the default), portable or trt."),
    ] = "ort",
    rtx: Annotated[
        str | None,
        option(TENSORRT, metavar="SM", help="TensorRT for RTX, for another machine's GPU, such as sm89."),
    ] = None,
    size: Annotated[
        list[str] | None,
        option(TENSORRT, metavar="NAME=LEAST:MOST", help="Sizes that an engine takes; repeatable."),
    ] = None,
    component: Annotated[
        list[str] | None, option(TENSORRT, help="Build only this component; repeatable.")
    ] = None,
    refit: Annotated[
        bool, option(TENSORRT, "--refit", help="Engines that take other weights later.")
    ] = False,
    version_compatible: Annotated[
        bool, option(TENSORRT, "--version-compatible", help="Engines for later TensorRT versions as well.")
    ] = False,
    hardware_compatible: Annotated[
        bool, option(TENSORRT, "--hardware-compatible", help="Engines for every GPU from Ampere on.")
    ] = False,
) -> None:
    """Write a model as ONNX graphs, each compared with torch, for `fastory generate --engine FOLDER`.

    The weight of the references, their number and who sees them are inputs of the graphs. The same command with another
    --bind changes the small graph files of a finished export alone. With --trt engines are built beside them; where
    TensorRT or a GPU is missing, the graphs and a build script are written, and the exit code is 3.
    """
    with reported():
        flags = {
            "refit": refit,
            "version_compatible": version_compatible,
            "hardware_compatible": hardware_compatible,
        }
        wanted = [f"--{name.replace('_', '-')}" for name, given in flags.items() if given]
        wanted += ["--rtx"] * (rtx is not None) + ["--size"] * bool(size) + ["--component"] * bool(component)
        if wanted and not trt:
            raise InputError(f"{wanted[0]} is about engines; give --trt as well")
        if rtx is not None and any(flags.values()):
            raise InputError(f"TensorRT for RTX has no {wanted[0]}; leave it out")
        packages.require("fastory export", "onnx", "onnx", "onnxscript", "onnxruntime")
        from fastory import door

        door.check_export(output, dtype, groups, bind)
        bounds = checked_engines(rtx, size or []) if trt else {}
        opened = open_model(
            model, config, ip_adapter, image_encoder, adapter, lora or [], "cpu", dtype, "off", offline
        )
        folder = show_export(export_events(opened, output, groups, bind, overwrite), quiet)
        if trt:
            show_engines(engine_events(folder, rtx, component or [], bounds, flags), quiet)
        say(str(folder))


def export_events(model: Any, output: Path | None, groups: int, bind: str, overwrite: bool) -> Iterator[Any]:
    """The events of an export."""
    from fastory.export.onnx import export_onnx

    return export_onnx(model, output, groups=groups, binding=bind, overwrite=overwrite)


def checked_engines(rtx: str | None, sizes: list[str]) -> dict[str, tuple[int, int]]:
    """The bounds of --size. Raises InputError for those and for a target before anything is exported."""
    from fastory.export.choices import check_target, parse_sizes

    if rtx is not None:
        check_target(rtx)
    return parse_sizes(sizes)


def engine_events(
    folder: Path,
    rtx: str | None,
    components: list[str],
    bounds: dict[str, tuple[int, int]],
    flags: dict[str, bool],
) -> Iterator[Any]:
    """The events of building engines of an exported folder."""
    from fastory.export.tensorrt import build, build_rtx

    if rtx is not None:
        return build_rtx(folder, rtx, components=components, sizes=bounds)
    return build(folder, components=components, sizes=bounds, **flags)
