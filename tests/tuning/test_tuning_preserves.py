"""`--preserve`: what has no history is held to the base, the untuned one, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from small_stories import encoded, write_paired_stories, write_stories

from fastory.tuning import loop
from fastory.tuning.batch import Batch
from fastory.tuning.batches import Batches
from fastory.tuning.objectives.paired_stories import paired_stories_of
from fastory.tuning.sizes import HistorySizes, Tuning
from fastory.tuning.training_module import TrainingModule

SMALL = HistorySizes(positions=3, local_heads=4, bottleneck=8, frame_tokens=12)
OPTIONS: dict[str, Any] = {
    "steps": 12, "batch_size": 3, "frames": 4, "rank": 4, "warmup": 1, "learning_rate": 3e-3, "save_every": 5,
    "validate_every": 0, "preserve": 8.0, "first_frames": 0.3, "dropout": 0.3, "self_attention": True, "ema_decay": 0.0,
}  # fmt: skip
TOLERANCE = 1e-5  # float32, values about 1; other products of matrices round otherwise


class Lot:
    """A run with its tables, and a training module with random updates, as the middle of a training has them."""

    def __init__(self, base: Path, stories: Path, folder: Path) -> None:
        self.folder = base
        self.run = loop.begin(stories, folder / "a.safetensors", str(base), {}, Tuning(**OPTIONS), SMALL, 0,
                              "cpu", False, True)  # fmt: skip
        self.tables = encoded(self.run, folder)
        self.module = TrainingModule(self.run.model, self.tables.nothing, untuned=self.run.untuned)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.module.learning().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def batches(self, **options: Any) -> Batches:
        tuning = Tuning(**{**OPTIONS, **options})
        paired = paired_stories_of(self.run.examples) if tuning.patches else ()
        return Batches(self.tables, range(6), tuning, self.run.model.require_history(), 1000, paired)

    @torch.no_grad()
    def untuned_prediction(self, batch: Batch) -> torch.Tensor:
        """What diffusers' UNet predicts for the same noisy latents from the same captions, with none of our layers."""
        unet = UNet2DConditionModel.from_pretrained(self.folder / "unet")
        noisy = self.module.denoising.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        captions = torch.where(batch.dropped[:, None, None], self.module.no_captions, batch.captions)
        output: torch.Tensor = unet(noisy, batch.timesteps, captions).sample
        return output


@pytest.fixture(scope="module")
def lot(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Lot:
    stories = write_paired_stories(write_stories(tmp_path_factory.mktemp("examples")))
    return Lot(sd15_folder, stories, tmp_path_factory.mktemp("lot"))


def test_first_frames_and_unconditional_rows_are_preserved_and_no_others(lot: Lot) -> None:
    found = set()
    for step in range(8):
        batch = lot.batches().draw(step)
        assert batch.preserved is not None and lot.batches(preserve=0.0).draw(step).preserved is None
        for row, kept in enumerate(batch.preserved.tolist()):
            index, dropped = int(batch.index[row]), bool(batch.dropped[row])
            assert kept == (index == 0 or dropped)
            found.add((index == 0, dropped))
    assert len(found) == 4


def test_the_loss_is_the_distance_to_diffusers_unet_where_there_is_no_history(lot: Lot) -> None:
    """The weighted distance in those rows, the noise loss in the others, though the module's own layers have updates."""
    batch = lot.batches().draw(1)
    kept = batch.preserved
    assert kept is not None and kept.any() and not kept.all()
    noisy = lot.module.denoising.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        predicted = lot.module.predict(noisy, batch)
        found = float(lot.module(batch))
        alone = float(lot.module(replace(batch, preserved=None)))
    untuned = lot.untuned_prediction(batch)
    wanted = lot.module.denoising.scheduler.get_velocity(
        batch.latents, batch.noise, batch.timesteps
    )  # this base predicts v
    assert (predicted - untuned)[kept].abs().max() > 100 * TOLERANCE
    errors = torch.where(kept.view(-1, 1, 1, 1), 8.0 * (predicted - untuned) ** 2, (predicted - wanted) ** 2)
    size = float(errors.mean())
    assert abs(found - size) < TOLERANCE * size * 10
    assert (
        abs(alone - float(((predicted - wanted) ** 2).mean())) < TOLERANCE * 10 and abs(found - alone) > 0.01
    )


def test_the_base_s_prediction_has_no_part_in_the_gradient(lot: Lot) -> None:
    """Weights are shared with the UNet that learns; its updates get their gradient, the base's weights none."""
    lot.module(lot.batches().draw(2)).backward()
    with_gradient = {name for name, p in lot.module.named_parameters() if p.grad is not None}
    lot.module.zero_grad(set_to_none=True)
    assert with_gradient and with_gradient <= set(lot.module.learning())
    assert lot.run.untuned is not None
    own = dict(lot.module.unet.named_parameters())
    untuned = dict(lot.run.untuned.unet.named_parameters())
    shared = {p.data_ptr() for p in own.values()}
    assert {p.data_ptr() for p in untuned.values()} <= shared and not any("lora" in name for name in untuned)


def test_preserved_rows_have_no_patches(lot: Lot) -> None:
    """The base does not remove them; without --preserve first frames have some."""
    seen, later = {0.0: 0, 8.0: 0}, 0
    for preserve in seen:
        for step in range(6):
            batch = lot.batches(patches=0.9, preserve=preserve).draw(step)
            assert batch.patches is not None
            rows = batch.patches.flatten(1).any(1)
            assert not rows[batch.dropped].any()
            seen[preserve] += int(rows[batch.index == 0].sum())
            later += int(rows[batch.index > 0].sum())
    assert seen[8.0] == 0 < seen[0.0] and later > 20


def test_a_tuning_with_a_large_weight_goes_back_to_the_base(
    sd15_folder: Path, tmp_path: Path, lot: Lot
) -> None:
    """From a tuning without it: how far first frames are from what the base draws of them, before and after."""
    stories = write_stories(tmp_path / "examples")
    far, adapter = [], None
    for weight in (0.0, 100.0):
        output = tmp_path / f"{weight}.safetensors"
        tuning = Tuning(**{**OPTIONS, "preserve": weight})
        sizes = HistorySizes() if adapter else SMALL
        list(
            loop.tune(
                stories,
                output,
                model=str(sd15_folder),
                adapter=adapter,
                tuning=tuning,
                sizes=sizes,
                device="cpu",
            )
        )
        adapter = str(output)
        run = loop.begin(stories, tmp_path / "next.safetensors", str(sd15_folder), {"adapter": adapter},
                         Tuning(**OPTIONS), HistorySizes(), 0, "cpu", False, True)  # fmt: skip
        module = TrainingModule(run.model, lot.tables.nothing)
        batch = lot.batches(first_frames=0.9).draw(4)
        noisy = module.denoising.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        assert batch.preserved is not None
        with torch.no_grad():
            change = (module.predict(noisy, batch) - lot.untuned_prediction(batch))[batch.preserved]
            captions = torch.where(batch.dropped[:, None, None], module.no_captions, batch.captions)
            assert run.untuned is not None  # and without the adapter that the tuning starts from
            untuned = run.untuned.predict(noisy, batch.timesteps, captions)
            assert (untuned - lot.untuned_prediction(batch)).abs().max() < TOLERANCE
        far.append(float(change.square().mean()))
    assert far[1] < far[0] / 2
