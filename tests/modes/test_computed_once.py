"""What is said to be computed once is counted: encodes, projections, reads on the host, recompiles."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_calls import calls
from drawn_rounds import CAPTIONS, Kept, draw, settings
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastory import Story, StoryModel
from fastory.conditioning.references import ReferenceContext, References
from fastory.events import FrameDrawn, RoundStarted
from fastory.modes.iterative import iterative, prepare_round
from fastory.modes.mode import StoryPlan
from fastory.sampling.sampler import Sampler

ROUNDS, FRAMES = 2, 5


@pytest.fixture(params=[("sd15", "base"), ("sdxl", "plus")], ids=["sd15-base", "sdxl-plus"])
def model(request: pytest.FixtureRequest) -> StoryModel:
    family, kind = request.param
    folder: Path = request.getfixturevalue(f"{family}_folder")
    adapter: Path = request.getfixturevalue(f"{family}_adapter_{kind}")
    return StoryModel.open(str(folder), ip_adapter=str(adapter))


class Linears(TorchFunctionMode):
    """Counts products with given weights."""

    def __init__(self, weights: dict[int, str]) -> None:
        self.weights, self.counter = weights, Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and id(args[1]) in self.weights:
            self.counter[self.weights[id(args[1])]] += 1
        return func(*args, **(kwargs or {}))


def test_each_frame_is_encoded_once_a_round_and_texts_once_a_story(model: StoryModel) -> None:
    encoder = model.checkpoint.image_encoder
    assert encoder is not None
    first = model.layers.layers[0].attn
    modules = {"image": encoder, "text": model.pipeline.text_encoder, "to_k": first.to_k, "to_v": first.to_v}
    assert model.adapter is not None
    reference_weights = {id(model.layers.key_weights[0]): "key", id(model.layers.value_weights[0]): "value"}
    with calls(modules) as count, Linears(reference_weights) as products:
        draw(model, CAPTIONS, settings(iterations=ROUNDS), 2)
    null = (
        1 if model.adapter.kind == "plus" else 0
    )  # Plus looks at an all-zero picture once, base at a zero vector
    assert count["image"] == FRAMES * ROUNDS + null
    assert count["text"] == FRAMES + 1  # every caption and the negative prompt
    assert (
        count["to_k"] == count["to_v"] == FRAMES * (ROUNDS + 1) + 1
    )  # a frame's once a round, the unconditional once
    assert products.counter == {"key": ROUNDS, "value": ROUNDS}  # reference K/V once a round


def test_pictures_of_an_earlier_run_are_encoded_once(model: StoryModel) -> None:
    whole = draw(model, CAPTIONS, settings(iterations=2), 2)
    kept = {key: image for key, image in whole.items() if key[0] < 2}
    encoder = model.checkpoint.image_encoder
    assert encoder is not None and model.adapter is not None
    with calls({"image": encoder}) as count:
        draw(model, CAPTIONS, settings(iterations=2), 2, kept)
    assert count["image"] == FRAMES + (1 if model.adapter.kind == "plus" else 0)


def test_nothing_is_encoded_for_a_finished_story(model: StoryModel) -> None:
    whole = draw(model, CAPTIONS, settings(iterations=1), 2)
    encoder = model.checkpoint.image_encoder
    assert encoder is not None
    with calls({"image": encoder, "unet": model.unet}) as count:
        assert draw(model, CAPTIONS, settings(iterations=1), 2, whole) == {}
    assert not count


def prepared(model: StoryModel, frames: int, steps: int = 3) -> tuple[Sampler, list[Any]]:
    """A sampler and its rows in round 1 of a story, ready to denoise."""
    chosen = settings(iterations=1, steps=steps)
    whole = draw(model, CAPTIONS[:frames], settings(iterations=0, steps=1), 2)
    plan = StoryPlan(Story.from_captions(CAPTIONS[:frames]), chosen, finished=Kept(whole))
    sampler, rows = prepare_round(model, plan, 1, 2)
    return sampler, rows[:2]


class HostReads(TorchDispatchMode):
    """Counts tensors whose value reaches Python, and operators whose output size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "item", "nonzero", "equal", "masked_select"):
            self.counter[name] += 1
        return func(*args, **(kwargs or {}))


def test_no_tensor_is_read_on_the_host_inside_the_step_loop(model: StoryModel) -> None:
    sampler, rows = prepared(model, 3)
    steps = sampler.denoise(rows)
    next(steps)  # the first step follows the loading of the rows; all others are the loop alone
    with HostReads() as reads:
        assert [number for number, _ in steps] == [2, 3]
    assert not reads.counter
    with HostReads() as reads:  # the check can fail
        bool(torch.ones(1).sum() > 0)
    assert reads.counter


