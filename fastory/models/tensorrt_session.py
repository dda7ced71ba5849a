"""Run a built engine on torch's CUDA tensors, with TensorRT or TensorRT for RTX.

An engine belongs to one version of TensorRT and one GPU, and to the graph and the weights that it was built from;
engines.json says to which, and whatever differs is refused before the engine is opened.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, StringConstraints
from torch import Tensor

from fastory.checkpoints.hashes import file_hash
from fastory.checkpoints.weights import is_there
from fastory.documents import read_json, validated
from fastory.errors import FastoryError, InputError
from fastory.files import sha256_of
from fastory.models.export_folder import Count, Digest, Inside, Name, check_schema, checked_file
from fastory.models.tensorrt_packages import ENGINES, SCHEMA, MissingError, load

if TYPE_CHECKING:
    import tensorrt as trt

# Shapes that stay prepared: a micro-batch, a last one that is smaller, and those of a second size of picture.
SHAPES = 4
AGAIN = "build it here: fastory export --trt"
DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


class EngineRecord(BaseModel):
    """What engines.json says of an engine. builder: the package that made it, and is imported to run it.

    profile: the least, usual and most shape of each input with a dynamic axis.
    """

    builder: Literal["tensorrt", "tensorrt_rtx"]
    version: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,6}(\.[0-9a-z+]{1,20}){0,6}$")]
    flags: list[str]
    capability: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,3}\.[0-9]{1,3}$")]
    name: str | None
    sha256: dict[Inside, Digest]
    profile: dict[Name, tuple[list[Count], list[Count], list[Count]]] = {}


def engine_record(folder: Path, engine: str) -> Mapping[str, Any]:
    """What engines.json says of an engine file. Raises InputError where it says nothing, or is damaged or newer."""
    file = folder / ENGINES
    if not is_there(file):
        raise InputError(f"{folder} holds no engines; {AGAIN}")
    what = "the record of engines that `fastory export --trt` wrote"
    found = read_json(file, what=what, todo=AGAIN)
    check_schema(found, file, SCHEMA, AGAIN)
    engines = found.get("engines")
    if not isinstance(engines, dict):
        raise InputError(f"{file} is damaged (no engines); {AGAIN}")
    if engine not in engines:
        raise InputError(f"{folder} holds no {engine}; it has {', '.join(engines)[:300] or 'none'}; {AGAIN}")
    record: Mapping[str, Any] = engines[engine]
    validated(EngineRecord, record, file, what=what, todo=AGAIN)
    if engine not in record["sha256"]:
        raise InputError(f"{file} is damaged (no hash of {engine}); {AGAIN}")
    return record


def refuse_changed(folder: Path, record: Mapping[str, Any], trust_cache: bool = False) -> None:
    """InputError for an engine, a graph or weights that are not those of the build."""
    for name, digest in record["sha256"].items():
        file = checked_file(folder, name, f"{folder / name} is missing; {AGAIN}")
        if (file_hash(file) if trust_cache else sha256_of(file)) != digest:
            raise InputError(
                f"{file} was changed since the engine was built, or comes from another export; {AGAIN}"
            )


def refuse_elsewhere(
    engine: str, record: Mapping[str, Any], name: str, capability: str, version: str
) -> None:
    """InputError for an engine that this GPU (its name and compute capability) or this TensorRT cannot run."""
    flags, built = record["flags"], record["version"]
    same_major = built.split(".")[0] == version.split(".")[0]
    if built != version and not (
        "version-compatible" in flags and same_major and _number(built) <= _number(version)
    ):
        raise InputError(
            f"{engine} was built with {record['builder']} {built}, and {version} is here; {AGAIN}"
        )
    if "hardware-compatible" in flags and min(_number(capability), _number(record["capability"])) >= [8]:
        return
    if capability != record["capability"]:
        raise InputError(
            f"{engine} was built for compute capability {record['capability']}, and {name} has {capability}; {AGAIN}"
        )
    if record["name"] not in (None, name):
        raise InputError(f"{engine} was built for {record['name']}, and this is {name}; {AGAIN}")


def _number(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


@dataclass
class _Prepared:
    """One set of input shapes: a context, the memory of its layers, its tensors, and the CUDA graph once captured."""

    context: trt.IExecutionContext
    memory: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    graph: torch.cuda.CUDAGraph | None = field(default=None)


class TensorRtSession:
    """An engine on one CUDA device. `types` names its inputs and their types."""

    def __init__(
        self, folder: Path, engine: str, device: torch.device, graphs: bool = True, trust_cache: bool = False
    ) -> None:
        """engine: a file of engines.json. graphs: capture each set of shapes in a CUDA graph at its second run.
        trust_cache: files with the size, inode and times of their last hashing are not read again.

        Raises InputError for an engine that is not as it was built, or not for this GPU and this TensorRT;
        FastoryError where it cannot be opened.
        """
        record = engine_record(folder, engine)
        try:
            self.trt: Any = load(record["builder"])
        except MissingError as error:
            raise InputError(str(error)) from error
        self.device, self.graphs, self.file = device, graphs, folder / engine
        capability = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
        name, version = torch.cuda.get_device_name(device), str(self.trt.__version__)
        refuse_elsewhere(engine, record, name, capability, version)
        refuse_changed(folder, record, trust_cache)
        with torch.cuda.device(device):
            self._open("version-compatible" in record["flags"])
        self.prepared: OrderedDict[tuple[Any, ...], _Prepared] = OrderedDict()

    def _open(self, version_compatible: bool) -> None:
        trt: Any = self.trt
        self.logger = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(self.logger)
        # Such an engine carries the runtime of the version that built it; its hash was compared before.
        runtime.engine_host_code_allowed = version_compatible
        engine = runtime.deserialize_cuda_engine(self.file.read_bytes())
        if engine is None:
            raise FastoryError(f"{self.file} cannot be opened by TensorRT; {AGAIN}")
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        types = {name: DTYPES[engine.get_tensor_dtype(name).name] for name in names}
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.runtime, self.engine = runtime, engine
        self.types = {name: types[name] for name in inputs}
        self.outputs = {name: kind for name, kind in types.items() if name not in self.types}
        self.bounds = {name: _bounds(engine, name) for name in inputs}

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """inputs by name, in any type, on any device -> all outputs on the session's device.

        Runs on torch's current stream and does not wait for it. Raises InputError for shapes outside the profile,
        FastoryError where TensorRT fails.
        """
        ready = {name: inputs[name].to(self.device, kind).contiguous() for name, kind in self.types.items()}
        self._refuse_outside(ready)
        with torch.cuda.device(self.device):
            if not self.graphs:
                prepared, _ = self._prepare(ready)
                _bind(prepared.context, ready)
                outputs = self._allocate(prepared.context)
                _bind(prepared.context, outputs)
                self._execute(prepared.context)
                return outputs
            return self._replay(ready)

    def refit(self, graph: Path) -> None:
        """Put other weights in, those of a graph with the same nodes. For engines built with `refit`.

        Raises FastoryError where the engine does not take them.
        """
        trt: Any = self.trt
        torch.cuda.synchronize(self.device)  # weights must not change under work that is queued
        refitter = trt.Refitter(self.engine, self.logger)
        parser = trt.OnnxParserRefitter(refitter, self.logger)
        if not (parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
            said = "; ".join(parser.get_error(number).desc() for number in range(parser.num_errors))
            raise FastoryError(
                f"{self.file} does not take the weights of {graph}: {said or 'it did not say why'}"
            )

    def _refuse_outside(self, inputs: Mapping[str, Tensor]) -> None:
        for name, tensor in inputs.items():
            least, most = self.bounds[name]
            inside = len(least) == tensor.dim() and all(
                low <= size <= high for low, size, high in zip(least, tensor.shape, most, strict=True)
            )
            if not inside:
                raise InputError(
                    f"{self.file.name}, input {name}: built for shapes from {least} to {most}, got {tuple(tensor.shape)}; "
                    "draw within them, or build it for other sizes: fastory export --trt --size NAME=LEAST:MOST"
                )

    def _prepare(self, inputs: dict[str, Tensor]) -> tuple[_Prepared, bool]:
        """The context of these shapes, and whether it ran before. One context per shape: a captured graph holds its
        context's memory and shapes, and must not see others."""
        key = tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items())
        if key in self.prepared:
            self.prepared.move_to_end(key)
            return self.prepared[key], True
        if len(self.prepared) == SHAPES:
            torch.cuda.current_stream().synchronize()  # work on what is given back may be queued
            self.prepared.popitem(last=False)
        trt: Any = self.trt
        engine: trt.ICudaEngine = self.engine
        # Memory for these shapes alone; TensorRT's own would be that of the largest shapes of the profile, per context.
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise FastoryError(f"{self.file}: TensorRT refuses the shape {tuple(tensor.shape)} of {name}")
        size = context.update_device_memory_size_for_shapes()
        memory = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        context.set_device_memory(memory.data_ptr(), size)
        self.prepared[key] = _Prepared(context, memory, {}, {})
        return self.prepared[key], False

    def _allocate(self, context: trt.IExecutionContext) -> dict[str, Tensor]:
        """Outputs of the shapes that follow from the inputs'."""
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in self.outputs}
        return {
            name: torch.empty(shape, dtype=self.outputs[name], device=self.device)
            for name, shape in shapes.items()
        }

    def _replay(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first run of a shape lets TensorRT set itself up, the second one is captured, later ones are replays."""
        prepared, before = self._prepare(inputs)
        if not before:
            prepared.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            prepared.outputs = self._allocate(prepared.context)
            _bind(prepared.context, prepared.inputs)
            _bind(prepared.context, prepared.outputs)
            self._execute(prepared.context)
        else:
            for name, tensor in inputs.items():
                prepared.inputs[name].copy_(tensor)
            if prepared.graph is None:
                prepared.graph = self._captured(prepared.context)
            prepared.graph.replay()
        return {name: tensor.clone() for name, tensor in prepared.outputs.items()}

    def _captured(self, context: trt.IExecutionContext) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # torch's own capture stream belongs to the device that was current at the first capture of the process.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(self.device)):
            self._execute(context)
        return graph

    def _execute(self, context: trt.IExecutionContext) -> None:
        if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise FastoryError(f"{self.file}: TensorRT could not run the engine; its message stands above")


def _bind(context: trt.IExecutionContext, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        context.set_tensor_address(name, tensor.data_ptr())


def _bounds(engine: trt.ICudaEngine, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Least and most shape of an input in profile 0; one without a dynamic axis has its own shape for both."""
    shape = tuple(engine.get_tensor_shape(name))
    if -1 not in shape:
        return shape, shape
    least, _, most = engine.get_tensor_profile_shape(name, 0)
    return tuple(least), tuple(most)
