"""`fastory export --onnx`: every component of a model as an ONNX graph, measured against torch before it counts."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastory import __version__, packages
from fastory.checkpoints.hashes import file_hash
from fastory.errors import FastoryError, InputError
from fastory.export.folder import MANIFEST, SCHEMA, ExportFolder, hashes_of, write_manifest
from fastory.export.graphs import Component, components, constants, factored, is_large, plain_linear
from fastory.export.parity import Parity, measure_apart, measure_folder, refuse_apart
from fastory.model import StoryModel


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
    binding: str = "ort",
    overwrite: bool = False,
) -> Iterator[Event]:
    """Export `model`, which lies on the CPU in the wanted type; yields events, the last one Finished.

    output: ./engines/<model>-<hash> by default. groups: G, groups of references (frames are one, every character with
    pictures one more). binding: ort, portable or trt. The same call on a finished export only changes its binding.
    Everything is checked before the first event: raises InputError. While exporting, raises FastoryError for a full disk
    and for a graph that does not compute what torch computes; what was written is taken away again.
    """
    packages.require("an export", "onnx", "onnx", "onnxscript", "onnxruntime")
    from fastory.export.operators import BINDINGS

    if binding not in BINDINGS:
        raise InputError(f"--bind: wanted one of {', '.join(BINDINGS)}, got {binding!r}")
    if groups < 1:
        raise InputError(f"--groups: wanted 1 or more, got {groups}")
    identity = {
        "model": model.hashes,
        "dtype": model.placement.dtype_name,
        "groups": groups,
        "fastory": __version__,
    }
    folder = Path(output) if output else default_folder(model, identity)
    there = _existing(folder, identity, overwrite)
    if there is None:
        _room_for(model, folder)
        return _export(model, folder, identity, groups, binding)
    return _rebind(there, binding)


def default_folder(model: StoryModel, identity: Mapping[str, Any]) -> Path:
    """./engines/<model>-<first 8 hex digits of what is exported>."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Path("engines") / f"{Path(model.name).stem}-{digest[:8]}"


def _existing(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> ExportFolder | None:
    """The finished export of the same in `folder`; None where there is nothing, or what is there is to go."""
    if overwrite or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; wanted a folder, or a name that is free")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise InputError(
                f"{folder} is no export; --overwrite would delete what is in it. Choose another --output."
            )
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
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < 1.1 * needed:
        raise InputError(
            f"{folder}: the export takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; "
            "make room, or choose another --output"
        )


