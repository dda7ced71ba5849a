"""Risk: a clock decides twice. Then a resumed run, another process or the next run on a machine has other bytes.

Both backends that a CPU has are measured and called.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastory import InputError, Story, StoryModel, generate
from fastory.distributed.messages import Computing
from fastory.distributed.ranks import computing_of
from fastory.distributed.share import ShareDrawer
from fastory.events import FrameDrawn, Notice
from fastory.models.copies import attending_copy, self_attention_shapes
from fastory.processors import attention_backends, compiled
from fastory.processors.attention_backends import BACKENDS, Attend, Shape, quickest, time_backends
from fastory.runs import attending
from fastory.settings import Settings

STORY = Story.from_captions(["a fox in the snow", "a rabbit", "a cat on the beach"])
LAYERS = 7  # of self-attention in the built-in UNet
VALUES: dict[str, Any] = {"iterations": 0, "steps": 2, "batch_size": 2, "regions": "off"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastory" / "attention.json"


def opened(attention: str = "measured") -> StoryModel:
    return StoryModel.open("builtin", device="cpu", attention=attention)


def stored(cache: Path, model: StoryModel, first: str, second: str) -> None:
    """A machine on which `first` was quicker than `second`."""
    seconds = {name: 1e-6 if name == first else 1e-3 for name in (first, second)}
    names = [f"float32 {rows}x{shape}" for rows in (2, 4) for shape in self_attention_shapes(model, 128, 128)]
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({attending.machine_of(model.placement): dict.fromkeys(names, seconds)}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each backend was called, in place of what is measured as well."""
    counted = Counter[str]()

    def counting(name: str, attend: Attend) -> Attend:
        def call(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            counted[name] += 1
            return attend(query, keys, values)

        return call

    for name, backend in BACKENDS["cpu"].items():
        monkeypatch.setitem(BACKENDS["cpu"], name, replace(backend, attend=counting(name, backend.attend)))
    return counted


def drawn(folder: Path, model: StoryModel, pictures: int = 3) -> list[Any]:
    """The events until so many pictures are there."""
    events: Iterator[Any] = generate(STORY, model=model, output=folder, **VALUES)
    seen: list[Any] = []
    for event in events:
        seen.append(event)
        if sum(isinstance(event, FrameDrawn) for event in seen) == pictures < 3:
            break
    events.close()
    return seen


def pictures_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("frame-*.png")}


def test_a_run_goes_on_with_what_it_began_with(tmp_path: Path, cache: Path, calls: Counter[str]) -> None:
    """The manifest says it: what is stored meanwhile, by whomever, is for runs that begin later."""
    model = opened()
    stored(cache, model, "math", "flash")
    drawn(tmp_path / "whole", model)
    drawn(tmp_path / "halved", opened(), pictures=1)
    began = json.loads((tmp_path / "halved" / "manifest.json").read_text())["machine"]["attention"]
    assert began == dict.fromkeys(map(str, self_attention_shapes(model, 128, 128)), "math")
    stored(cache, model, "flash", "math")
    drawn(tmp_path / "halved", opened("auto"))
    assert pictures_of(tmp_path / "halved") == pictures_of(tmp_path / "whole")
    assert calls["flash"] == 0 and calls["math"] >= 2 * 2 * 2 * LAYERS  # runs, micro-batches, steps
    drawn(tmp_path / "later", opened(), pictures=1)
    assert calls["flash"] == 2 * LAYERS
    later = json.loads((tmp_path / "later" / "manifest.json").read_text())["machine"]["attention"]
    assert set(later.values()) == {"flash"}


def test_a_shape_is_measured_once_on_a_machine(tmp_path: Path, cache: Path) -> None:
    events = drawn(tmp_path / "one", opened(), pictures=1)
    said = [
        event.message for event in events if isinstance(event, Notice) if "self-attention" in event.message
    ]
    assert len(said) == 1 and "measured now, kept in" in said[0] and str(cache) in said[0]
    (found,) = json.loads(cache.read_text()).values()
    assert all(set(seconds) == {"flash", "math"} for seconds in found.values()) and len(found) >= 2
    before = cache.read_bytes()
    events = drawn(tmp_path / "two", opened(), pictures=1)
    assert any("measured before" in event.message for event in events if isinstance(event, Notice))
    assert cache.read_bytes() == before
    machines = [
        json.loads((tmp_path / name / "manifest.json").read_text())["machine"] for name in ("one", "two")
    ]
    assert machines[0]["attention"] == machines[1]["attention"]


