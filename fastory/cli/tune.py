"""`fastory tune`: causal mode learns from stories with pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from fastory import packages
from fastory.cli.options import (
    METHOD,
    MODEL,
    NAMED_MODELS,
    OUTPUT,
    PICTURE,
    RUN,
    Device,
    ImageEncoder,
    IpAdapter,
    JsonLines,
    Offline,
    Quiet,
    among,
    choice,
    option,
)
from fastory.cli.progress import show_json, show_tuning
from fastory.cli.reporting import quiet_libraries, reported
from fastory.tuning.sizes import SIZES, HistorySizes, Tuning

OF_A_NEW_ENCODER = ("frame_tokens", "positions", "local_heads", "bottleneck")

Stories = Annotated[
    Path,
    typer.Argument(
        help="A folder of story folders, each story.yaml (or .txt, .json) and frame-000.png .. or frames/frame-000.png ..",
        show_default=False,
    ),
]
Output = Annotated[
    Path, option(OUTPUT, "--output", "-o", help="The adapter to write (.safetensors), for --adapter.")
]
Model = Annotated[
    str,
    option(
        MODEL,
        autocompletion=among(NAMED_MODELS),
        help=f"The base: {', '.join(NAMED_MODELS)}, a diffusers folder, or a hub id.",
    ),
]
Adapter = Annotated[str | None, option(MODEL, help="An adapter to start from (.safetensors).")]
HistorySize = Annotated[str | None, choice(MODEL, SIZES, help="Make the history encoder new.")]
FrameTokens = Annotated[int | None, option(MODEL, help="Tokens of a frame (new encoder).")]
Positions = Annotated[int | None, option(MODEL, help="Frames of the longest window (new encoder).")]
LocalHeads = Annotated[int | None, option(MODEL, help="Heads of the local causal attention, 0 for none.")]
Bottleneck = Annotated[int | None, option(MODEL, help="Width of the bottleneck adapter, 0 for none.")]
Rank = Annotated[int | None, option(METHOD, help="Of the UNet's low-rank updates, 0 for none (default 8).")]
SelfAttention = Annotated[
    bool, option(METHOD, "--self-attention", help="Low-rank updates of self-attention too.")
]
FreezeEncoder = Annotated[
    bool, option(METHOD, "--freeze-encoder", help="Of the history encoder train what follows Blip alone.")
]
Window = Annotated[
    str,
    option(
        METHOD,
        metavar="L_M",
        autocompletion=among(["random", "all"]),
        help="random (the default: another one every step), all, or a number.",
    ),
]
Dropout = Annotated[float, option(METHOD, help="Share trained without conditions (default 0.1).")]
HighNoise = Annotated[float, option(METHOD, help="Share of frames trained at high noise alone (default 0).")]
Imitate = Annotated[
    int,
    option(
        METHOD,
        help="First steps that learn from --ip-adapter, or the one that the base brings (default 0).",
    ),
]
ImitateScale = Annotated[
    float, option(METHOD, help="Weight of the references that are imitated (default 0.5).")
]
Contrast = Annotated[
    float,
    option(METHOD, help="Weight of what tells stories with the same captions apart (default 0)."),
]
Patches = Annotated[
    float, option(METHOD, help="Share of frames with patches of such a story, to be removed (default 0).")
]
FirstFrames = Annotated[float, option(METHOD, help="Share of frames trained as a story's first (default 0).")]
Preserve = Annotated[
    float,
    option(METHOD, help="Weight of staying with the base where there is no history (default 0)."),
]
Steps = Annotated[int, option(METHOD, help="Optimizer steps (default 1000).")]
BatchSize = Annotated[int, option(METHOD, help="Stories a step (default 4).")]
Frames = Annotated[int, option(METHOD, help="Most frames of a story in a step (default 8).")]
LearningRate = Annotated[float, option(METHOD, help="Of AdamW (default 1e-4).")]
Warmup = Annotated[int, option(METHOD, help="Steps in which it rises (default 100).")]
EmaDecay = Annotated[float, option(METHOD, help="Of the averaged weights (default 0.999).")]
Seed = Annotated[int, option(METHOD, help="Of weights, order and noise (default 0).")]
Width = Annotated[int | None, option(PICTURE, help="Pixels (default: the model's own).")]
Height = Annotated[int | None, option(PICTURE, help="Pixels (default: the model's own).")]
SaveEvery = Annotated[int, option(RUN, help="Steps between checkpoints (default 100).")]
ValidateEvery = Annotated[
    int, option(RUN, help="Steps between validation pictures, 0 for none (default 500).")
]
Validation = Annotated[
    int, option(RUN, help="Stories, the last by name, that are kept out of training (default 0).")
]
Overwrite = Annotated[bool, option(OUTPUT, "--overwrite", help="Tune anew what the output's folder holds.")]


def tune(
    stories: Stories,
    output: Output,
    model: Model = "builtin",
    adapter: Adapter = None,
    ip_adapter: IpAdapter = None,
    image_encoder: ImageEncoder = None,
    offline: Offline = False,
    history_size: HistorySize = None,
    frame_tokens: FrameTokens = None,
    positions: Positions = None,
    local_heads: LocalHeads = None,
    bottleneck: Bottleneck = None,
    rank: Rank = None,
    self_attention: SelfAttention = False,
    freeze_encoder: FreezeEncoder = False,
    window: Window = "random",
    dropout: Dropout = 0.1,
    high_noise: HighNoise = 0.0,
    imitate: Imitate = 0,
    imitate_scale: ImitateScale = 0.5,
    contrast: Contrast = 0.0,
    patches: Patches = 0.0,
    first_frames: FirstFrames = 0.0,
    preserve: Preserve = 0.0,
    steps: Steps = 1000,
    batch_size: BatchSize = 4,
    frames: Frames = 8,
    learning_rate: LearningRate = 0.0001,
    warmup: Warmup = 100,
    ema_decay: EmaDecay = 0.999,
    seed: Seed = 0,
    width: Width = None,
    height: Height = None,
    device: Device = "auto",
    save_every: SaveEvery = 100,
    validate_every: ValidateEvery = 500,
    validation: Validation = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_lines: JsonLines = False,
) -> None:
    """Tune causal mode on stories with pictures; the base's own weights stay as they are.

    Writes one file for --adapter; losses and pictures for TensorBoard, and what a resume needs, lie in <output>.tuning.
    The same command goes on where a tuning was interrupted.
    """
    requested = locals()
    with reported(resumable=True, kept="Checkpoints"):
        events = tuned(requested)
        if os.environ.get("RANK", "0") != "0":  # under torchrun the first process prints for all
            for _ in events:
                pass
        elif json_lines:
            show_json(events)
        else:
            show_tuning(events, quiet)


def tuned(requested: Mapping[str, Any]) -> Iterator[Any]:
    """The events of the tuning that these options name. Raises InputError, before PyTorch is imported where that can be."""
    packages.require("fastory tune", "tune", "tensorboard")
    from fastory import door

    window = requested["window"]
    values = {field.name: requested[field.name] for field in fields(Tuning) if field.name in requested}
    values["window"] = int(window) if window.isdecimal() and len(window) < 10 else window
    tuning = Tuning(**values)
    encoder = HistorySizes(
        requested["history_size"], **{field: requested[field] for field in OF_A_NEW_ENCODER}
    )
    door.check_placement(requested["device"])
    door.check_tuning(requested["stories"], requested["output"], tuning, encoder)
    named = {name: requested[name] for name in ("model", "adapter", "ip_adapter", "image_encoder")}
    door.check_model(**named)
    quiet_libraries()
    if requested["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from fastory.tuning.loop import tune as start

    return start(
        requested["stories"],
        requested["output"],
        **named,
        tuning=tuning,
        sizes=encoder,
        held_out=requested["validation"],
        device=requested["device"],
        overwrite=requested["overwrite"],
        offline=requested["offline"],
    )
