"""The base stays as it is, every trained tensor learns, and a tuning that was killed ends in the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_stories import encoded, write_stories

from fastory import InputError, StoryModel
from fastory.files import sha256_of
from fastory.tuning import loop
from fastory.tuning.loop import Stepped, tune
from fastory.tuning.sizes import HistorySizes, Tuning
from fastory.tuning.state import write_tensors
from fastory.tuning.tables import encode
from fastory.tuning.trainable import adapter_file
from fastory.tuning.training_module import TrainingModule

SMALL = HistorySizes(positions=3, local_heads=4, bottleneck=8, frame_tokens=12)
SHORT = Tuning(
    steps=5, batch_size=2, frames=4, rank=2, warmup=1, learning_rate=1e-3, save_every=2, validate_every=0
)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("examples"))


def run(base: Path, stories: Path, output: Path, **options: Any) -> Iterator[Any]:
    given = {"tuning": SHORT, "sizes": SMALL, "device": "cpu", **options}
    return tune(stories, output, model=str(base), **given)


@pytest.fixture(scope="module")
def whole(sd15_folder: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "adapter.safetensors"
    list(run(sd15_folder, stories, output))
    return output


def digests(module: torch.nn.Module) -> dict[str, str]:
    """sha256 of every tensor, by its name without peft's layers around it."""
    return {
        name.replace(".base_layer", ""): hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }


def test_the_base_is_frozen_and_all_else_learns(sd15_folder: Path, stories: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter.safetensors"
    prepared = loop.begin(stories, output, str(sd15_folder), {}, SHORT, SMALL, 0, "cpu", False, True)
    files = {p: p.read_bytes() for p in sd15_folder.rglob("*.safetensors")}
    parts = {name: getattr(prepared.model.pipeline, name) for name in ("unet", "vae", "text_encoder")}
    before = {name: digests(part) for name, part in parts.items()}
    trained = {n: p.detach().clone() for part in (parts["unet"], prepared.model.require_history().encoder)
               for n, p in part.named_parameters() if p.requires_grad}  # fmt: skip
    list(loop.events_of(prepared, overwrite=False))
    assert {name: digests(part) for name, part in parts.items()} == before
    assert {p: p.read_bytes() for p in sd15_folder.rglob("*.safetensors")} == files
    assert digests(parts["unet"]) == digests(StoryModel.open(str(sd15_folder)).unet)
    after = dict(prepared.model.require_history().encoder.named_parameters()) | dict(
        parts["unet"].named_parameters()
    )
    still = [name for name, tensor in trained.items() if torch.equal(after[name], tensor)]
    assert trained.keys() == {n for n, p in after.items() if p.requires_grad}
    # A key's bias cannot change a softmax; AdamW moves it only by what rounding leaves.
    assert [name for name in still if not name.endswith("key.bias")] == []
    assert {name.rsplit(".", 3)[1] for name in trained if ".lora_" in name} == {"lora_A", "lora_B"}


def test_gradients_reach_every_trained_tensor_and_nothing_else(
    sd15_folder: Path, stories: Path, tmp_path: Path
) -> None:
    prepared = loop.begin(
        stories, tmp_path / "a.safetensors", str(sd15_folder), {}, SHORT, SMALL, 0, "cpu", False, True
    )
    tables = encoded(prepared, tmp_path)
    training_module = TrainingModule(prepared.model, tables.nothing)
    with torch.no_grad():  # what begins at zero lets no gradient through
        for parameter in training_module.learning().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    training_module(
        loop.batches_of(prepared, training_module, tables, range(3), prepared.tuning).draw(0, 0)
    ).backward()
    named = dict(training_module.named_parameters())
    assert {n for n, p in named.items() if p.grad is not None} == training_module.learning().keys()
    assert all(n.startswith("encoder.") or ".lora_" in n for n in training_module.learning())
    blind = [n for n, p in training_module.learning().items() if not p.grad.any()]
    assert [n for n in blind if not n.endswith("key.bias")] == []
    assert all(p.grad is None for p in prepared.model.vae.parameters())


@pytest.mark.parametrize("stop", [1, 3])
def test_a_killed_tuning_ends_in_the_same_bytes(
    sd15_folder: Path, stories: Path, whole: Path, tmp_path: Path, stop: int
) -> None:
    """Killed before its first checkpoint, and between two; at most the steps since the last one are made again."""
    output = tmp_path / "adapter.safetensors"
    events = run(sd15_folder, stories, output)
    for event in events:
        if isinstance(event, Stepped) and event.step == stop:
            break
    events.close()  # type: ignore[attr-defined]
    assert not output.exists()
    steps = [event.step for event in run(sd15_folder, stories, output) if isinstance(event, Stepped)]
    assert steps == list(range(stop - stop % 2 + 1, 6))
    assert sha256_of(output) == sha256_of(whole)
    assert not list(output.with_suffix(".tuning").glob("state-*"))


def test_a_finished_tuning_is_left_alone_and_another_refused(
    sd15_folder: Path, stories: Path, whole: Path
) -> None:
    before = whole.read_bytes()
    assert [type(event).__name__ for event in run(sd15_folder, stories, whole)] == ["Tuned"]
    other = Tuning(**{**vars(SHORT), "seed": 1})
    with pytest.raises(InputError, match=r"holds another tuning\. What differs: seed: 0 there, 1 here"):
        run(sd15_folder, stories, whole, tuning=other)
    assert whole.read_bytes() == before


def test_a_tuning_goes_on_from_an_adapter(
    sd15_folder: Path, stories: Path, whole: Path, tmp_path: Path
) -> None:
    """It begins with that adapter's weights, updates included, and all of its encoder goes on learning."""
    output = tmp_path / "further.safetensors"
    further = Tuning(**{**vars(SHORT), "rank": None})
    prepared = loop.begin(
        stories,
        output,
        str(sd15_folder),
        {"adapter": str(whole)},
        further,
        HistorySizes(),
        0,
        "cpu",
        False,
        True,
    )
    nothing = encode(prepared.model, "", Image.new("RGB", prepared.size))
    tensors, metadata = adapter_file(TrainingModule(prepared.model, nothing), ())
    given = load_file(whole)
    assert tensors.keys() == given.keys() and all(torch.equal(tensors[k], given[k]) for k in given)
    assert json.loads(metadata["history"])["local_heads"] == 4


def test_a_frozen_encoder_stays_and_what_follows_it_learns(
    sd15_folder: Path, stories: Path, whole: Path, tmp_path: Path
) -> None:
    """The file has the whole encoder all the same, and opens alone; a new encoder cannot be kept as it is."""
    output = tmp_path / "adapter.safetensors"
    asked = Tuning(**{**vars(SHORT), "freeze_encoder": True})
    list(run(sd15_folder, stories, output, tuning=asked, sizes=HistorySizes(), adapter=str(whole)))
    given, tuned = load_file(whole), load_file(output)
    assert given.keys() == tuned.keys()
    for name, tensor in given.items():
        frozen = name.startswith(("history.vision.", "history.text."))
        assert torch.equal(tensor, tuned[name]) == frozen, name
    assert StoryModel.open(str(sd15_folder), adapter=str(output)).require_history() is not None
    with pytest.raises(InputError, match="--freeze-encoder: the history encoder would be new"):
        run(sd15_folder, stories, tmp_path / "new.safetensors", tuning=asked)


def test_updates_of_self_attention_are_asked_for_and_kept(
    sd15_folder: Path, stories: Path, whole: Path, tmp_path: Path
) -> None:
    """Not by default; asked for they learn, are drawn with, and a tuning that starts from them goes on with them."""
    assert not [name for name in load_file(whole) if ".attn1." in name]
    output = tmp_path / "adapter.safetensors"
    asked = Tuning(**{**vars(SHORT), "self_attention": True})
    list(run(sd15_folder, stories, output, tuning=asked))
    updates = {n: t for n, t in load_file(output).items() if ".attn1." in n and n.endswith(".lora_B")}
    model = StoryModel.open(str(sd15_folder), adapter=str(output))
    layers = [name for name in model.unet.attn_processors if ".attn1." in name]
    assert len(updates) == 4 * len(layers) and all(t.any() for t in updates.values())
    for name in updates:
        module = name.removeprefix("unet.").removesuffix(".lora_B")
        plain, tuned = (u.get_submodule(module).weight for u in (model.unet, model.causal.unet))
        assert not torch.equal(plain, tuned)
    further = Tuning(**{**vars(SHORT), "rank": None})
    files = {"adapter": str(output)}
    prepared = loop.begin(
        stories, tmp_path / "b.safetensors", str(sd15_folder), files, further, HistorySizes(), 0, "cpu", False, True
    )  # fmt: skip
    learning = TrainingModule(
        prepared.model, encode(prepared.model, "", Image.new("RGB", prepared.size))
    ).learning()
    assert len([name for name in learning if ".attn1." in name]) == 2 * len(updates)


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_adapter_has_the_rights_that_the_umask_gives(umask: int, mode: int, tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        write_tensors(tmp_path / "adapter.safetensors", {"a": torch.ones(2)}, {"format": "pt"})
    finally:
        os.umask(old)
    assert (tmp_path / "adapter.safetensors").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]