def _export(
    model: StoryModel, folder: Path, identity: Mapping[str, Any], groups: int, binding: str
) -> Iterator[Event]:
    """Everything in a folder beside its place, renamed once it is good."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        described: dict[str, Any] = {}
        # What is compared must run here; bodies for TensorRT are put in afterwards.
        runs = "ort" if binding == "trt" else binding
        for component in components(model, groups):
            started = time.monotonic()
            described[component.name] = export_component(component, partial, groups, runs)
            size = (partial / f"{component.name}.onnx.data").stat().st_size
            yield Exported(component.name, time.monotonic() - started, size)
        _write_beside(model, partial)
        found = compare(model, partial, groups)
        yield Compared(len(found), max(found, key=lambda one: one.share) if found else None)
        if runs != binding:
            bind_all(partial, [one["file"] for one in described.values()], binding, groups, model.dtype)
        record = _parity_record(model, found)
        manifest = _manifest(model, identity, groups, binding, described, record)
        write_manifest(partial, {**manifest, "files": hashes_of(partial)})
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise FastoryError(
            f"{folder} could not be written: {error.strerror or error}. Nothing of it is left."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    yield Finished(folder)


def export_component(component: Component, folder: Path, groups: int, binding: str) -> dict[str, Any]:
    """<name>.onnx and its weights in `folder`; returns what fastory.json says of it."""
    import onnx

    from fastory.export.operators import OPSET, bind_file, translations

    file = folder / f"{component.name}.onnx"
    inputs = component.sample(component.traced, 0)
    with plain_linear(component.module), torch.no_grad(), _quiet():
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
    program.save(str(file), external_data=True)
    del program
    bind_file(file, file, binding, groups, component.dtype)
    onnx.checker.check_model(str(file))
    return describe(component)


def bind_all(folder: Path, graphs: Sequence[str], binding: str, groups: int, dtype: torch.dtype) -> None:
    """Other bodies in these graph files, each replaced as a whole."""
    from fastory.export.operators import bind_file

    for name in graphs:
        partial = folder / f".{name}.partial"
        bind_file(folder / name, partial, binding, groups, dtype)
        partial.replace(folder / name)


def describe(component: Component) -> dict[str, Any]:
    """Inputs and outputs of a component with their types and sizes, as fastory.json holds them."""
    name = component.name
    return {
        "file": f"{name}.onnx",
        "data": f"{name}.onnx.data",
        "inputs": {
            key: {"dtype": _name(one.dtype), "shape": list(one.shape)}
            for key, one in component.inputs.items()
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
        named = {place: factored(axis) for place, axis in enumerate(shape) if isinstance(axis, str)}
        return {
            place: dims[name] if factor == 1 else factor * dims[name]
            for place, (factor, name) in named.items()
        }

    shapes = [axes(one.shape) for one in component.inputs.values()]
    named = inspect.signature(component.module.forward).parameters.values()
    fixed = sum(one.kind is one.POSITIONAL_OR_KEYWORD for one in named)
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
    pipeline = model.pipeline
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    if model.family == "sdxl":
        pipeline.tokenizer_2.save_pretrained(folder / "tokenizer_2")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    if model.adapter is not None:
        model.checkpoint.image_processor.save_pretrained(folder / "feature_extractor")
    if model.checkpoint.history is not None:
        model.checkpoint.history.tokenizer.save_pretrained(folder / "history_tokenizer")
    save_file(constants(model), folder / "constants.safetensors")


def compare(model: StoryModel, folder: Path, groups: int) -> list[Parity]:
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


def _parity_record(model: StoryModel, found: list[Parity]) -> dict[str, Any]:
    """The comparisons as fastory.json holds them; in bfloat16 those of an export of the same weights in float32."""
    if model.dtype != torch.bfloat16:
        return {"measured": [asdict(one) for one in found]}
    return {
        "measured": [],
        "not run": "no CPU runtime",
        "float32 twin": [asdict(one) for one in _twin(model)],
    }


def _twin(model: StoryModel) -> list[Parity]:
    """Parity of the same checkpoint in float32, exported aside and thrown away."""
    import tempfile

    if model.options is None:
        raise InputError(
            "an export in bfloat16 is compared in float32; wanted a model made by StoryModel.open"
        )
    wide = StoryModel.open(**model.options, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory(prefix="fastory-twin-") as aside:
        for component in components(wide, 1):
            export_component(component, Path(aside), 1, "ort")
        return compare(wide, Path(aside), 1)


def _manifest(
    model: StoryModel,
    identity: Mapping[str, Any],
    groups: int,
    binding: str,
    described: Mapping[str, Any],
    parity: Mapping[str, Any],
) -> dict[str, Any]:
    """fastory.json but for the hashes of the files."""
    import onnx

    from fastory.export.operators import OPSET

    unet, vae = model.unet.config, model.vae.config
    history = model.checkpoint.history
    return {
        "schema": SCHEMA,
        "identity": dict(identity),
        "versions": {"fastory": __version__, "torch": torch.__version__, "onnx": onnx.__version__},
        "name": Path(model.name).name,
        "family": model.family,
        "dtype": model.placement.dtype_name,
        "opset": OPSET,
        "binding": binding,
        "groups": groups,
        "tokens_per_ref": model.tokens_per_ref,
        "size_factor": model.size_factor,
        "vae_factor": model.vae_factor,
        "native_size": list(model.native_size),
        "width": model.layers.width,
        "defaults": dict(model.defaults),
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
        "pooled_width": (
            model.pipeline.text_encoder_2.config.projection_dim if model.family == "sdxl" else None
        ),
        "force_zeros_for_empty_prompt": bool(
            getattr(model.pipeline.config, "force_zeros_for_empty_prompt", False)
        ),
        "history": history.encoder.config.as_dict() if history is not None else None,
        "scheduler": type(model.pipeline.scheduler).__name__,
        "components": dict(described),
        "parity": dict(parity),
    }


def _rebind(there: ExportFolder, binding: str) -> Iterator[Event]:
    """Other bodies in the small graph files; the weights are not touched."""
    if there.manifest["binding"] != binding:
        files = dict(there.manifest["files"])
        graphs = [component["file"] for component in there.components.values()]
        bind_all(there.path, graphs, binding, there.groups, there.dtype)
        files |= {name: file_hash(there.path / name) for name in graphs}
        write_manifest(there.path, {**there.manifest, "binding": binding, "files": files})
        yield Rebound(binding)
    yield Finished(there.path)
