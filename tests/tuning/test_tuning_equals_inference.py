"""What is trained is what is drawn: the training module's output is the runtime's with the tuned file, for every row."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_history import write_causal_folder
from small_stories import write_stories
from torch import Tensor

from fastory import Story, StoryModel
from fastory.conditioning.history import HistoryContext, HistoryRow
from fastory.conditioning.references import ReferenceRow
from fastory.models.images import unscaled
from fastory.modes.causal import prepare_frame
from fastory.modes.mode import StoryPlan
from fastory.pictures import open_picture
from fastory.sampling.sampler import Row
from fastory.settings import Settings
from fastory.tuning.batch import Batch
from fastory.tuning.batches import Batches
from fastory.tuning.sizes import HistorySizes, Tuning
from fastory.tuning.stories import read_examples
from fastory.tuning.tables import Tables, encode_examples, encode_picture, open_tables
from fastory.tuning.trainable import adapter_file, prepare
from fastory.tuning.training_module import TrainingModule

TOLERANCE = 1e-5  # float32; the outputs are about 1. B A added to a weight rounds otherwise than two products
SIZE = (64, 64)
SMALL = HistorySizes(positions=3, local_heads=4, bottleneck=8, frame_tokens=12)


class Tuned:
    """A base with random low-rank updates and history, as a training would leave them, and the file of it."""

    def __init__(self, base: Path, stories: Path, folder: Path, sizes: HistorySizes) -> None:
        model = StoryModel.open(str(base), dtype="float32", graphs="off")
        self.examples = read_examples(stories, SIZE)
        prepare(model, sizes, 2, 3, seed=0)
        list(encode_examples(model, self.examples, SIZE, folder / "tables"))
        self.tables: Tables = open_tables(model, self.examples, SIZE, folder / "tables")
        self.training_module = TrainingModule(model, self.tables.nothing)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.training_module.learning().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        self.file = folder / "adapter.safetensors"
        tensors, metadata = adapter_file(self.training_module, ())
        save_file(tensors, self.file, metadata)
        self.base = base
        self.history = model.require_history()

    def batch(self, window: int | str, dropout: float = 0.0) -> Batch:
        """All frames of the first two stories, of 3 and 4 frames."""
        tuning = Tuning(window=window, dropout=dropout)
        source = Batches(self.tables, [0, 1], tuning, self.history, 1000)
        return source.of([np.arange(3), np.arange(3, 7)], np.random.default_rng(2), references=False)

    def rows(self, model: StoryModel, window: int) -> list[Row]:
        """The same frames as the runtime prepares them, from the same pictures."""
        settings = Settings(mode="causal", window=window, steps=1, width=64, height=64)
        found = []
        for example in self.examples[:2]:
            story = Story.from_captions(example.prompts)
            plan = StoryPlan(story, settings, finished=Pictures(example.pictures))
            for i in range(len(example.prompts)):
                found += prepare_frame(model, [plan], i, 1, SIZE)[1]
        return found


class Pictures:
    """Finished pictures of a story, as a run folder gives them."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.paths = paths

    def has(self, round: int, frame: int) -> bool:
        return True

    def load(self, round: int, frame: int) -> tuple[Image.Image, str | None]:
        return open_picture(self.paths[frame]), None


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def tuned(sd15_folder: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return Tuned(sd15_folder, stories, tmp_path_factory.mktemp("tuned"), SMALL)


@pytest.fixture(scope="module")
def runtime(tuned: Tuned) -> StoryModel:
    return StoryModel.open(str(tuned.base), adapter=str(tuned.file))


@torch.no_grad()
def predicted(model: StoryModel, row: ReferenceRow | HistoryRow, noisy: Tensor, timestep: Tensor) -> Tensor:
    """The runtime's UNet for one row."""
    history = model.require_history().encoder
    limit = int(model.pipeline.tokenizer.model_max_length)
    assert isinstance(row, HistoryRow)
    context = HistoryContext(row.kv, row.padding, limit, history.config.frame_tokens)
    output: Tensor = model.causal.unet(
        noisy[None],
        timestep,
        encoder_hidden_states=None,
        cross_attention_kwargs={"context": context},
        return_dict=False,
    )[0]
    return output[0]


def compare(tuned: Tuned, runtime: StoryModel, window: int, dropout: float) -> tuple[float, float]:
    """The largest difference from the runtime's rows, and the largest value."""
    batch = tuned.batch(window, dropout)
    with torch.no_grad():
        got = tuned.training_module.predict(batch.noise, batch)
    differences = []
    for i, row in enumerate(tuned.rows(runtime, window)):
        inputs = row.unconditional if batch.dropped[i] else row.conditional
        expected = predicted(runtime, inputs, batch.noise[i], batch.timesteps[i])
        differences.append(float((got[i] - expected).abs().max()))
    return max(differences), float(got.abs().max())


@pytest.mark.parametrize("window", [1, 2, 3])
def test_conditional_rows(tuned: Tuned, runtime: StoryModel, window: int) -> None:
    difference, largest = compare(tuned, runtime, window, 0.0)
    assert difference < TOLERANCE and 0.1 < largest < 100


@pytest.mark.parametrize("window", [1, 3])
def test_dropped_rows_are_the_unconditional_ones(tuned: Tuned, runtime: StoryModel, window: int) -> None:
    """Empty caption, null frame in every place that is taken; mixed with conditional rows in one batch."""
    batch = tuned.batch(window, 0.5)
    assert {True, False} == set(batch.dropped.tolist())
    assert compare(tuned, runtime, window, 0.5)[0] < TOLERANCE


def test_unlimited_is_the_window_of_the_whole_story(tuned: Tuned) -> None:
    with torch.no_grad():
        every, three = (
            tuned.training_module.predict(b.noise, b) for b in (tuned.batch("all"), tuned.batch(3))
        )
    assert torch.equal(every, three)


def test_the_file_opens_and_changes_the_picture(tuned: Tuned, runtime: StoryModel, sd15_folder: Path) -> None:
    """Updates and history take part: without the updates, or with another history, the output is another one."""
    batch, row = tuned.batch(3), tuned.rows(runtime, 3)[2]
    assert len(runtime.require_history().updates) == 4 * len(runtime.layers.layers)
    full = predicted(runtime, row.conditional, batch.noise[2], batch.timesteps[2])
    empty = predicted(runtime, row.unconditional, batch.noise[2], batch.timesteps[2])
    plain = copy.copy(runtime)
    plain.__dict__["causal"] = runtime  # the base's UNet, without updates
    unchanged = predicted(plain, row.conditional, batch.noise[2], batch.timesteps[2])
    assert (full - empty).abs().max() > 1e-3 and (full - unchanged).abs().max() > 1e-3


def test_latents_are_those_that_decode(tuned: Tuned, runtime: StoryModel) -> None:
    """The runtime's way back from latents leads to the VAE's own, so the scale is the one the UNet takes."""
    picture = open_picture(tuned.examples[0].pictures[0])
    latents = encode_picture(runtime, picture)
    assert torch.allclose(latents[0], tuned.tables.take("latents", np.array([0]))[0])
    pixels = runtime.pipeline.image_processor.preprocess(picture)
    with torch.no_grad():
        own = runtime.vae.encode(pixels).latent_dist.mean
    assert torch.allclose(unscaled(latents, runtime.vae.config), own, atol=1e-6)


def test_an_encoder_of_the_base_learns_in_parts(sd15_folder: Path, stories: Path, tmp_path: Path) -> None:
    """A base with its own encoder: only its projections of cross-attention, embeddings and added parts are in the file."""
    base = write_causal_folder(sd15_folder, tmp_path / "base", local_heads=0, bottleneck=0)
    tuned = Tuned(base, stories, tmp_path, HistorySizes())
    names = {
        name.split(".", 1)[1] for name in tuned.training_module.learning() if name.startswith("encoder.")
    }
    assert not any(name.startswith("vision.") or ".attention.self." in name for name in names)
    assert {"type_embeddings.weight", "time_embeddings.weight", "local_attention.to_q.weight"} < names
    assert "text.encoder.layer.0.crossattention.self.key.weight" in names and "adapter.up.weight" in names
    runtime = StoryModel.open(str(base), adapter=str(tuned.file))
    assert compare(tuned, runtime, 2, 0.3)[0] < TOLERANCE
