"""Memory of frames that see other frames, by their number: `python bench/memory.py --out bench/results/memory-cpu.json`.

With `--plot FILE.svg` as a plot, too; with `--of bench/results/memory-cpu.json` of what was measured before.

Story-Adapter (arXiv 2410.06244, figure 8) compares global reference cross-attention (GRCA) with Consistent Self-Attention
(CSA, arXiv 2405.01434) by the number of frames. Counted here, not timed, is what a UNet call holds for the other frames:

grca        K and V of N references in all layers, which every row shares; 4 frames in a call
csa         K and V of the largest layer, each frame's own beside those it samples of all others; N frames in a call
csa window  the same of a bank of 4 frames and one later frame, as --mode consistent draws, whatever N is

`traced` is the peak of what PyTorch allocates during a call of the largest attention layer of the built-in UNet, both halves of
guidance, grca with the K and V that are held; `alone` is that of the same frames without the others. Bytes by formula are
of the built-in UNet in float32 and of SD1.5 and SDXL in float16.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from random_models import SIZES
from results import environment
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from fastory import StoryModel
from fastory.conditioning.consistent import FrameSamples
from fastory.conditioning.context import Context
from fastory.conditioning.references import Group, References
from fastory.processors.consistent import self_attention_levels

FRAMES = (4, 10, 25, 50, 100)
BANK, RATE, TOKENS, HALVES, AT_ONCE = 4, 0.5, 4, 2, 4


@dataclass(frozen=True)
class UnetShape:
    """What the formulas need. side: of the latents; levels: (times that it was halved, channels) of self-attention layers;

    width: W, of K and V of all cross-attention layers; itemsize: bytes of a value.
    """

    side: int
    levels: tuple[tuple[int, int], ...]
    width: int
    itemsize: int

    @classmethod
    def of(cls, unet: Any, itemsize: int) -> UnetShape:
        """Of a UNet, which may be without memory."""
        channels = unet.config.block_out_channels
        names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
        width = 2 * sum(unet.get_submodule(name.removesuffix(".processor")).inner_dim for name in names)
        levels = tuple((level, channels[level]) for level in self_attention_levels(unet))
        return cls(unet.config.sample_size, levels, width, itemsize)

    def tokens(self, level: int) -> int:
        """L of a layer."""
        return (self.side // 2**level) ** 2


def grca_bytes(shape: UnetShape, frames: int) -> int:
    """K and V of `frames` references and the null block, all layers."""
    return (frames + 1) * TOKENS * shape.width * shape.itemsize


def csa_bytes(shape: UnetShape, bank: int, later: int) -> int:
    """K and V that the rows of the largest layer attend to: their own tokens and the sampled ones."""
    largest = 0
    for level, channels in shape.levels:
        tokens = shape.tokens(level)
        keys = bank * (tokens + round(RATE * (bank - 1) * tokens)) + later * (
            tokens + round(RATE * bank * tokens)
        )
        largest = max(largest, HALVES * keys * 2 * channels * shape.itemsize)
    return largest


def kept_bytes(shape: UnetShape, layers: Mapping[int, int], steps: int) -> int:
    """What --mode consistent would keep of its bank in place of denoising it again. layers: self-attention layers by level."""
    values = sum(layers[level] * shape.tokens(level) * channels for level, channels in shape.levels)
    return HALVES * BANK * values * steps * shape.itemsize


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that PyTorch had allocated at once during `call`, beyond what it had before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    assert profiled.profiler is not None
    allocations, todo = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
    live = peak = 0
    for _, size in sorted(allocations):
        live += size
        peak = max(peak, live)
    return peak


def layer_call(model: StoryModel, kind: str, context: Context | None, frames: int) -> Callable[[], object]:
    """The largest attention layer of a kind, attn1 or attn2, with its projections, for both halves of guidance."""
    layers = [
        model.unet.get_submodule(name.removesuffix(".processor"))
        for name in model.unet.attn_processors
        if name.endswith(f"{kind}.processor")
    ]
    shape, layer = UnetShape.of(model.unet, 4), layers[0]  # the first one has the most pixels
    hidden = torch.randn(HALVES * frames, shape.tokens(shape.levels[0][0]), layer.inner_dim)
    return lambda: layer.processor(layer, hidden, context=context)


def texts(model: StoryModel, pictures: int) -> References:
    """A caption, and so many references of noise."""
    like = model.layers.project_text(model.encode_caption("a fox").tokens)
    null = model.null_reference()
    tokens = [torch.randn_like(null) for _ in range(pictures)]
    groups = [Group(tokens, 0.5, lambda i, j: True)] if pictures else []
    return References.of(
        groups, lambda: null, model.layers.project_references, tokens_per_ref=TOKENS, like=like
    )


def with_references(model: StoryModel, pictures: int, frames: int) -> tuple[Context, int]:
    """A call's context with references that all rows see, and the bytes of their K and V."""
    shared = texts(model, pictures)
    context = shared.context(HALVES * frames)
    for n in range(HALVES * frames):
        row = shared.row if n >= frames else shared.null_row
        context.put(n, row(0, torch.zeros(1, context.text_kv.shape[1], context.text_kv.shape[2])))
    return context, context.ref_kv.nbytes


