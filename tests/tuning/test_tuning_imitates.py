"""A tuning that begins by imitating an IP-Adapter: the target is the base's own, of the right frames, and it is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_stories import encoded, write_stories

from fastory import StoryModel
from fastory.conditioning.references import ReferenceContext
from fastory.files import sha256_of
from fastory.tuning import loop
from fastory.tuning.batch import Batch, visible_references
from fastory.tuning.loop import Stepped, tune
from fastory.tuning.objectives.imitation import difference
from fastory.tuning.sizes import HistorySizes, Tuning
from fastory.tuning.training_module import TrainingModule

SMALL = HistorySizes(positions=3, local_heads=4, bottleneck=8, frame_tokens=12)
SHORT = Tuning(
    steps=5,
    batch_size=2,
    frames=4,
    rank=2,
    warmup=1,
    learning_rate=1e-3,
    save_every=2,
    validate_every=0,
    self_attention=True,
    imitate=3,
    imitate_scale=0.8,
)
TOLERANCE = 1e-5  # float32, values about 1; a batched product rounds otherwise than a single one


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("examples"))


class Class:
    """A run with its tables, and a training module with random updates, as the middle of a training has them."""

    def __init__(self, base: Path, adapter: Path, stories: Path, folder: Path) -> None:
        files = {"ip_adapter": str(adapter)}
        output = folder / "a.safetensors"
        self.run = loop.begin(stories, output, str(base), files, SHORT, SMALL, 0, "cpu", False, True)
        self.tables = encoded(self.run, folder, references=True)
        self.module = TrainingModule(self.run.model, self.tables.nothing, self.run.teacher)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.module.learning().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        self.base, self.adapter = base, adapter

    def batch(self, window: int, dropped: tuple[int, ...] = ()) -> Batch:
        """All frames of the first two stories, of 3 and 4 frames; these rows are dropped."""
        tuning = Tuning(window=window or "all", dropout=0.0)
        source = loop.Batches(self.tables, [0, 1], tuning, self.run.model.require_history(), 1000)
        batch = source.of([np.arange(3), np.arange(3, 7)], np.random.default_rng(2), references=True)
        batch.dropped[list(dropped)] = True
        return batch


@pytest.fixture(scope="module")
def lot(
    sd15_folder: Path, sd15_adapter_base: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory
) -> Class:
    return Class(sd15_folder, sd15_adapter_base, stories, tmp_path_factory.mktemp("targets"))


@pytest.mark.parametrize("window", [0, 1, 2])
def test_a_row_sees_the_references_of_its_window(lot: Class, window: int) -> None:
    batch = lot.batch(window, dropped=(0, 5))
    before = batch.mask.shape[1]
    expected = torch.zeros(len(batch.index), len(batch.mask) * before + 1, dtype=torch.bool)
    for row, (story, index) in enumerate(zip(batch.story.tolist(), batch.index.tolist(), strict=True)):
        if row in (0, 5):
            expected[row, -1] = index > 0
            continue
        for frame in range(max(0, index - (window or index)), index):
            expected[row, story * before + frame] = True
    assert torch.equal(visible_references(batch), expected)


def test_the_target_is_what_the_base_gives_for_these_frames_alone(lot: Class) -> None:
    """Every row against a freshly opened base that is shown the row's references and no others."""
    batch = lot.batch(2, dropped=(5,))
    assert batch.references is not None and lot.run.teacher is not None
    references, visible = batch.references.flatten(0, 1), visible_references(batch)
    others = visible.roll(1, 0)
    captions = torch.where(batch.dropped[:, None, None], lot.module.no_captions, batch.captions)
    target = lot.run.teacher.target(batch.noise, batch.timesteps, captions, references, visible, others)
    model = StoryModel.open(str(lot.base), ip_adapter=str(lot.adapter), graphs="off")
    every = torch.cat([references, model.null_reference()])
    for row in range(len(batch.index)):
        context = shown(model, captions[row : row + 1], every[visible[row]])
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            layer.attn.register_forward_hook(lambda _, i, o, name=layer.name, to=seen: to.update({name: o}))
            for layer in model.layers.layers
        ]
        with torch.inference_mode():
            model.unet(
                batch.noise[row : row + 1],
                batch.timesteps[row],
                None,
                cross_attention_kwargs={"context": context},
            )
        for hook in hooks:
            hook.remove()
        assert len(seen) == len(model.layers.layers) > 1
        another = shown(model, captions[row : row + 1], every[others[row]])
        for layer in model.layers.layers:
            taken, output, instead = target[layer.name]
            assert (output[row] - seen[layer.name][0]).abs().max() < TOLERANCE, (row, layer.name)
            with torch.inference_mode():
                expected = layer.attn(taken[row : row + 1], context=another)
            assert (instead[row] - expected[0]).abs().max() < TOLERANCE, (row, layer.name)


