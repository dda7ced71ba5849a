"""Which runtime runs the components of an export, and whether what they are given fits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastory.errors import InputError
from fastory.models.export_folder import ExportFolder, engine_name, factored
from fastory.models.onnx_session import OrtSession, Session
from fastory.models.tensorrt_session import AGAIN, TensorRtSession, engine_record
from fastory.wording import counted


def check_ports(session: Any, described: Mapping[str, Any], where: str) -> None:
    """InputError for a graph that takes or gives other tensors than fastory.json says."""
    other = {*session.types} - {*described["inputs"]} or {*described["outputs"]} - {*session.outputs}
    if other:
        raise InputError(
            f"{where}: its graph and fastory.json differ in {min(other)[:60]}; export the model anew"
        )


def sessions_for(
    folder: ExportFolder, device: torch.device, trust_cache: bool = False
) -> Callable[[str], Session]:
    """What runs the components of `folder` on `device`: on CUDA the engines that were built for it, else ONNX Runtime.

    Raises InputError where only TensorRT could, and there is no engine.
    """
    engines = engines_for(folder, device)
    if len(engines) < len(folder.components):
        refuse_onnxruntime(folder)

    def session(name: str) -> Session:
        if name in engines:
            return TensorRtSession(folder.path, engines[name], device, trust_cache=trust_cache)
        return OrtSession(folder.path / folder.components[name]["file"], device)

    return session


def engines_for(folder: ExportFolder, device: torch.device) -> dict[str, str]:
    """The engine file of every component that has one: TensorRT's, else that of TensorRT for RTX for this GPU."""
    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        component: file
        for component in folder.components
        for file in (engine_name(component, f"sm{major}{minor}"), engine_name(component))
        if (folder.path / file).is_file()
    }


def bounded_by_engines(folder: ExportFolder, engines: Mapping[str, str]) -> ExportFolder:
    """`folder` with the ranges of every component that an engine runs cut to what the engine was built for.

    engines: the engine file by component. A graph takes more sizes than its engine's profile, so without this a story too
    large for it would be refused at its first UNet call, after the run folder was begun.
    """
    bounded = dict(folder.components)
    for name, file in engines.items():
        component = bounded[name]
        ranges = dict(component["ranges"])
        for key, (least, _, most) in engine_record(folder.path, file).get("profile", {}).items():
            axes = component["inputs"].get(key, {"shape": ()})["shape"]
            if not len(axes) == len(least) == len(most):
                raise InputError(f"{folder.path}: {file} was built for other inputs than {name} has; {AGAIN}")
            for axis, low, high in zip(axes, least, most, strict=True):
                if isinstance(axis, str):
                    factor, size = factored(axis)
                    start, end = ranges[size]
                    ranges[size] = (max(start, -(-low // factor)), min(end, high // factor))
        bounded[name] = {**component, "ranges": ranges}
    return replace(folder, manifest={**folder.manifest, "components": bounded})


def refuse_onnxruntime(folder: ExportFolder) -> None:
    """InputError for a type or a binding that ONNX Runtime cannot run."""
    if folder.dtype == torch.bfloat16:
        raise InputError(
            f"{folder.path} was exported in bfloat16, which ONNX Runtime does not compute; export it in float32 or "
            "float16, or build engines on a machine with an NVIDIA GPU: fastory export --trt"
        )
    if folder.manifest["binding"] == "trt":
        raise InputError(
            f"{folder.path} is bound for TensorRT, and ONNX Runtime cannot run that; "
            "run the same `fastory export --onnx` with --bind ort, which changes the small graph files alone"
        )


def refuse_groups(folder: ExportFolder, wanted: int) -> NoReturn:
    """InputError for a story with more groups of references than the UNet was exported for."""
    exported = counted(folder.groups, "group")
    if folder.characters:
        todo = f"--characters {folder.characters + wanted - folder.groups}"
        which = "the frames, every character, and every character with pictures once more"
    else:
        todo, which = f"--groups {wanted}", "the frames, and every character with pictures"
    raise InputError(
        f"{folder.path} was exported for {exported} of references, and this story has {wanted} ({which}); "
        f"export it with {todo}"
    )


def check_sizes(name: str, component: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> None:
    """InputError for the first size outside the ranges of a component, or that contradicts another."""
    sizes: dict[str, int] = {}
    for key, described in component["inputs"].items():
        got, wanted = tuple(inputs[key].shape), described["shape"]
        fits = len(got) == len(wanted)
        for length, axis in zip(got, wanted, strict=False):
            if isinstance(axis, int):
                fits = fits and length == axis
                continue
            factor, size = factored(axis)
            low, high = component["ranges"][size]
            fits = fits and length % factor == 0 and low <= length // factor <= high
            fits = fits and sizes.setdefault(size, length // factor) == length // factor
        if not fits:
            ranges = ", ".join(f"{k} {low} to {high}" for k, (low, high) in component["ranges"].items())
            raise InputError(
                f"{name}: {key}: wanted {tuple(wanted)} with {ranges}, got {got}; export the model for these sizes"
            )