def test_what_another_process_has_stored_meanwhile_counts(cache: Path) -> None:
    """Two that measure at once: the first one to store it decides for both."""
    model, shape = opened(), "float32 2x64x4x8"
    attending._keep("this machine", {shape: {"flash": 1.0, "math": 2.0}})
    known = attending._keep("this machine", {shape: {"flash": 2.0, "math": 1.0}, "another": {"math": 1.0}})
    assert known == {shape: {"flash": 1.0, "math": 2.0}, "another": {"math": 1.0}}
    for spoilt in ("{", "[]", '{"x": {"y": {"flash": -1.0}}}', '{"x": {"y": {"a name": 1.0}}}'):
        cache.write_text(spoilt)
        assert attending._read() == {}
    assert model.attention == "measured"


def test_a_run_without_it_stays_without(tmp_path: Path) -> None:
    drawn(tmp_path / "plain", opened("auto"), pictures=1)
    assert "attention" not in json.loads((tmp_path / "plain" / "manifest.json").read_text())["machine"]
    with pytest.raises(InputError, match="this run began with PyTorch's own choice of self-attention"):
        drawn(tmp_path / "plain", opened(), pictures=1)


def test_a_backend_that_is_not_here_is_named() -> None:
    with pytest.raises(InputError, match="self-attention by cudnn; wanted one of flash, math on cpu"):
        attending.as_began(opened(), {"attention": {"64x2x32": "cudnn"}}, Settings(width=128, height=128))


def test_the_first_stays_unless_another_is_clearly_quicker() -> None:
    assert quickest({"flash": 1.00, "cudnn": 0.98, "efficient": 2.0}) == "flash"
    assert quickest({"flash": 1.00, "cudnn": 0.96, "efficient": 0.95}) == "efficient"
    assert quickest({"efficient": 1.0}) == "efficient"


def test_only_backends_that_take_a_shape_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "SAMPLES", 1)
    monkeypatch.setattr(attention_backends, "CALLS", 1)
    cpu = torch.device("cpu")
    assert set(time_backends(Shape(16, 2, 8), 2, cpu, torch.float32)) == set(BACKENDS["cpu"])
    assert time_backends(Shape(16, 2, 12), 2, cpu, torch.float32) == {}  # PyTorch pads it
    assert set(time_backends(Shape(8200, 1, 8), 1, cpu, torch.float32)) == {"flash"}  # scores of 256 MiB


@torch.inference_mode()
def test_a_compiled_layer_calls_it_and_another_backend_is_another_graph() -> None:
    """A kind is compiled before the steps: were a backend no part of it, a layer would be compiled within a capture."""
    graphs: list[str] = []

    def kept(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    plain = opened("auto")
    chosen = {str(shape): "math" for shape in self_attention_shapes(plain, 128, 128)}
    unet = attending_copy(plain, chosen, 128, 128).unet
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    torch._dynamo.reset()
    called = torch.compile(layer, fullgraph=True, dynamic=True, backend=kept)(torch.zeros(2, 16, 128))
    assert "_scaled_dot_product_attention_math" in graphs[0] and called.shape == (2, 16, 128)
    kinds = compiled.CompiledBlocks(unet).kinds
    assert kinds == compiled.CompiledBlocks(plain.unet).kinds
    layer.processor.backend = "flash"
    assert compiled.CompiledBlocks(unet).kinds == kinds + 1
    torch._dynamo.reset()


def test_other_processes_draw_with_it_too() -> None:
    model = opened("auto")
    shapes = {str(shape): "math" for shape in self_attention_shapes(model, 128, 128)}
    drawer = ShareDrawer(lambda dtype, graphs: model)
    sent = computing_of(attending_copy(model, shapes, 128, 128))
    there = drawer._model_for(sent, (128, 128))
    assert there.placement.attention == tuple(sorted(shapes.items()))
    assert drawer._model_for(Computing("float32", False, sent.threads), (128, 128)) is model
