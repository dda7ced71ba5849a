"""`fastory export --onnx`: every component of a model as an ONNX graph, measured against torch before it counts."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastory import __version__, files, packages
from fastory.errors import InputError
from fastory.export.choices import Groups, check_binding, check_is_no_file
from fastory.export.component import Component
from fastory.export.graphs import components, constants
from fastory.export.parity import Parity, measure_apart, measure_folder, refuse_apart
from fastory.export.unets import is_large
from fastory.models.export_folder import (
    DOING,
    HINT,
    MANIFEST,
    SCHEMA,
    ExportFolder,
    factored,
    hashes_of,
    refuse_other_files,
    write_manifest,
)
from fastory.models.torch_model import StoryModel

RANGES = "pkg.torch.export.ExportedProgram.range_constraints"  # of the exporter's metadata
TRACE = "pkg.torch.onnx.stack_trace"  # files and lines of the machine that exported


@dataclass(frozen=True)
class Exported:
    """A graph is written. bytes: of its weights."""

    component: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Compared:
    """Every component agrees with torch. worst: the one nearest to what is allowed; None in bfloat16."""

    comparisons: int
    worst: Parity | None


@dataclass(frozen=True)
class Rebound:
    """An export that was there has other bodies now."""

    binding: str


@dataclass(frozen=True)
class Finished:
    """The folder is whole."""

    folder: Path


Event = Exported | Compared | Rebound | Finished


def export_onnx(
    model: StoryModel,
    output: str | Path | None = None,
    *,
    groups: int = 1,
    characters: int = 0,
    boxes: bool = False,
    binding: str = "ort",
    overwrite: bool = False,
) -> Iterator[Event]:
    """Export `model`, which lies on the CPU in the wanted type; yields events, the last one Finished.

    output: ./engines/<model>-<hash> by default. groups, characters, boxes: choices.Groups, groups being those shown. binding:
    ort, portable or trt. The same call on a finished export only changes its binding.
    overwrite: replace an export that is there, once the new one is whole; a folder with files of others is refused.
    Everything is checked before the first event: raises InputError. While exporting, raises FastoryError for a full disk,
    for a folder that another process exports into, and for a graph that does not compute what torch computes; what was
    written is taken away again.
    """
    packages.require("an export", "onnx", "onnx", "onnxscript", "onnxruntime")
    wanted = Groups(groups, characters, boxes)
    check_binding(binding, wanted)
    identity = {
        "model": model.hashes,
        "dtype": model.placement.dtype_name,
        "groups": groups,
        **wanted.noted(),
        "fastory": __version__,
    }
    folder = Path(output) if output else default_folder(model, identity)
    files.finish_interrupted(folder, DOING, HINT, last=MANIFEST)
    there = _existing(folder, identity, overwrite)
    if there is None:
        _room_for(model, folder)
        return _export(model, folder, identity, wanted, binding)
    return _rebind(there, binding)


def default_folder(model: StoryModel, identity: Mapping[str, Any]) -> Path:
    """./engines/<model>-<first 8 hex digits of what is exported>."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Path("engines") / f"{Path(model.name).stem}-{digest[:8]}"


