"""Stories with the same captions: the right ones are set against each other, and patches are what they are said to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_stories import encoded, write_paired_stories, write_stories

from fastory.checkpoints.history import History
from fastory.files import sha256_of
from fastory.tuning import loop
from fastory.tuning.batches import Batches
from fastory.tuning.loop import Stepped, tune
from fastory.tuning.objectives.paired_stories import (
    contrast,
    paired_rows,
    paired_stories_of,
    patch_loss,
    patch_shares,
    patched_noise,
    patches_of,
)
from fastory.tuning.sizes import HistorySizes, Tuning
from fastory.tuning.stories import read_examples
from fastory.tuning.training_module import TrainingModule

SMALL = HistorySizes(positions=3, local_heads=4, bottleneck=8, frame_tokens=12)
OPTIONS: dict[str, Any] = {
    "steps": 4, "batch_size": 4, "frames": 4, "rank": 2, "warmup": 1, "learning_rate": 1e-3, "save_every": 2,
    "validate_every": 0, "contrast": 2.0, "patches": 0.5, "first_frames": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_paired_stories(write_stories(tmp_path_factory.mktemp("paired")))


class Lot:
    """The stories' tables and what draws from them."""

    def __init__(self, base: Path, stories: Path, folder: Path) -> None:
        self.run = loop.begin(stories, folder / "a.safetensors", str(base), {}, Tuning(**OPTIONS), SMALL, 0,
                              "cpu", False, True)  # fmt: skip
        self.tables = encoded(self.run, folder)

    def batches(self, **options: Any) -> Batches:
        tuning = Tuning(**{**OPTIONS, **options})
        history: History = self.run.model.require_history()
        return Batches(self.tables, range(6), tuning, history, 1000, paired_stories_of(self.run.examples))

    def story_of(self, latents: torch.Tensor) -> int:
        """Whose frame these latents are."""
        row = (
            (torch.from_numpy(self.tables.arrays["latents"].copy()) - latents)
            .abs()
            .flatten(1)
            .amax(1)
            .argmin()
        )
        return int(np.searchsorted(self.tables.starts, int(row), "right")) - 1