def with_frames(model: StoryModel, bank: int, later: int) -> Context:
    """A call's context whose rows see each other's tokens."""
    tokens = [UnetShape.of(model.unet, 4).tokens(level) for level in model.self_attention_levels()]
    samples = FrameSamples.of(
        texts(model, 0),
        [(i, 0) for i in range(bank + later)],
        bank,
        tokens=tokens,
        rate=RATE,
        calls=1,
        device=torch.device("cpu"),
    )
    context = samples.context(HALVES * (bank + later))
    context.write(samples.calls[0])
    return context


@torch.inference_mode()
def traced(model: StoryModel, frames: int) -> dict[str, dict[str, int]]:
    """Peaks of a layer's call of each way and of plain frames, and the bytes of the references' K and V as they lie there."""
    references, held = with_references(model, frames, AT_ONCE)
    peaks = {
        "grca": {"held": held, "peak": peak_bytes(layer_call(model, "attn2", references, AT_ONCE)) + held}
    }
    for way, bank, later in (("csa", frames, 0), ("csa window", BANK, 1)):
        context = with_frames(model, bank, later)
        peaks[way] = {"peak": peak_bytes(layer_call(model, "attn1", context, bank + later))}
    alone = (
        ("grca", "attn2", with_references(model, 0, AT_ONCE)[0], AT_ONCE),
        ("csa", "attn1", None, frames),
    )
    for way, kind, nothing, count in (*alone, ("csa window", "attn1", None, BANK + 1)):
        peaks[way]["alone"] = peak_bytes(layer_call(model, kind, nothing, count))
    return peaks


def shapes(model: StoryModel) -> dict[str, UnetShape]:
    """The built-in UNet in float32, and those of full size, without memory, in float16."""
    found = {"built-in": UnetShape.of(model.unet, 4)}
    for name in ("sd15", "sdxl"):
        with torch.device("meta"):
            found[name] = UnetShape.of(UNet2DConditionModel(**SIZES[name].unet), 2)
    return found


def row(model: StoryModel, known: Mapping[str, UnetShape], frames: int) -> dict[str, Any]:
    """All figures of one number of frames, in bytes."""
    by_formula = {
        name: {
            "grca": grca_bytes(shape, frames),
            "csa": csa_bytes(shape, frames, 0),
            "csa window": csa_bytes(shape, BANK, 1),
        }
        for name, shape in known.items()
    }
    return {"frames": frames, "formula": by_formula, "traced": traced(model, frames)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in MiB."""

    def mib(count: int) -> str:
        return f"{count / 2**20:,.1f}"

    ways = ("grca", "csa", "csa window")
    lines = [
        "| frames | traced: grca / csa / csa window | alone | SD1.5 512 px: grca / csa / csa window | SDXL 1024 px |",
        "|---|---|---|---|---|",
    ]
    for found in rows:
        peaks = found["traced"]
        cells = [
            " / ".join(mib(peaks[way]["peak"]) for way in ways),
            " / ".join(mib(peaks[way]["alone"]) for way in ways),
            *(" / ".join(mib(found["formula"][name][way]) for way in ways) for name in ("sd15", "sdxl")),
        ]
        lines.append(f"| {found['frames']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Figure 8 in bytes: what was traced on the built-in UNet, and by formula on SD1.5, by the number of frames."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    frames = [found["frames"] for found in rows]
    titles = {"grca": "GRCA", "csa": "Consistent Self-Attention", "csa window": "... in windows of 4 and 1"}
    traced = {way: [found["traced"][way]["peak"] for found in rows] for way in titles}
    formula = {way: [found["formula"]["sd15"][way] for found in rows] for way in titles}
    figure = Figure((8, 3.4), layout="constrained")
    panels = (
        ("traced peak of the largest layer, built-in UNet, float32", traced),
        ("by formula, SD1.5, 512 px, float16", formula),
    )
    for axes, (title, found) in zip(figure.subplots(1, 2), panels, strict=True):
        for way, label in titles.items():
            axes.plot(frames, [count / 2**20 for count in found[way]], marker="o", markersize=4, label=label)
        axes.set(title=title, xlabel="frames that see each other", ylabel="MiB", xscale="log", yscale="log")
        axes.title.set_fontsize(9)
        axes.set_xticks(frames, labels=map(str, frames))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with rc_context({"svg.hashsalt": "fastory"}):
        figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Print the table, and write every figure where --out says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", nargs="+", type=int, default=list(FRAMES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG of figure 8; wants matplotlib")
    parser.add_argument("--of", type=Path, help="plot what --out wrote there, and measure nothing")
    options = parser.parse_args()
    if options.of:
        plot(json.loads(options.of.read_text(encoding="utf-8"))["rows"], options.plot)
        return
    model = StoryModel.open("builtin", device="cpu")
    known = shapes(model)
    rows = [row(model, known, frames) for frames in options.frames]
    print(table(rows))
    sd15_layers = {
        0: 5,
        1: 5,
        2: 5,
        3: 1,
    }  # two of each block on the way down, three on the way up, one in the middle
    kept = kept_bytes(known["sd15"], sd15_layers, 50)
    print(f"a bank of {BANK} frames kept for 50 steps, SD1.5 512 px: {kept / 2**30:.1f} GiB")
    if options.out:
        data = {**environment("cpu"), "gpu": False, "rows": rows, "bank_kept_sd15": kept}
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