def _existing(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> ExportFolder | None:
    """The finished export of the same in `folder`; None where there is nothing, or what is there is to go."""
    check_is_no_file(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if overwrite:
        refuse_other_files(folder)
        return None
    there = ExportFolder.open(folder)
    if there.manifest["identity"] != json.loads(json.dumps(identity)):
        said = [name for name in identity if there.manifest["identity"].get(name) != identity[name]]
        raise InputError(
            f"{folder} holds another export (other {', '.join(said)}); choose another --output, or --overwrite"
        )
    return there


def _room_for(model: StoryModel, folder: Path) -> None:
    """InputError where the disk has no room for the weights."""
    modules = [
        model.unet,
        model.vae,
        model.pipeline.text_encoder,
        getattr(model.pipeline, "text_encoder_2", None),
    ]
    if model.checkpoint.history is not None:
        modules += [model.causal.unet, model.checkpoint.history.encoder]
    tensors = [p for module in modules if module is not None for p in module.parameters()]
    needed = sum(p.numel() * p.element_size() for p in tensors)
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < 1.1 * needed:
        raise InputError(
            f"{folder}: the export takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; "
            "make room, or choose another --output"
        )


def _export(
    model: StoryModel, folder: Path, identity: Mapping[str, Any], groups: Groups, binding: str
) -> Iterator[Event]:
    """Everything in a folder beside its place, renamed once it is good."""
    with files.disk_errors(folder, "Nothing of it is left."):
        files.make_folder(folder.absolute().parent)
        with files.unfinished(folder, DOING, HINT, last=MANIFEST) as working:
            new = working / files.NEW
            files.make_folder(new)
            yield from _fill(model, new, identity, groups, binding)
            files.sync_tree(new)
            if folder.exists() and any(folder.iterdir()):
                refuse_other_files(folder)
            files.replace_folder(new, folder, working / files.OLD)
    yield Finished(folder)


def _fill(
    model: StoryModel, folder: Path, identity: Mapping[str, Any], groups: Groups, binding: str
) -> Iterator[Event]:
    """All files of an export, compared with torch, in a folder that does not stand in its place yet."""
    described: dict[str, Any] = {}
    # What is compared must run here; bodies for TensorRT are put in afterwards.
    runs = "ort" if binding == "trt" else binding
    for component in components(model, groups):
        started = time.monotonic()
        described[component.name] = export_component(component, folder, groups.count, runs)
        size = (folder / f"{component.name}.onnx.data").stat().st_size
        yield Exported(component.name, time.monotonic() - started, size)
    _write_beside(model, folder)
    found = compare(model, folder, groups)
    yield Compared(len(found), max(found, key=lambda parity: parity.share) if found else None)
    if runs != binding:
        for component in described.values():
            graph = folder / component["file"]
            bind_graph(graph, graph, binding, groups.count, model.dtype)
    record = _parity_record(model, found, groups)
    manifest = _manifest(model, identity, groups, binding, described, record)
    write_manifest(folder, {**manifest, "files": hashes_of(folder)})


def export_component(component: Component, folder: Path, groups: int, binding: str) -> dict[str, Any]:
    """<name>.onnx and its weights in `folder`; returns what fastory.json says of it."""
    import onnx

    file = folder / f"{component.name}.onnx"
    _save(_traced(component), file)
    bind_graph(file, file, binding, groups, component.dtype)
    onnx.checker.check_model(str(file))
    return describe(component)


def _traced(component: Component) -> torch.onnx.ONNXProgram:
    from fastory.export.operators import OPSET, translations

    inputs = component.sample(component.traced, 0)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            component.module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(component.outputs),
            dynamic_shapes=_dynamic(component),
            custom_translation_table=translations(),
            verbose=False,
        )
    assert program is not None
    return program


def _save(program: torch.onnx.ONNXProgram, file: Path) -> None:
    _sort_ranges(program.model.graph.metadata_props)
    for node in program.model.graph:
        node.metadata_props.pop(TRACE, None)
    files.write(file, lambda path: program.save(str(path), external_data=True))


def _sort_ranges(properties: MutableMapping[str, str]) -> None:
    """Sort the ranges of sizes that the exporter notes, from a set, in an order that is another in every process."""
    if noted := properties.get(RANGES):
        properties[RANGES] = "{" + ", ".join(sorted(re.findall(r"[^{}, ][^:{}]*: VR\[[^\]]*\]", noted))) + "}"


def bind_graph(path: Path, target: Path, binding: str, groups: int, dtype: torch.dtype) -> None:
    """A graph file with other bodies."""
    from fastory.export.operators import bind_file

    bind_file(path, target, binding, groups, dtype)


def describe(component: Component) -> dict[str, Any]:
    """Inputs and outputs of a component with their types and sizes, as fastory.json holds them."""
    name = component.name
    return {
        "file": f"{name}.onnx",
        "data": f"{name}.onnx.data",
        "inputs": {
            key: {"dtype": _name(described.dtype), "shape": list(described.shape)}
            for key, described in component.inputs.items()
        },
        "outputs": {
            key: {"dtype": _name(component.dtype), "shape": list(shape)}
            for key, shape in component.outputs.items()
        },
        "ranges": {key: list(bounds) for key, bounds in component.ranges.items()},
        "hot": dict(component.hot),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dynamic(component: Component) -> tuple[Any, ...]:
    """dynamic_shapes of torch.export; inputs that a forward takes as *args are one nested tuple."""
    dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in component.ranges.items()}

    def axes(shape: tuple[Any, ...]) -> dict[int, Any]:
        named = {index: factored(axis) for index, axis in enumerate(shape) if isinstance(axis, str)}
        return {
            index: dims[name] if factor == 1 else factor * dims[name]
            for index, (factor, name) in named.items()
        }

    shapes = [axes(described.shape) for described in component.inputs.values()]
    named = inspect.signature(component.module.forward).parameters.values()
    fixed = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in named)
    rest = shapes[fixed:]
    return (*shapes[:fixed], tuple(rest)) if rest else tuple(shapes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on what it renames and cannot fold."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _write_beside(model: StoryModel, folder: Path) -> None:
    """Tokenizers, image processors, the scheduler's configuration, and constants."""
    pipeline, checkpoint = model.pipeline, model.checkpoint
    parts = {name: getattr(pipeline, name) for name in model.family.others}
    if model.adapter is not None:
        parts["feature_extractor"] = checkpoint.image_processor
    if checkpoint.history is not None:
        parts["history_tokenizer"] = checkpoint.history.tokenizer
    for name, part in parts.items():
        files.write_into(folder / name, part.save_pretrained)
    tensors = constants(model)
    files.write(folder / "constants.safetensors", lambda path: save_file(tensors, path))


def compare(model: StoryModel, folder: Path, groups: Groups) -> list[Parity]:
    """Parity of every component; FastoryError where one does not agree. Empty in bfloat16, which no CPU runtime has."""
    if model.dtype == torch.bfloat16:
        return []
    if is_large(model) and model.options is not None:
        options = {**model.options, "dtype": model.placement.dtype_name}
        found = measure_apart(folder, options, groups)
    else:
        found = measure_folder(folder, model, groups)
    refuse_apart(found)
    return found


def _parity_record(model: StoryModel, found: list[Parity], groups: Groups) -> dict[str, Any]:
    """The comparisons as fastory.json holds them; in bfloat16 those of an export of the same weights in float32."""
    if model.dtype != torch.bfloat16:
        return {"measured": [asdict(parity) for parity in found]}
    return {
        "measured": [],
        "not run": "no CPU runtime",
        "float32 twin": [asdict(parity) for parity in _float32_parity(model, groups)],
    }


def _float32_parity(model: StoryModel, groups: Groups) -> list[Parity]:
    """Parity of the same checkpoint in float32, exported aside and thrown away."""
    import tempfile

    if model.options is None:
        raise InputError(
            "an export in bfloat16 is compared in float32; wanted a model made by StoryModel.open"
        )
    wide = StoryModel.open(**model.options, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory(prefix="fastory-float32-") as aside:
        for component in components(wide, groups):
            export_component(component, Path(aside), groups.count, "ort")
        return compare(wide, Path(aside), groups)


def _manifest(
    model: StoryModel,
    identity: Mapping[str, Any],
    groups: Groups,
    binding: str,
    described: Mapping[str, Any],
    parity: Mapping[str, Any],
) -> dict[str, Any]:
    """fastory.json but for the hashes of the files."""
    import onnx

    from fastory.export.operators import OPSET

    unet, vae, history = model.unet.config, model.vae.config, model.checkpoint.history
    return {
        "schema": SCHEMA,
        "identity": dict(identity),
        "versions": {"fastory": __version__, "torch": torch.__version__, "onnx": onnx.__version__},
        "name": Path(model.name).name,
        "family": model.family.name,
        "dtype": model.placement.dtype_name,
        "opset": OPSET,
        "binding": binding,
        "groups": groups.count,
        **groups.noted(),
        "tokens_per_ref": model.tokens_per_ref,
        "size_factor": model.size_factor,
        "vae_factor": model.vae_factor,
        "native_size": list(model.native_size),
        "width": model.layers.width,
        "layer_channels": model.layers.channels,
        "defaults": dict(model.defaults) | ({"world": model.world} if model.world else {}),
        "unet": {
            "in_channels": unet.in_channels,
            "block_out_channels": list(unet.block_out_channels),
            "cross_attention_dim": unet.cross_attention_dim,
            "time_cond_proj_dim": unet.time_cond_proj_dim,
            "parameters": sum(p.numel() for p in model.unet.parameters()),
        },
        "vae": {
            "dtype": _name(model.vae.dtype),
            "scaling_factor": vae.scaling_factor,
            "latents_mean": getattr(vae, "latents_mean", None),
            "latents_std": getattr(vae, "latents_std", None),
        },
        "pooled_width": model.family.pooled_width(model.pipeline),
        "force_zeros_for_empty_prompt": bool(
            getattr(model.pipeline.config, "force_zeros_for_empty_prompt", False)
        ),
        "history": history.encoder.config.as_dict() if history is not None else None,
        "scheduler": type(model.pipeline.scheduler).__name__,
        **({"distilled": "lcm-lora"} if model.distilled == "lcm-lora" else {}),
        "components": dict(described),
        "parity": dict(parity),
    }


def _rebind(there: ExportFolder, binding: str) -> Iterator[Event]:
    """Other bodies in the small graph files; the weights are not touched.

    The new files are whole in a folder of their own before the first of them takes its place, and fastory.json is the
    last one: what a kill leaves to be done, the same command does.
    """
    if there.manifest["binding"] != binding:
        kept = "The export is as it was."
        with (
            files.disk_errors(there.path, kept),
            files.unfinished(there.path, DOING, HINT, last=MANIFEST) as working,
        ):
            there = ExportFolder.open(there.path)  # as it is now that nobody else changes it
            _write_rebound(there, working / files.NEW, binding)
            files.replace(working / files.NEW, working / files.READY)
            files.move_files(working / files.READY, there.path, MANIFEST)
        yield Rebound(binding)
    yield Finished(there.path)


def _write_rebound(there: ExportFolder, folder: Path, binding: str) -> None:
    """The graphs with other bodies, and the fastory.json that lists them."""
    files.make_folder(folder)
    listed = dict(there.manifest["files"])
    for component in there.components.values():
        name = component["file"]
        bind_graph(there.path / name, folder / name, binding, there.groups, there.dtype)
        listed[name] = files.sha256_of(folder / name)
    write_manifest(folder, {**there.manifest, "binding": binding, "files": listed})
    files.sync_tree(folder)
