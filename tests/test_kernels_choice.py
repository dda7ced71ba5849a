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
    program = CALL + "from fastory.kernels.choice import describe; print(describe()[0].others['triton'])"
    result = run(program, PYTHONPATH=str(tmp_path))
    assert "Triton is not installed" in result.stdout, result.stderr


def test_old_device_falls_back_and_says_so_once() -> None:
    """The choice for a CUDA device on which Triton cannot run: one warning, the SDPA path, the reason kept."""
    program = """
import warnings, torch
from fastory.kernels import choice
choice._why_not_triton = lambda device: "wanted compute capability 8.0 or above, got 7.5"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    choices = [choice.choose(torch.device("cuda:0")) for _ in range(3)]
print(len(caught), caught[0].message, choices[0].implementation, choices[0].reason)
"""
    out = run(program).stdout
    assert out.startswith("1 the Triton kernels do not run on cuda:0: wanted compute capability 8.0"), out
    assert "sdpa fallback: wanted compute capability 8.0" in out


def test_description_gives_every_other_implementation_a_reason() -> None:
    program = "from fastory.kernels.choice import describe, NAMES; c = describe()[0]\n"
    program += "print(c.device, {c.implementation, *c.others} == set(NAMES[1:]), all(c.others.values()))"
    assert run(program).stdout.split() == ["cpu", "True", "True"]
    forced = run(
        "from fastory.kernels.choice import describe; print(describe()[0])", FASTORY_KERNELS="triton"
    )
    assert "implementation='none'" in forced.stdout
    assert "cannot run on cpu" in forced.stdout
