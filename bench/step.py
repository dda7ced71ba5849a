"""How long a denoising step takes: `python bench/step.py sd15 sdxl --out OUT`. Full-size models, random weights, no files.

A step is the sampler's own: scheduler, guidance, UNet with references. Its seconds are those of its CUDA events; a call
that cannot be captured is an error in its row, never a time. `share` is the part of the device's time that an operator's
kernels take in an eager call, by torch's profiler.

variants  nchw: as the runtime is. channels_last: the UNet's weights in that layout. benchmark: that and cudnn.benchmark.
          compile: that and the runtime's compiled blocks (--compile on). diffusers: its own UNet call with an IP-Adapter,
          eager; diffusers-compile: the same with its transformer blocks compiled.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from random_models import SIZES, random_model
from report import Report, arguments
from stock_unet import stock_call
from timing import capture, summary, time_one
from torch._dynamo.utils import counters

from fastory import StoryModel
from fastory.conditioning.references import Group, References
from fastory.processors import compiled
from fastory.runtime import Placement
from fastory.sampling.sampler import Row, Sampler
from fastory.settings import Settings

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
VARIANTS = ("nchw", "channels_last", "benchmark", "compile", "diffusers", "diffusers-compile")
# Components by what an operator's name contains, the first that fits.
COMPONENTS = (
    ("convolution", ("conv",)),
    ("self-attention", ("attention_forward", "scaled_dot_product", "flash", "efficient_attention")),
    ("references", ("grca", "fastory::")),
    ("linear", ("addmm", "mm", "linear", "matmul")),
    ("norm", ("norm",)),
    ("activation", ("silu", "gelu", "sigmoid")),
)
MOST_REFERENCES = 8  # that a single frame sees, at least


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__, minutes=5)
    parser.add_argument("models", nargs="+", choices=list(SIZES))
    parser.add_argument("--frames", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["nchw"])
    parser.add_argument("--dtypes", nargs="+", choices=list(TYPES), default=["fp16"])
    parser.add_argument("--graphs", nargs="+", choices=("on", "off"), default=["on"])
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--share", action="store_true", help="the share of each component")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    return parser.parse_args()


class Models:
    """The last model that was made, so that the cells that need the same one share it."""

    def __init__(self, report: Report, backend: str) -> None:
        """backend: of torch.compile."""
        self.report, self.backend = report, backend
        self.key: tuple[str, str, str] | None = None
        self.model: StoryModel | None = None

    def get(self, name: str, dtype: str, variant: str, graphs: bool) -> StoryModel:
        """The model of SIZES[name]; its UNet as `variant` says."""
        if self.key != (name, dtype, variant):
            self.key, self.model = None, None  # the old weights go before the new ones come
            placement = Placement(torch.device(self.report.device), TYPES[dtype], torch.get_num_threads())
            self.model = random_model(name, placement)
            torch.backends.cudnn.benchmark = variant in ("benchmark", "compile", "diffusers-compile")
            if variant in ("channels_last", "benchmark"):
                self.model.unet.to(memory_format=torch.channels_last)
            if variant == "compile":
                torch._dynamo.reset()
                counters.clear()
                compiled.BACKEND = self.backend
                self.model = self.model.compiled
            self.key = (name, dtype, variant)
        assert self.model is not None
        self.model.placement = replace(self.model.placement, graphs=graphs)
        return self.model


@torch.inference_mode()
def loaded(model: StoryModel, frames: int, steps: int) -> tuple[Sampler, list[Row]]:
    """A sampler of `frames` frames that see each other as a later round of a story does, and its rows."""
    width, height = model.native_size
    sampler = Sampler(model, Settings(steps=steps), frames, width, height)
    negative = model.encode_negative("")
    text = model.layers.project_text(negative.tokens)
    tokens = [torch.randn_like(model.null_reference()) for _ in range(max(frames, MOST_REFERENCES))]
    references = References.of(
        [Group(tokens, 0.4, lambda i, n: True)],
        model.null_reference,
        model.layers.project_references,
        tokens_per_ref=model.tokens_per_ref,
        like=text,
    )
    sampler.set_round(references)
    rows = []
    for i in range(frames):
        caption = model.encode_caption(f"a fox {i}")
        own = references.row(i, model.layers.project_text(caption.tokens))
        rows.append(Row(i, i, caption, negative, own, references.null_row(i, text)))
    return sampler, rows


@torch.inference_mode()
def runtime_step(model: StoryModel, frames: int, steps: int, share: bool) -> dict[str, Any]:
    """A row of our own step. The first denoising compiles, warms up and captures; the second one is timed."""
    sampler, rows = loaded(model, frames, steps)
    list(sampler.denoise(rows))
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = figures(summary([seconds for _, seconds in sampler.denoise(rows)]), frames)
    found["finite"] = bool(sampler.latents.isfinite().all())
    found["compiled_graphs"] = int(counters["stats"]["unique_graphs"])
    if share:
        found["share"] = shares(model, sampler)
    return found


def figures(times: dict[str, float], frames: int) -> dict[str, Any]:
    """What is said of a step, and the memory of the device at its most. times: microseconds, p20, p50 and p80."""
    steps = 1e6 / times["p50"]
    found: dict[str, Any] = {
        "step_us": times,
        "steps_s": round(steps, 2),
        "frame_steps_s": round(frames * steps, 2),
    }
    if torch.cuda.is_available():
        found["peak_gb"] = {
            "allocated": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }
    return found


def shares(model: StoryModel, sampler: Sampler) -> dict[str, float]:
    """The share of each component in three eager UNet calls, by the time of its kernels."""
    assert sampler.inputs is not None
    activities = [torch.profiler.ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            model.predict(sampler.inputs)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    times = Counter[str]()
    kind = "self_device_time_total" if model.device.type == "cuda" else "self_cpu_time_total"
    for event in profile.key_averages():
        # Kernels are events too: what launched them has their time.
        if "::" in event.key and not event.key.startswith("void"):
            times[component(event.key)] += getattr(event, kind)
    whole = times.total() or 1
    return {name: round(time / whole, 3) for name, time in times.most_common()}


def component(operator: str) -> str:
    """The component that an operator's name belongs to."""
    return next((name for name, parts in COMPONENTS if any(part in operator for part in parts)), "other")