@pytest.fixture(scope="module")
def lot(sd15_folder: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Lot:
    return Lot(sd15_folder, stories, tmp_path_factory.mktemp("lot"))


def test_paired_stories_have_the_same_captions_in_the_same_order(stories: Path) -> None:
    examples = read_examples(stories, (64, 64))
    assert paired_stories_of(examples) == [[0, 3, 4], [1, 5]]
    assert paired_stories_of([*examples, examples[2], examples[4]]) == [
        [0, 3, 4],
        [1, 5],
    ]  # copies are not paired
    other_order = [*examples[:3], type(examples[0])("x", examples[0].prompts[::-1], (), "")]
    assert paired_stories_of(other_order) == []


def test_a_pair_differs_in_its_pictures_alone(lot: Lot) -> None:
    source = lot.batches(patches=0.0)
    met = set()
    for step in range(16):
        batch = source.draw(step)
        assert batch.pairs is not None
        for one, two in batch.pairs.tolist():
            for name in ("noise", "captions", "unseen"):
                assert torch.equal(getattr(batch, name)[one], getattr(batch, name)[two]), name
            assert batch.timesteps[one] == batch.timesteps[two]
            assert batch.index[one] == batch.index[two] > 0
            assert not batch.dropped[one] and not batch.dropped[two]
            whose = lot.story_of(batch.latents[one]), lot.story_of(batch.latents[two])
            assert whose[0] != whose[1] and batch.story[one] != batch.story[two]
            met.add(tuple(sorted(whose)))
        every, kept = paired_rows(batch.story.bincount().tolist()).tolist(), batch.pairs.tolist()
        assert kept == [[a, b] for a, b in every if batch.index[a] > 0 and not batch.dropped[a]]
    assert met == {(0, 3), (0, 4), (3, 4), (1, 5)}  # and story 2, which is paired with none, never


def test_rows_of_pairs_are_the_same_frame_of_both() -> None:
    assert paired_rows([2, 2, 3, 3]).tolist() == [[0, 2], [1, 3], [4, 7], [5, 8], [6, 9]]


def test_contrast_is_what_the_history_left_unsaid() -> None:
    """Against the equation in float64; 0 where the difference is right, 1 where both predictions are the same."""
    generator = torch.Generator().manual_seed(1)
    wanted, given = (torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = torch.tensor([[0, 3], [1, 4]])
    found = contrast(given - wanted, wanted, pairs)
    told = np.concatenate([(given[a] - given[b]).numpy().ravel() for a, b in pairs.tolist()])
    true = np.concatenate([(wanted[a] - wanted[b]).numpy().ravel() for a, b in pairs.tolist()])
    assert abs(float(found) - ((told - true) ** 2).mean() / (true**2).mean()) < 1e-12
    shifted = wanted + given[:1]  # wrong, and by the same everywhere
    assert float(contrast(shifted - wanted, wanted, pairs)) < 1e-24
    assert abs(float(contrast(given[:1] - wanted, wanted, pairs)) - 1) < 1e-12
    assert float(contrast(given - wanted, wanted, pairs[:0])) == 0


def test_the_loss_is_the_noise_loss_and_the_weighted_contrast(lot: Lot) -> None:
    batch = lot.batches(patches=0.0).draw(3)
    assert batch.pairs is not None and len(batch.pairs)
    losses = []
    for weight in (0.0, 1.0, 3.0):
        module = TrainingModule(lot.run.model, lot.tables.nothing, contrast=weight)
        with torch.no_grad():
            losses.append(float(module(batch)))
    assert losses[1] > losses[0] + 0.1
    assert abs((losses[2] - losses[0]) - 3 * (losses[1] - losses[0])) < 1e-4


def test_patches_are_those_of_a_paired_story_and_the_picture_stays_what_is_wanted(lot: Lot) -> None:
    """Every patched latent lies between its own picture's and one paired story's, and no row but those asked for has any."""
    seen = 0
    for step in range(6):
        batch = lot.batches(contrast=0.0, batch_size=6).draw(step)
        plain = lot.batches(contrast=0.0, batch_size=6, patches=0.0).draw(step)
        assert batch.patches is not None and plain.patches is None
        assert torch.equal(batch.latents, plain.latents) and torch.equal(batch.noise, plain.noise)
        assert torch.equal(batch.index, plain.index)
        for row in torch.where(batch.patches.flatten(1).any(1))[0].tolist():
            assert batch.timesteps[row] >= 250 and not batch.dropped[row]
            own = lot.story_of(batch.latents[row])
            group = next(
                f for f in ((0, 3, 4), (1, 5)) if own in f
            )  # story 2 is paired with none: no patches
            assert any(between(batch.latents[row], frames(lot, one), batch.patches[row]) for one in group)
            seen += 1
    assert seen > 10


def between(own: torch.Tensor, pictures: torch.Tensor, patches: torch.Tensor) -> bool:
    """Whether the patches are shares of the way to one of the pictures, the same in all channels."""
    for picture in pictures:
        change = (picture - own).double()
        shares = (patches * change).sum(0) / change.square().sum(0).clamp(min=1e-12)
        if bool(((shares * change - patches).abs() < 1e-5).all()) and bool((shares < 1 + 1e-5).all()):
            return True
    return False


def frames(lot: Lot, story: int) -> torch.Tensor:
    starts = lot.tables.starts
    return lot.tables.take("latents", np.arange(starts[story], starts[story + 1]))


def test_the_smaller_part_is_the_other_s_or_a_pair_looks_the_same() -> None:
    rng = np.random.default_rng(4)
    latents, others = torch.randn(2, 40, 3, 12, 12, generator=torch.Generator().manual_seed(4)).unbind(0)
    seen, pairs = torch.ones(40, dtype=torch.bool), torch.arange(40).view(20, 2)
    seen[[6, 7, 38, 39]] = False
    patches = patches_of(latents, others, seen, pairs, rng)
    assert not patches[~seen].any()
    alike = 0
    for one, two in pairs[seen[::2]].tolist():
        if torch.allclose(latents[one] + patches[one], latents[two] + patches[two], atol=1e-5):
            alike += 1
            continue
        for row in (one, two):
            shares = patches[row].norm(dim=0) / (others - latents)[row].norm(dim=0)
            assert float(shares.mean()) < 0.6 and float(shares.median()) < 0.6
    assert 4 <= alike <= 14  # of 18, half


def test_shares_are_spread_over_what_changes_alone() -> None:
    """A change in one corner has patches too: the level is that of its own values, not of the whole picture's."""
    changed = torch.zeros(16, 16)
    changed[:6, :6] = 1
    rng = np.random.default_rng(9)
    covered = [float(patch_shares(changed, 1.0, rng)[:6, :6].mean()) for _ in range(200)]
    assert (
        0.4 < np.mean(covered) < 0.6 and np.quantile(covered, 0.1) < 0.25 and np.quantile(covered, 0.9) > 0.75
    )
    small = [float(patch_shares(changed, 0.4, rng)[:6, :6].mean()) for _ in range(200)]
    assert (
        0.1 < np.mean(small) < 0.35 and max(small) < 0.6
    )  # never the larger part; faded edges go a little beyond


def test_patches_are_seen_and_not_wanted(lot: Lot) -> None:
    """x_t is the patched picture under the drawn noise, and x0 of what is wanted is the picture: in float64."""
    batch = lot.batches().draw(2)
    assert batch.patches is not None
    scheduler = TrainingModule(lot.run.model, lot.tables.nothing).denoising.scheduler
    alphas = scheduler.alphas_cumprod[batch.timesteps].double()
    latents, patches, noise = batch.latents.double(), batch.patches.double(), batch.noise.double()
    other = patched_noise(noise, patches, alphas)
    a, s = alphas.sqrt().view(-1, 1, 1, 1), (1 - alphas).sqrt().view(-1, 1, 1, 1)
    seen = a * (latents + patches) + s * noise
    assert (a * latents + s * other - seen).abs().max() < 1e-12
    velocity = a * other - s * latents
    assert (a * seen - s * velocity - latents).abs().max() < 1e-12


def test_patch_loss_is_what_is_left_of_the_patches() -> None:
    """Against the equation, row by row in float64; 1 for patches that stay, 0 for an error beside them."""
    errors, patches = torch.randn(
        2, 5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6)
    ).unbind(0)
    patches[2] = 0
    rows = [(e.numpy().ravel(), d.numpy().ravel()) for e, d in zip(errors, patches, strict=True)]
    left = sum((e @ d) ** 2 / (d @ d) for e, d in rows if d.any())
    assert abs(float(patch_loss(errors, patches)) - left / sum(d @ d for _, d in rows)) < 1e-12
    assert abs(float(patch_loss(patches, patches)) - 1) < 1e-12
    beside = errors - (errors * patches).flatten(1).sum(1).view(
        -1, 1, 1, 1
    ) * patches / patches.square().flatten(1).sum(1).clamp(min=1e-12).view(-1, 1, 1, 1)
    assert float(patch_loss(beside, patches)) < 1e-24 and float(patch_loss(errors, patches * 0)) == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_error_of_the_prediction_is_one_of_the_picture(lot: Lot, prediction: str) -> None:
    """x0 of a right and of a wrong prediction, by the scheduler's own equations."""
    module = TrainingModule(lot.run.model, lot.tables.nothing)
    module.denoising.prediction = prediction
    latents, noise, wrong = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(8)).unbind(0)
    timesteps = torch.tensor([10, 300, 700, 990])
    noisy = module.denoising.scheduler.add_noise(latents, noise, timesteps)
    alphas = module.denoising.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    a, s = alphas.sqrt(), (1 - alphas).sqrt()
    right = (
        noise
        if prediction == "epsilon"
        else module.denoising.scheduler.get_velocity(latents, noise, timesteps)
    )
    pictures = [(noisy - s * p) / a if prediction == "epsilon" else a * noisy - s * p for p in (right, wrong)]
    found = module.denoising.picture_errors(wrong - right, timesteps)
    expected = pictures[1] - pictures[0]
    assert (pictures[0] - latents).abs().max() < 1e-3
    assert ((found - expected).abs() <= 1e-4 * expected.abs().amax((1, 2, 3), keepdim=True)).all()


