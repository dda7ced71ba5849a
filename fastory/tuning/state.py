"""What a tuning needs to go on: weights, averages, the optimizer's moments and the step, in safetensors and JSON.

<output>.tuning/
  state.json                what was asked, the step, and the name of the file beside it
  state-00000100.safetensors
  tables-<digest>           latents, captions and squares of the stories
  tensorboard               losses and pictures
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastory.checkpoints.writing import usual_mode
from fastory.errors import FastoryError, InputError

SCHEMA = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """The trained tensors with their averages and their optimizer (AdamW), after `step` steps."""

    def __init__(self, named: Mapping[str, nn.Parameter], learning_rate: float, ema_decay: float) -> None:
        self.named = dict(named)
        self.optimizer = torch.optim.AdamW(self.named.values(), learning_rate, weight_decay=0.01)
        self.average = EMAModel(self.named.values(), decay=ema_decay, foreach=True)
        self.step = 0

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, on the CPU."""
        state = self.optimizer.state
        tensors = {f"weight.{name}": p.detach() for name, p in self.named.items()}
        tensors |= dict(zip((f"average.{n}" for n in self.named), self.average.shadow_params, strict=True))
        tensors |= {f"{m}.{name}": state[p][m] for name, p in self.named.items() for m in MOMENTS}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """The state that `tensors` gave after `step` steps."""
        for (name, p), average in zip(self.named.items(), self.average.shadow_params, strict=True):
            p.copy_(tensors[f"weight.{name}"])
            average.copy_(tensors[f"average.{name}"])
        moments = [
            {"step": torch.tensor(float(step)), **{m: tensors[f"{m}.{name}"] for m in MOMENTS}}
            for name in self.named
        ]
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(enumerate(moments)), "param_groups": groups})
        self.average.optimization_step = self.step = step

    @contextlib.contextmanager
    def averaged(self) -> Any:
        """The averages in place of the weights, within a `with` block."""
        self.average.store(self.named.values())
        self.average.copy_to(self.named.values())
        try:
            yield
        finally:
            self.average.restore(self.named.values())


class Progress:
    """The folder beside the output in which a tuning is kept."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """identity: what was asked, of JSON's types; another tuning is never gone on with."""
        self.folder, self.identity = folder, json.loads(json.dumps(identity))

    def read(self) -> dict[str, Any] | None:
        """state.json, or None for a new tuning. Raises InputError for that of another tuning, and a damaged one."""
        path = self.folder / "state.json"
        if not path.exists():
            return None
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            schema, there = state["schema"], state["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}); --overwrite tunes anew") from error
        if schema != SCHEMA:
            raise InputError(
                f"{path} has schema {schema}, this version reads {SCHEMA}; --overwrite tunes anew"
            )
        names = sorted({*there, *self.identity})
        if other := [name for name in names if there.get(name) != self.identity.get(name)]:
            said = "; ".join(f"{n}: {there.get(n)!r} there, {self.identity.get(n)!r} here" for n in other)
            raise InputError(
                f"{self.folder} holds another tuning. What differs: {said}. Choose another --output, or --overwrite"
            )
        return dict(state)

    def resume(self, learner: Learner, state: Mapping[str, Any]) -> None:
        """Take up the state that `read` found."""
        path = self.folder / state["file"]
        try:
            learner.restore(load_file(path), state["step"])
        except Exception as error:  # safetensors' own error, a missing key, another shape
            raise InputError(f"{path} is damaged ({error}); --overwrite tunes anew") from error

    def save(self, learner: Learner) -> None:
        """Write the tensors, then the JSON that names them, then drop older ones: a kill leaves the old or the new state."""
        name = f"state-{learner.step:08d}.safetensors"
        write_tensors(self.folder / name, learner.tensors(), {"format": "pt"})
        self._write({"step": learner.step, "file": name})
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def finish(self, step: int, digest: str) -> None:
        """Record that the adapter was written; its state is not needed any more."""
        self._write({"step": step, "adapter": digest})
        for old in self.folder.glob("state-*.safetensors"):
            old.unlink()

    def _write(self, values: Mapping[str, Any]) -> None:
        text = json.dumps({"schema": SCHEMA, "identity": self.identity, **values}, indent=1)
        replace_file(self.folder / "state.json", lambda path: path.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all, with the rights of any new file."""

    def write(partial: Path) -> None:
        save_file(dict(tensors), partial, metadata)
        partial.chmod(usual_mode(partial.parent))

    replace_file(path, write)


def replace_file(path: Path, write: Any) -> None:
    """Write beside the place, sync, rename. Raises FastoryError where the disk refuses."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise FastoryError(
            f"{path} could not be written: {error.strerror or error}. The same command goes on from the last checkpoint."
        ) from error
