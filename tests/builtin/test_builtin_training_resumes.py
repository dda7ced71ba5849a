"""Training on a CPU takes hours and is interrupted: it must go on to the very weights it would have reached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastory.builtin.training.autoencoder import VaeObjective
from fastory.builtin.training.loop import Batch, Plan, learning_rate_factor, stream, train
from fastory.builtin.training.networks import Sizes

TINY = Sizes(vae=(8, 8, 8, 8))


class Killed(Exception):
    """Stands for the process's end."""


class Interrupted(VaeObjective):
    """Ends at its third batch."""

    batches = 0

    def batch(self, rng: np.random.Generator, progress: float) -> Batch:
        self.batches += 1
        if self.batches == 3:
            raise Killed
        return super().batch(rng, progress)


class Finished(VaeObjective):
    """Has nothing left to do."""

    def batch(self, rng: np.random.Generator, progress: float) -> Batch:
        raise AssertionError("a finished stage drew another batch")


class Broken(VaeObjective):
    """A loss that is not finite."""

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch) * float("nan")


def run(objective_class: type[VaeObjective], plan: Plan) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return train(objective_class(TINY, pictures=1), plan).state_dict()


def test_an_interrupted_stage_reaches_the_same_weights(tmp_path: Path) -> None:
    whole = run(VaeObjective, Plan(tmp_path / "whole", steps=4))
    broken = Plan(tmp_path / "broken", steps=4, save_every=0.0)
    with pytest.raises(Killed):
        run(Interrupted, broken)
    resumed = run(VaeObjective, broken)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    first, second = (load_file(tmp_path / n / "state-vae/state.safetensors") for n in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    plan = Plan(tmp_path, steps=2)
    run(VaeObjective, plan)
    (tmp_path / "state-vae").rename(tmp_path / "state-vae.new")
    run(Finished, plan)
    assert (tmp_path / "state-vae/state.json").read_text().startswith('{"schema": 1, "step": 2')


def test_another_seed_trains_on_other_pictures(tmp_path: Path) -> None:
    one = run(VaeObjective, Plan(tmp_path / "one", steps=1, seed=1))
    two = run(VaeObjective, Plan(tmp_path / "two", steps=1, seed=2))
    assert not all(torch.equal(one[name], two[name]) for name in one)


def test_processes_draw_different_batches() -> None:
    draws = {stream("vae", 0, rank, step).integers(2**60) for rank in range(4) for step in range(50)}
    assert len(draws) == 200


def test_a_loss_that_is_not_finite_ends_training(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="stage vae"):
        run(Broken, Plan(tmp_path, steps=2, log_every=1))


def test_learning_rate_warms_up_and_ends_low() -> None:
    assert learning_rate_factor(0, 0.0) < 0.01
    assert learning_rate_factor(10_000, 0.3) == 1.0
    assert learning_rate_factor(10_000, 0.999) == pytest.approx(0.02)