def test_the_trained_loss_is_of_the_patched_noise(lot: Lot) -> None:
    batch = lot.batches().draw(2)
    assert batch.patches is not None
    module = TrainingModule(lot.run.model, lot.tables.nothing)
    alphas = module.denoising.scheduler.alphas_cumprod[batch.timesteps]
    same = replace(batch, noise=patched_noise(batch.noise, batch.patches, alphas), patches=None)
    with torch.no_grad():
        assert torch.equal(module(batch), module(same))
        assert not torch.equal(module(batch), module(replace(batch, patches=None)))
        module.contrast = 2.0
        assert module(batch) > module(same) + 0.01  # what is left of the patches is the third term


def test_a_first_frame_sees_no_history(lot: Lot) -> None:
    batch = lot.batches(first_frames=0.9).draw(1)
    hidden = TrainingModule(lot.run.model, lot.tables.nothing).context(batch).padding
    text = batch.captions.shape[1]
    assert (batch.index == 0).float().mean() > 0.7
    for row, index in enumerate(batch.index.tolist()):
        assert bool(hidden[row, text:].all()) == (index == 0)


def test_a_pair_imitates_with_each_other_s_references(lot: Lot, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another story's references would change is, in a pair, what the other one's would."""
    shown: list[torch.Tensor] = []

    class Asked(Exception):
        pass

    class Listening:
        def target(self, *inputs: torch.Tensor) -> None:
            shown.extend(inputs[-2:])
            raise Asked

    batch = lot.batches(first_frames=0.0, dropout=0.0).draw(4)
    references = torch.zeros(*batch.mask.shape[:2], 4, lot.run.model.cross_attention_dim)
    module = TrainingModule(lot.run.model, lot.tables.nothing)
    monkeypatch.setattr(module, "teacher", Listening())
    for pairs in (batch.pairs, None):
        with pytest.raises(Asked):
            module(replace(batch, references=references, patches=None, pairs=pairs))
    before = batch.mask.shape[1]
    for row, (story, index) in enumerate(zip(batch.story.tolist(), batch.index.tolist(), strict=True)):
        if index == 0:
            continue
        sees = [{int(i) // before for i in torch.where(mask[row])[0]} for mask in shown]
        assert sees == [{story}, {story ^ 1}, {story}, {(story + 1) % 4}]


def run(base: Path, stories: Path, output: Path) -> Iterator[Any]:
    return tune(stories, output, model=str(base), tuning=Tuning(**OPTIONS), sizes=SMALL, device="cpu")


def test_a_killed_tuning_of_paired_stories_ends_in_the_same_bytes(
    sd15_folder: Path, stories: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole.safetensors", tmp_path / "adapter.safetensors"
    list(run(sd15_folder, stories, whole))
    events = run(sd15_folder, stories, output)
    for event in events:
        if isinstance(event, Stepped) and event.step == 3:
            break
    events.close()  # type: ignore[attr-defined]
    list(run(sd15_folder, stories, output))
    assert sha256_of(output) == sha256_of(whole)
