"""What drawing costs: UNet calls, seconds, and the most memory, of one story by one method.

Calls are counted picture by picture and stand on the disk before the picture does, so an interrupted run has lost none; the
seconds are those that the run folder's manifest has. A call with two rows, conditional and unconditional, counts one.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastory import files
from fastory.documents import read_json
from fastory.events import BatchHalved, Event, FrameDrawn, StepDone
from fastory.runs.manifest import NAME, read_manifest

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Memory:
    """The most memory in use since it was made: PyTorch's allocator on CUDA, else this whole process, where Linux says so."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.of = device, ""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.of = "CUDA allocator"
            return
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")  # the peak of resident memory begins anew: proc(5)
            self.of = "process"

    def peak(self) -> int | None:
        """Bytes; None where it cannot be told."""
        if self.of == "CUDA allocator":
            return int(torch.cuda.max_memory_allocated(self.device))
        if not self.of:
            return None
        found = re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None


@dataclass
class Cost:
    """calls: of the UNet, by round and frame. peak: bytes, None where it was not measured; memory: of what."""

    path: Path
    calls: dict[int, dict[int, int]] = field(default_factory=dict)
    peak: int | None = None
    memory: str = ""

    @classmethod
    def read(cls, path: Path) -> Cost:
        """What was recorded at `path`; nothing where there is no file."""
        if not path.exists():
            return cls(path)
        data = read_json(path, what="the costs of a run", todo="remove it, and its run folder, to draw again")
        calls = {int(k): {int(i): n for i, n in frames.items()} for k, frames in data["calls"].items()}
        return cls(path, calls, data["peak"], data["memory"])

    def counted(self, events: Iterable[Event], device: torch.device) -> Iterator[Event]:
        """Passes the events of one story on, and records the calls of each micro-batch after its last step."""
        memory, pending = Memory(device), Counter[int]()
        for event in events:
            match event:
                case StepDone():
                    pending.update(event.frames)
                    if event.step == event.steps:  # of a draft, too: the frame itself goes on counting
                        calls = self.calls.setdefault(event.round, {})
                        calls.update({frame: pending[frame] for frame in event.frames})
                        self._look(memory)
                        self.save()
                case FrameDrawn():
                    del pending[event.frame]
                case BatchHalved():
                    pending.clear()
                    if event.frame is None:  # the whole round is drawn again
                        self.calls.pop(event.round, None)
            yield event

    def _look(self, memory: Memory) -> None:
        self.peak = max(filter(None, (self.peak, memory.peak())), default=None)
        self.memory = memory.of

    def save(self) -> None:
        """Write the file."""
        data: dict[str, Any] = {"schema": 1, "calls": self.calls, "peak": self.peak, "memory": self.memory}
        files.atomic_write(self.path, json.dumps(data).encode())

    def calls_a_frame(
        self, folder: Path, frames: int, last: int, initial: Container[int] = ()
    ) -> float | None:
        """Up to and with round `last`, mean over frames; None where not every picture's calls were counted.

        folder: the run folder, which says of pictures that they are of an earlier round and took none. initial: rounds whose
        pictures were not drawn.
        """
        total = 0
        for k in range(last + 1):
            if k in initial:
                continue
            stayed = {
                i
                for i, record in _pictures(folder).get(str(k), {}).items()
                if record.get("converged") is not None
            }
            calls = {**dict.fromkeys(map(int, stayed), 0), **self.calls.get(k, {})}
            if len(calls) < frames:
                return None
            total += sum(calls.values())
        return total / frames


def seconds_of(folder: Path, last: int) -> float:
    """What the pictures of a run folder took up to and with round `last`, in seconds."""
    rounds = [found for k, found in _pictures(folder).items() if int(k) <= last]
    return float(sum(record["seconds"] for found in rounds for record in found.values()))


def _pictures(folder: Path) -> dict[str, dict[str, Any]]:
    return read_manifest(folder / NAME)["pictures"]