@torch.inference_mode()
def peer_step(model: StoryModel, frames: int, variant: str, graphs: bool, backend: str) -> dict[str, Any]:
    """A row of diffusers' UNet call of the same sizes, without a scheduler: it is the larger part of its step."""
    call = stock_call(
        model, frames, max(frames, MOST_REFERENCES), backend if variant == "diffusers-compile" else None
    )
    call()
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = time_one(capture([call]) if graphs and cuda else call, model.device.type, samples=10)
    return figures(times, frames) | {"what": "the UNet call alone"}


def main() -> int:
    """Writes step.jsonl, the cells in the order in which the arguments name them."""
    options = parse()
    report = Report("step", options)
    models = Models(report, options.backend)
    for name, dtype, variant, graphs, frames in itertools.product(
        options.models, options.dtypes, options.variants, options.graphs, options.frames
    ):
        captured = graphs == "on" and report.gpu
        cell = {"model": name, "dtype": dtype, "variant": variant, "frames": frames, "graphs": captured}
        report.cell(cell, partial(measure, models, options, name, dtype, variant, captured, frames))
    return report.close()


def measure(
    models: Models,
    options: argparse.Namespace,
    name: str,
    dtype: str,
    variant: str,
    captured: bool,
    frames: int,
) -> dict[str, Any]:
    """What one cell found."""
    model = models.get(name, dtype, variant, captured)
    if variant.startswith("diffusers"):
        return peer_step(model, frames, variant, captured, options.backend)
    return runtime_step(model, frames, options.steps, options.share and not captured and variant != "compile")


if __name__ == "__main__":
    sys.exit(main())