@torch.inference_mode()
def shown(model: StoryModel, caption: torch.Tensor, references: torch.Tensor) -> ReferenceContext:
    """The context of one row: its caption (1, Lt, C_x) and its references (n, T, C_x), no others."""
    tokens = references.flatten(0, 1)[None]
    return ReferenceContext(
        model.layers.project_text(caption),
        model.layers.project_references(tokens),
        torch.tensor([0.8]),
        torch.ones(1, len(references), dtype=torch.bool),
        torch.tensor([0, tokens.shape[1]], dtype=torch.int32),
        model.tokens_per_ref,
    )


def test_the_difference_is_zero_for_the_teacher_itself_alone(lot: Class) -> None:
    """And the module with its random updates is far from it."""
    batch = lot.batch(0)
    teacher = lot.run.teacher
    assert batch.references is not None and teacher is not None
    references, visible = batch.references.flatten(0, 1), visible_references(batch)
    others = visible_references(replace(batch, story=1 - batch.story))
    target = teacher.target(batch.noise, batch.timesteps, batch.captions, references, visible, others)
    context = ReferenceContext(
        teacher.layers.project_text(batch.captions),
        teacher.layers.project_references(torch.cat([references, teacher.null]).flatten(0, 1)[None]),
        torch.tensor([0.8]),
        visible,
        torch.tensor([0, visible.shape[1] * teacher.tokens_per_ref], dtype=torch.int32),
        teacher.tokens_per_ref,
    )
    another, module = replace(context, ref_visible=others), lot.module
    with torch.no_grad():
        assert difference(teacher.layers, target, context, another) < TOLERANCE**2
        # Deaf to what the references say: all of the second term is left, and nothing of the first.
        assert abs(float(difference(teacher.layers, target, context, context)) - 1) < 1e-3
        contexts = module.context(batch), module.context(replace(batch, story=1 - batch.story))
        assert difference(module.layers, target, *contexts) > 0.5


def test_imitation_teaches_history_and_updates_and_leaves_base_and_adapter(lot: Class) -> None:
    """150 steps on one batch: the difference falls to less than half."""
    module, batch = lot.module, lot.batch(0)
    frozen = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    projections = [weight.clone() for weight in lot.run.model.layers.key_weights]
    optimizer = torch.optim.Adam(module.learning().values(), 3e-3)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = module(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses[::10]
    # What is not asked anything by a target: self-attention.
    assert all(".attn1." in n for n, p in module.learning().items() if p.grad is None)
    assert any(".attn2." in n for n in module.learning())
    assert all(torch.equal(p, frozen[n]) for n, p in module.named_parameters() if n in frozen)
    assert all(map(torch.equal, projections, lot.run.model.layers.key_weights))


def run(base: Path, adapter: Path, stories: Path, output: Path, **options: Any) -> Iterator[Any]:
    given = {"tuning": SHORT, "sizes": SMALL, "device": "cpu", **options}
    return tune(stories, output, model=str(base), ip_adapter=str(adapter), **given)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_tuning_killed_while_it_imitates_ends_in_the_same_bytes(
    sd15_folder: Path, sd15_adapter_base: Path, stories: Path, tmp_path: Path, stop: int
) -> None:
    whole, output = tmp_path / "whole.safetensors", tmp_path / "adapter.safetensors"
    list(run(sd15_folder, sd15_adapter_base, stories, whole))
    events = run(sd15_folder, sd15_adapter_base, stories, output)
    for event in events:
        if isinstance(event, Stepped) and event.step == stop:
            break
    events.close()  # type: ignore[attr-defined]
    list(run(sd15_folder, sd15_adapter_base, stories, output))
    assert sha256_of(output) == sha256_of(whole)
    other = tmp_path / "other.safetensors"
    list(run(sd15_folder, sd15_adapter_base, stories, other, tuning=Tuning(**{**vars(SHORT), "imitate": 0})))
    assert sha256_of(other) != sha256_of(whole)
