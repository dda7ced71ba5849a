"""How far an exported component is from torch: both against the same computation in float64."""

from __future__ import annotations

import copy
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastory import files
from fastory.errors import FastoryError
from fastory.export.choices import Groups
from fastory.export.component import Component
from fastory.export.graphs import components
from fastory.models.onnx_session import OrtSession
from fastory.models.torch_model import StoryModel

SEED = 20241
# Two computations of the same terms in another order: the export may be this many times as far from float64 as torch
# is, and as many roundings of the largest value.
FACTOR = 4.0


@dataclass(frozen=True)
class Parity:
    """One component at one set of sizes: the largest difference of any output, and what float64 allows.

    max_abs, relative: of the export against torch in the same type, relative to the largest value. error: of the export
    against float64; allowed: the most it may be.
    """

    component: str
    sizes: Mapping[str, int]
    max_abs: float
    relative: float
    error: float
    allowed: float

    @property
    def good(self) -> bool:
        """Whether the export computes what torch computes. A value that is not finite never is."""
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """Of what is allowed; infinite for a value that is no number."""
        return self.error / self.allowed if self.error == self.error else float("inf")


def measure(component: Component, session: OrtSession) -> list[Parity]:
    """All sizes of Component.checks."""
    with torch.no_grad():
        exact = copy.deepcopy(component.module).double()
        cases = []
        for sizes in component.checks:
            inputs = component.sample(sizes, SEED)
            wide = [value.double() if value.is_floating_point() else value for value in inputs.values()]
            cases.append((sizes, inputs, _tuple(exact(*wide)), _tuple(component.module(*inputs.values()))))
        del exact
    return [_compare(component, session, *case) for case in cases]


def _compare(
    component: Component,
    session: OrtSession,
    sizes: Mapping[str, int],
    inputs: dict[str, Tensor],
    truth: Sequence[Tensor],
    own: Sequence[Tensor],
) -> Parity:
    """The worst output."""
    outputs = session.run(inputs)
    found: list[Parity] = []
    for name, exact, ours in zip(component.outputs, truth, own, strict=True):
        got = outputs[name].double()
        largest = float(exact.abs().max())
        own_error, error = _distance(ours.double(), exact), _distance(got, exact)
        allowed = FACTOR * (own_error + torch.finfo(component.dtype).eps * largest)
        apart = _distance(got, ours.double())
        found.append(Parity(component.name, dict(sizes), apart, apart / largest, error, allowed))
    return max(found, key=lambda parity: parity.share)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def measure_folder(folder: Path, model: StoryModel, groups: Groups) -> list[Parity]:
    """Every component whose graph lies in `folder`."""
    found: list[Parity] = []
    for component in components(model, groups):
        found += measure(component, OrtSession(folder / f"{component.name}.onnx"))
    return found


def measure_apart(folder: Path, options: Mapping[str, Any], groups: Groups) -> list[Parity]:
    """The same in a process of its own, which opens the model again: a large one does not fit beside itself.

    options: what StoryModel.open takes. Raises FastoryError where the process is killed, as for memory.
    """
    report = folder / ".parity.json"
    process = multiprocessing.get_context("spawn").Process(
        target=_measure_and_write, args=(folder, dict(options), groups, report)
    )
    process.start()
    process.join()
    if process.exitcode != 0 or not report.exists():
        raise FastoryError(
            f"the process that compares the export with torch ended with code {process.exitcode}, perhaps for lack of "
            "memory; close other programs, or export on a machine with more memory"
        )
    found = [Parity(**parity) for parity in json.loads(report.read_text(encoding="utf-8"))]
    files.remove(report)
    return found


def _measure_and_write(folder: Path, options: Mapping[str, Any], groups: Groups, report: Path) -> None:
    model = StoryModel.open(**options, device="cpu")
    found = measure_folder(folder, model, groups)
    files.atomic_write(report, json.dumps([asdict(parity) for parity in found]).encode())


def refuse_apart(found: Sequence[Parity]) -> None:
    """FastoryError for the worst of what does not agree."""
    bad = [parity for parity in found if not parity.good]
    if not bad:
        return
    worst = max(bad, key=lambda parity: parity.share)
    raise FastoryError(
        f"the exported {worst.component} does not compute what torch computes: at {dict(worst.sizes)} it is {worst.error:.3g} "
        f"from float64, and {worst.allowed:.3g} is allowed ({len(bad)} of {len(found)} comparisons failed). Nothing was "
        "written. Please report this with `fastory doctor`'s output."
    )
