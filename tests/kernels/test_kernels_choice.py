"""FASTORY_KERNELS chooses, says why, and falls back once and loudly: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CALL = """
import torch
from fastory.kernels.banded import banded_causal_attention
from fastory.kernels.grca import grca
torch.manual_seed(0)
x = torch.randn(2, 5, 2, 8)
out = grca(x, x, x, x[:1, :4], x[:1, :4], torch.tensor(0.3))
banded_causal_attention(x, x, x, group_size=2, window=1)
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("FASTORY_", "TRITON_"))
    }
    return subprocess.run(
        [sys.executable, "-c", program], env=clean | environment, capture_output=True, text=True, check=False
    )


def test_every_choice_that_runs_here_gives_the_same_numbers() -> None:
    program = CALL + "print(out.flatten().tolist())"
    environments = [
        {},
        {"FASTORY_KERNELS": "sdpa"},
        {"FASTORY_KERNELS": "reference"},
        {"FASTORY_KERNELS": "triton", "TRITON_INTERPRET": "1"},
    ]
    numbers = [eval(run(program, **environment).stdout, {}) for environment in environments]
    assert numbers[0] == numbers[1]
    for other in numbers[2:]:
        assert other == pytest.approx(numbers[0], abs=1e-6)
        assert other != numbers[0], "another implementation must have run"


def test_forced_choice_that_cannot_run_is_an_error_that_says_why() -> None:
    result = run(CALL, FASTORY_KERNELS="triton")
    assert "FASTORY_KERNELS=triton cannot run on cpu: Triton compiles for CUDA devices" in result.stderr
    result = run(CALL, FASTORY_KERNELS="flash")
    assert (
        "FASTORY_KERNELS: wanted one of auto, reference, sdpa, xformers, triton, got 'flash'" in result.stderr
    )


def test_without_triton_the_operators_still_work(tmp_path: Path) -> None:
    """A machine without Triton: the import is refused, as where no wheel exists."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.split('.')[0] == 'triton' else find(name, *a)\n"
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *a):\n"
        "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    program = CALL + "from fastory.kernels.backends import describe; print(describe()[0].others['triton'])"
    result = run(program, PYTHONPATH=str(tmp_path))
    assert "Triton is not installed" in result.stdout, result.stderr


def test_old_device_falls_back_and_says_so_once() -> None:
    """The choice for a CUDA device on which Triton cannot run: one warning, the SDPA path, the reason kept."""
    program = """
import dataclasses, warnings, torch
from fastory.kernels import backends
old = lambda device: "wanted compute capability 8.0 or above, got 7.5"
backends.register(dataclasses.replace(backends.BACKENDS["triton"], why_not=old))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    choices = [backends.choose(torch.device("cuda:0")) for _ in range(3)]
print(len(caught), caught[0].message, choices[0].implementation, choices[0].reason)
"""
    out = run(program).stdout
    assert out.startswith("1 the Triton kernels do not run on cuda:0: wanted compute capability 8.0"), out
    assert "sdpa fallback: wanted compute capability 8.0" in out


def test_description_gives_every_other_implementation_a_reason() -> None:
    program = "from fastory.kernels.backends import describe, BACKENDS; c = describe()[0]\n"
    program += "print(c.device, {c.implementation, *c.others} == set(BACKENDS), all(c.others.values()))"
    assert run(program).stdout.split() == ["cpu", "True", "True"]
    forced = run(
        "from fastory.kernels.backends import describe; print(describe()[0])", FASTORY_KERNELS="triton"
    )
    assert "implementation='none'" in forced.stdout
    assert "cannot run on cpu" in forced.stdout


PLUGGED = """
import torch
from fastory.kernels import backends
from fastory.kernels.grca import grca
from fastory.kernels.banded import banded_causal_attention
sdpa = backends.BACKENDS["sdpa"]
twice = {name: lambda *a, f=f, **k: 2 * f(*a, **k) for name, f in sdpa.run.items()}
never = lambda device: "it needs a lucky day" if device.type == "cuda" else None
backends.register(backends.Backend("twice", never, lambda q: q.shape[-1] == 8, twice))
q, k = torch.randn(2, 5, 2, 8), torch.randn(2, 4, 2, 8)
def both(q, k, **backend):
    yield grca(q, k, k, k, k, torch.tensor(0.5), **backend)
    yield banded_causal_attention(q, k, k, group_size=1, window=0, query_group=3, query_group_size=0, **backend)
"""


def test_a_backend_is_plugged_in_by_one_registration() -> None:
    """Named in the call, or as the default of the process; refused where it does not take the call."""
    by_name = run(
        PLUGGED
        + "print([torch.equal(a, 2 * b) for a, b in zip(both(q, k, backend='twice'), both(q, k, backend='sdpa'))])"
    )
    assert by_name.stdout.split("\n")[0] == "[True, True]", by_name.stderr
    default = run(PLUGGED + "print(backends.choose(q.device).implementation)", FASTORY_KERNELS="twice")
    assert default.stdout.strip() == "twice", default.stderr
    wide = run(PLUGGED + "list(both(q.repeat(1, 1, 1, 2), k.repeat(1, 1, 1, 2), backend='twice'))")
    assert "backend twice does not take a query of (2, 5, 2, 16)" in wide.stderr
    unknown = run(PLUGGED + "list(both(q, k, backend='flash'))")
    assert "backend: wanted one of reference, sdpa, xformers, triton, twice, got 'flash'" in unknown.stderr
    triton = run(PLUGGED + "list(both(q, k, backend='triton'))")
    assert "backend triton cannot run on cpu: Triton compiles for CUDA devices" in triton.stderr