def test_step_loop_keeps_its_input_buffers(model: StoryModel) -> None:
    """A CUDA graph can be put around a step only if every step and micro-batch reads the same addresses."""
    sampler, rows = prepared(model, 3)
    assert isinstance(sampler.context, ReferenceContext)

    def addresses() -> list[int]:
        context = sampler.context
        assert isinstance(context, ReferenceContext)
        return [
            tensor.data_ptr()
            for tensor in (
                sampler.latents,
                sampler.timestep,
                context.text_kv,
                context.ref_kv,
                context.ref_visible,
            )
        ]

    before = addresses()
    list(sampler.denoise(rows))
    list(sampler.denoise(rows[:1]))
    assert addresses() == before


def test_later_rounds_are_read_from_the_buffers_of_the_first(model: StoryModel) -> None:
    """One capture serves all rounds with references: other values, the same addresses."""
    sampler, _ = prepared(model, 3)
    context = sampler.context
    assert isinstance(context, ReferenceContext)
    before = context.ref_kv.clone()
    shared = References(
        (), before + 1, torch.tensor([0.5]), context.ref_offsets.clone(), 4, context.text_kv.shape[1]
    )
    sampler.set_round(shared)
    assert sampler.context is context
    assert torch.equal(context.ref_kv, before + 1) and context.scale.tolist() == [0.5]


def test_reference_kv_is_one_row_for_all_rows_of_a_batch(model: StoryModel) -> None:
    sampler, _ = prepared(model, 3)
    assert isinstance(sampler.context, ReferenceContext)
    keys, values = model.layers.layers[0].keys_values(sampler.context.ref_kv)
    assert sampler.rows == 4
    assert keys.shape[0] == values.shape[0] == 1
    assert keys.data_ptr() == sampler.context.ref_kv.data_ptr()  # a view, not a copy


def test_unconditional_rows_see_one_null_block(model: StoryModel) -> None:
    sampler, rows = prepared(model, 3)
    list(sampler.denoise(rows))
    assert isinstance(sampler.context, ReferenceContext)
    assert sampler.context.ref_kv.shape[1] == (3 + 1) * model.tokens_per_ref
    assert sampler.context.ref_visible.int().tolist() == [[0, 0, 0, 1]] * 2 + [[1, 1, 1, 0]] * 2


def test_no_recompile_when_scale_or_number_of_references_change(
    sd15_folder: Path, sd15_adapter_base: Path
) -> None:
    """Both are run-time values: one compilation of the UNet serves every round and every story."""
    model = StoryModel.open(str(sd15_folder), ip_adapter=str(sd15_adapter_base))
    graphs = Counter[str]()

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        graphs["compiled"] += 1
        return graph.forward

    sampler, rows = prepared(model, 3)
    list(sampler.denoise(rows))
    context = sampler.context
    assert isinstance(context, ReferenceContext)
    torch._dynamo.reset()
    compiled = torch.compile(model.unet, backend=backend, fullgraph=True)
    latents = torch.cat([sampler.latents, sampler.latents])
    for count, scale in [(3, 0.3), (3, 0.5), (7, 0.4), (16, 0.31)]:
        blocks = count + 1
        ref_kv = torch.randn(1, blocks * 4, model.layers.width)
        visible = torch.ones(4, blocks, dtype=torch.bool)
        torch._dynamo.mark_dynamic(ref_kv, 1)
        torch._dynamo.mark_dynamic(visible, 1)
        changed = ReferenceContext(
            text_kv=context.text_kv,
            ref_kv=ref_kv,
            scale=torch.tensor([scale]),
            ref_visible=visible,
            ref_offsets=torch.tensor([0, blocks * 4], dtype=torch.int32),
            tokens_per_ref=4,
        )
        with torch.no_grad():
            compiled(
                latents,
                sampler.timestep.clone(),
                encoder_hidden_states=None,
                cross_attention_kwargs={"context": changed},
            )
    torch._dynamo.reset()
    assert graphs["compiled"] == 1


def test_scale_follows_the_linear_weighting(model: StoryModel) -> None:
    chosen = settings(iterations=3, reference_scale=(0.3, 0.5))
    events = list(iterative(model, StoryPlan(Story.from_captions(CAPTIONS[:2]), chosen), batch_sizes=[2]))
    scales = [event.reference_scale for event in events if isinstance(event, RoundStarted)]
    assert scales == pytest.approx([0.0, 0.3, 0.4, 0.5])
    assert len([event for event in events if isinstance(event, FrameDrawn)]) == 8
    assert settings(iterations=1).reference_scale_of(1) == 0.3
