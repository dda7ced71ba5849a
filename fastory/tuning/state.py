"""What a tuning needs to go on: weights, averages, the optimizer's moments and the step, in safetensors and JSON.

<output>.tuning/
  state.json                what was asked, the step, the name of the file beside it; written first: the folder is a tuning's
  state-00000100.safetensors
  tables-<digest>           latents, captions and squares of the stories
  tensorboard               losses and pictures
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastory import files
from fastory.documents import read_json, validated
from fastory.errors import InputError

SCHEMA = 1
STATE = "state.json"
WHAT, HINT = "the state of a tuning", "choose another --output"
KEPT = "The last checkpoint is kept."
# What a tuning needs while it runs, and what a kill leaves of it. Nothing else is ever removed.
WORKING = re.compile(
    r"(state-[0-9]{8}\.safetensors|tables-[0-9a-f]{16}|\.state-[0-9]{8}\.safetensors\.partial|\.state\.json\.partial"
    r"|\.tables-[0-9a-f]{16}\.partial)"
)
EVENTS = re.compile(r"events\.out\.tfevents\..+")  # TensorBoard's
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


class _State(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    schema_: Literal[1] = Field(alias="schema")
    identity: dict[str, Any]
    step: Annotated[int, Field(ge=0)]
    file: Annotated[str, StringConstraints(pattern=r"^state-[0-9]{8}\.safetensors$")] | None = None
    adapter: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None


class Progress:
    """The folder beside the output in which a tuning is kept."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """identity: what was asked, of JSON's types; another tuning is never gone on with."""
        self.folder, self.identity = folder, json.loads(json.dumps(identity))

    def check(self, overwrite: bool) -> bool:
        """Whether the folder is a tuning's. Raises InputError for one of other files, and for another tuning's.

        overwrite: another tuning's is accepted.
        """
        if not self.folder.exists():
            return False
        names = sorted(entry.name for entry in self.folder.iterdir()) if self.folder.is_dir() else ["a file"]
        if STATE in names:
            state = self._read()
            if not overwrite:
                self._check_identity(state)
            return True
        ours = {files.LOCK, files.partial_of(Path(STATE)).name}
        if other := [name for name in names if name not in ours]:
            raise InputError(
                f"{self.folder} holds {other[0]} and no {STATE} of a tuning; move it away, or {HINT}"
            )
        return False

    def read(self) -> dict[str, Any] | None:
        """state.json, or None for a new tuning. Raises InputError for that of another tuning, and a damaged one."""
        if not (self.folder / STATE).exists():
            return None
        state = self._read()
        self._check_identity(state)
        return state.model_dump(by_alias=True, exclude_none=True)

    def _read(self) -> _State:
        path, todo = self.folder / STATE, f"move {self.folder} away, or {HINT}"
        found = read_json(path, what=WHAT, todo=todo)
        schema = found.get("schema") if isinstance(found, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise InputError(f"{path} has schema {schema}, this version reads up to {SCHEMA}; {todo}")
        return validated(_State, found, path, what=WHAT, todo=todo)

    def _check_identity(self, state: _State) -> None:
        there = state.identity
        names = sorted({*there, *self.identity})
        if other := [name for name in names if there.get(name) != self.identity.get(name)]:
            said = "; ".join(f"{n}: {there.get(n)!r} there, {self.identity.get(n)!r} here" for n in other)
            raise InputError(
                f"{self.folder} holds another tuning. What differs: {said}. Choose another --output, or --overwrite"
            )

    def resume(self, learner: Learner, state: Mapping[str, Any]) -> None:
        """Take up the state that `read` found."""
        path = self.folder / state["file"]
        try:
            learner.restore(load_file(path), state["step"])
        except Exception as error:  # safetensors' own error, a missing key, another shape
            raise InputError(f"{path} is damaged ({error}); --overwrite tunes anew") from error

    def begin(self, anew: bool) -> None:
        """Write the first state.json, which says whose folder it is; `anew` removes what another tuning left."""
        if anew or not (self.folder / STATE).exists():
            self._write({"step": 0})
        if anew:
            self.clear()
            self._clear_events()

    def save(self, learner: Learner) -> None:
        """Write the tensors, then the JSON that names them, then drop older ones: a kill leaves the old or the new state."""
        name = f"state-{learner.step:08d}.safetensors"
        write_tensors(self.folder / name, learner.tensors(), {"format": "pt"})
        self._write({"step": learner.step, "file": name})
        for old in sorted(self.folder.glob("state-*.safetensors")):
            if WORKING.fullmatch(old.name) and old.name != name:
                files.remove(old)

    def finish(self, step: int, digest: str) -> None:
        """Record that the adapter was written; nothing but state.json is needed any more."""
        self._write({"step": step, "adapter": digest})
        self.clear()

    def clear(self) -> None:
        """Remove states and tables, and what a kill left of them."""
        for entry in sorted(self.folder.iterdir()):
            if WORKING.fullmatch(entry.name):
                files.remove(entry)

    def _clear_events(self) -> None:
        folder = self.folder / "tensorboard"
        if folder.is_symlink() or not folder.is_dir():
            return
        for entry in sorted(folder.iterdir()):
            if EVENTS.fullmatch(entry.name):
                files.remove(entry)

    def _write(self, values: Mapping[str, Any]) -> None:
        text = json.dumps({"schema": SCHEMA, "identity": self.identity, **values}, indent=1)
        files.atomic_write(self.folder / STATE, text.encode(), kept=KEPT)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    """A safetensors file, whole or not at all, with the rights of any new file. Returns its sha256 (hex)."""
    return files.atomic_write(path, lambda partial: save_file(dict(tensors), partial, metadata), kept=KEPT)


def is_adapter(path: Path) -> bool:
    """Whether a file is one that a tuning wrote: its metadata holds the sizes of a history encoder."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return "history" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
