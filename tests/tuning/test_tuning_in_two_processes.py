"""A tuning of two processes takes the steps of one that sees both batches: no process's gradient is lost or counted twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_stories import encoded, write_stories

from fastory.tuning import loop
from fastory.tuning.sizes import HistorySizes, Tuning
from fastory.tuning.state import Learner
from fastory.tuning.trainable import adapter_file
from fastory.tuning.training_module import TrainingModule

FLAGS = (
    "--steps=4 --batch-size=2 --frames=4 --rank=2 --self-attention --warmup=1 --learning-rate=1e-3 --imitate=2 "
    "--validate-every=0 --positions=3 --local-heads=4 --bottleneck=8 --frame-tokens=12 --device=cpu --offline"
)
TUNING = Tuning(
    steps=4, batch_size=2, frames=4, rank=2, self_attention=True, warmup=1, learning_rate=1e-3, imitate=2
)
SMALL = HistorySizes(positions=3, local_heads=4, bottleneck=8, frame_tokens=12)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("examples"))


def one_process(base: Path, adapter: Path, stories: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The same steps, the loss being the mean over the batches of process 0 and of process 1."""
    run = loop.begin(
        stories, folder / "one.safetensors", str(base), {"ip_adapter": str(adapter)}, TUNING, SMALL, 0, "cpu", False, True
    )  # fmt: skip
    tables = encoded(run, folder, references=True)
    module = TrainingModule(run.model, tables.nothing, run.teacher)
    learner = Learner(module.learning(), TUNING.learning_rate, TUNING.ema_decay)
    source = loop.batches_of(run, module, tables, range(3), run.tuning)
    for step in range(TUNING.steps):
        for group in learner.optimizer.param_groups:
            group["lr"] = TUNING.learning_rate * loop.learning_rate_factor(step, TUNING)
        learner.optimizer.zero_grad()
        for process in (0, 1):
            (module(source.draw(step, process, references=step < 2)) / 2).backward()
        for parameter in learner.named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(list(learner.named.values()), TUNING.clip)
        learner.optimizer.step()
        learner.average.step(learner.named.values())
        learner.step += 1
    with learner.averaged():
        return adapter_file(module, ())[0]


def test_two_processes_are_one_with_both_batches(
    sd15_folder: Path, sd15_adapter_base: Path, stories: Path, tmp_path: Path
) -> None:
    output = tmp_path / "two.safetensors"
    script = tmp_path / "run.py"
    script.write_text("from fastory.cli import app; app()")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    asked = ["tune", str(stories), f"--model={sd15_folder}", f"--ip-adapter={sd15_adapter_base}"]
    done = subprocess.run(
        [*launch, *asked, *FLAGS.split(), f"--output={output}", "--json"],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [event["step"] for event in told if event["event"] == "Stepped"] == [
        1,
        2,
        3,
        4,
    ]  # one process tells
    assert len(list((tmp_path / "two.tuning" / "tensorboard").iterdir())) == 1  # one process reports
    expected = one_process(sd15_folder, sd15_adapter_base, stories, tmp_path)
    got = load_file(output)
    assert got.keys() == expected.keys()
    # Adam's first steps are the learning rate times the gradient's sign: a sign that rounding turns is the most there is,
    # 4 steps of 1e-3 either way. So few may differ, and one lost process makes most of them.
    far = sum(int(((got[n] - expected[n]).abs() > 1e-4).sum()) for n in got)
    assert far < 0.01 * sum(tensor.numel() for tensor in got.values())
