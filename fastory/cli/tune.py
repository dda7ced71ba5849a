"""`fastory tune`: causal mode learns from stories with pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fastory import packages
from fastory.cli.options import (
    METHOD,
    MODEL,
    OUTPUT,
    PICTURE,
    RUN,
    Device,
    ImageEncoder,
    IpAdapter,
    Offline,
    option,
)
from fastory.cli.progress import show_tuning
from fastory.cli.reporting import quiet_libraries, reported


def tune(
    stories: Annotated[
        Path,
        typer.Argument(
            help="A folder of story folders, each story.yaml (or .txt, .json) and frame-000.png .. or frames/frame-000.png ..",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, option(OUTPUT, "--output", "-o", help="The adapter to write (.safetensors), for --adapter.")
    ],
    model: Annotated[
        str, option(MODEL, help="The base: builtin, a diffusers folder, or a hub id.")
    ] = "builtin",
    adapter: Annotated[str | None, option(MODEL, help="An adapter to start from (.safetensors).")] = None,
    ip_adapter: IpAdapter = None,
    image_encoder: ImageEncoder = None,
    offline: Offline = False,
    history_size: Annotated[
        str | None, option(MODEL, help="Make the history encoder new: small, medium or base.")
    ] = None,
    frame_tokens: Annotated[int | None, option(MODEL, help="Tokens of a frame (new encoder).")] = None,
    positions: Annotated[
        int | None, option(MODEL, help="Frames of the longest window (new encoder).")
    ] = None,
    local_heads: Annotated[
        int | None, option(MODEL, help="Heads of the local causal attention, 0 for none.")
    ] = None,
    bottleneck: Annotated[
        int | None, option(MODEL, help="Width of the bottleneck adapter, 0 for none.")
    ] = None,
    rank: Annotated[
        int | None, option(METHOD, help="Of the UNet's low-rank updates, 0 for none (default 8).")
    ] = None,
    self_attention: Annotated[
        bool, option(METHOD, "--self-attention", help="Low-rank updates of self-attention too.")
    ] = False,
    freeze_encoder: Annotated[
        bool, option(METHOD, "--freeze-encoder", help="Of the history encoder train what follows Blip alone.")
    ] = False,
    window: Annotated[
        str,
        option(METHOD, metavar="L_M", help="random (the default: another one every step), all, or a number."),
    ] = "random",
    dropout: Annotated[float, option(METHOD, help="Share trained without conditions (default 0.1).")] = 0.1,
    high_noise: Annotated[
        float, option(METHOD, help="Share of frames trained at high noise alone (default 0).")
    ] = 0.0,
    imitate: Annotated[
        int,
        option(
            METHOD,
            help="First steps that learn from --ip-adapter, or the one that the base brings (default 0).",
        ),
    ] = 0,
    imitate_scale: Annotated[
        float, option(METHOD, help="Weight of the references that are imitated (default 0.5).")
    ] = 0.5,
    contrast: Annotated[
        float,
        option(METHOD, help="Weight of what tells stories with the same captions apart (default 0)."),
    ] = 0.0,
    patches: Annotated[
        float, option(METHOD, help="Share of frames with patches of such a story, to be removed (default 0).")
    ] = 0.0,
    first_frames: Annotated[
        float, option(METHOD, help="Share of frames trained as a story's first (default 0).")
    ] = 0.0,
    preserve: Annotated[
        float,
        option(METHOD, help="Weight of staying with the base where there is no history (default 0)."),
    ] = 0.0,
    steps: Annotated[int, option(METHOD, help="Optimizer steps (default 1000).")] = 1000,
    batch_size: Annotated[int, option(METHOD, help="Stories a step (default 4).")] = 4,
    frames: Annotated[int, option(METHOD, help="Most frames of a story in a step (default 8).")] = 8,
    learning_rate: Annotated[float, option(METHOD, help="Of AdamW (default 1e-4).")] = 1e-4,
    warmup: Annotated[int, option(METHOD, help="Steps in which it rises (default 100).")] = 100,
    ema_decay: Annotated[float, option(METHOD, help="Of the averaged weights (default 0.999).")] = 0.999,
    seed: Annotated[int, option(METHOD, help="Of weights, order and noise (default 0).")] = 0,
    width: Annotated[int | None, option(PICTURE, help="Pixels (default: the model's own).")] = None,
    height: Annotated[int | None, option(PICTURE, help="Pixels (default: the model's own).")] = None,
    device: Device = "auto",
    save_every: Annotated[int, option(RUN, help="Steps between checkpoints (default 100).")] = 100,
    validate_every: Annotated[
        int, option(RUN, help="Steps between validation pictures, 0 for none (default 500).")
    ] = 500,
    validation: Annotated[
        int, option(RUN, help="Stories, the last by name, that are kept out of training (default 0).")
    ] = 0,
    overwrite: Annotated[
        bool, option(OUTPUT, "--overwrite", help="Tune anew what the output's folder holds.")
    ] = False,
    quiet: Annotated[bool, option(OUTPUT, "--quiet", help="Print the adapter and nothing else.")] = False,
) -> None:
    """Tune causal mode on stories with pictures; the base's own weights stay as they are.

    Writes one file for --adapter; losses and pictures for TensorBoard, and what a resume needs, lie in <output>.tuning.
    The same command goes on where a tuning was interrupted.
    """
    with reported(resumable=True, kept="Checkpoints"):
        packages.require("fastory tune", "tune", "tensorboard")
        from fastory import door
        from fastory.settings import check_placement
        from fastory.tuning.sizes import HistorySizes, Tuning

        check_placement(device, "auto", "auto")
        door.check_paths({"STORIES": stories, "--output": output})
        tuning = Tuning(
            steps=steps,
            batch_size=batch_size,
            frames=frames,
            learning_rate=learning_rate,
            warmup=warmup,
            rank=rank,
            self_attention=self_attention,
            freeze_encoder=freeze_encoder,
            window=int(window) if window.isdecimal() and len(window) < 10 else window,
            dropout=dropout,
            high_noise=high_noise,
            imitate=imitate,
            imitate_scale=imitate_scale,
            contrast=contrast,
            patches=patches,
            first_frames=first_frames,
            preserve=preserve,
            ema_decay=ema_decay,
            save_every=save_every,
            validate_every=validate_every,
            seed=seed,
            width=width,
            height=height,
        )
        encoder = HistorySizes(history_size, frame_tokens, positions, local_heads, bottleneck)
        door.check_tuning(stories, output, tuning, encoder)
        door.check_model(model, ip_adapter=ip_adapter, image_encoder=image_encoder, adapter=adapter)
        quiet_libraries()
        if offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        from fastory.tuning.loop import tune as start

        events = start(
            stories,
            output,
            model=model,
            adapter=adapter,
            ip_adapter=ip_adapter,
            image_encoder=image_encoder,
            tuning=tuning,
            sizes=encoder,
            held_out=validation,
            device=device,
            overwrite=overwrite,
            offline=offline,
        )
        show_tuning(events, quiet)
