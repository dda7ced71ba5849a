"""A component on a runtime: tensors by name in, tensors by name out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastory import threads
from fastory.errors import FastoryError, InputError
from fastory.runtime import is_out_of_memory


class Session(Protocol):
    """What EngineModel draws with. `inputs` names the inputs and their types."""

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """All outputs, on the device of the inputs."""


def onnxruntime() -> Any:
    """The package. Raises InputError where it is not installed."""
    try:
        import onnxruntime as runtime
    except ImportError:
        raise InputError(
            "ONNX Runtime is not installed, and exported graphs run on it; run: pip install 'fastory[onnx]' "
            "(for a GPU: pip install onnxruntime-gpu)"
        ) from None
    return runtime


class OrtSession:
    """A graph on ONNX Runtime. Threads are torch's, so that a run folder's number of threads counts here as well."""

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        """device: cpu unless given; on cuda the graph runs on ONNX Runtime's CUDA provider.

        Raises InputError where that provider is not there, FastoryError for a graph that cannot be loaded.
        """
        runtime = onnxruntime()
        self.device = device or torch.device("cpu")
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device.type == "cuda":
            if "CUDAExecutionProvider" not in runtime.get_available_providers():
                raise InputError(
                    "this ONNX Runtime has no CUDA provider; run: pip install onnxruntime-gpu, or give --device cpu"
                )
            providers = [("CUDAExecutionProvider", {"device_id": self.device.index or 0}), *providers]
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        if threads.wait_is_passive():
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's own classes, which share no base
            raise FastoryError(f"{path} cannot be loaded by ONNX Runtime: {_one_line(error)}") from error
        self.path = path
        self.outputs = [output.name for output in self.session.get_outputs()]
        types = {entry.name: entry.type for entry in self.session.get_inputs()}
        if unknown := [kind for kind in types.values() if kind not in _TORCH]:
            raise InputError(f"{path} takes a {unknown[0]}; wanted a graph that `fastory export` wrote")
        self.types = {name: _TORCH[kind] for name, kind in types.items()}

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """inputs by name, in any floating type -> outputs by name."""
        ready = {name: inputs[name].to(kind).contiguous() for name, kind in self.types.items()}
        if self.device.type == "cuda":
            return self._bound(ready)
        try:
            outputs = self.session.run(self.outputs, {name: tensor.numpy() for name, tensor in ready.items()})
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise FastoryError(f"{self.path} cannot be run by ONNX Runtime: {_one_line(error)}") from error
        return {name: torch.from_numpy(tensor) for name, tensor in zip(self.outputs, outputs, strict=True)}

    def _bound(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the GPU, without a copy: inputs are read where they are, outputs are handed over by DLPack."""
        binding = self.session.io_binding()
        number = self.device.index or 0
        for name, tensor in inputs.items():
            kind = _NUMPY[tensor.dtype]
            binding.bind_input(name, "cuda", number, kind, tuple(tensor.shape), tensor.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, "cuda", number)
        torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(binding)
        return {
            name: torch.from_dlpack(tensor)
            for name, tensor in zip(self.outputs, binding.get_outputs(), strict=True)
        }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_TORCH = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(bool)": torch.bool,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
}
_NUMPY = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bool: np.bool_,
    torch.int32: np.int32,
    torch.int64: np.int64,
}
