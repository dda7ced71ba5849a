"""`fastory generate`: stories drawn into run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastory.cli.options import (
    METHOD,
    MODEL,
    OUTPUT,
    PICTURE,
    RUN,
    SAMPLING,
    Adapter,
    Config,
    Device,
    ImageEncoder,
    IpAdapter,
    Loras,
    ModelName,
    Offline,
    open_engine,
    open_model,
    option,
)
from fastory.cli.progress import show
from fastory.cli.reporting import reported
from fastory.errors import InputError


def generate(
    stories: Annotated[
        list[str] | None,
        typer.Argument(
            help="Story files (.txt, .yaml, .json), or names of bundled examples. None: the first example.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[str | None, option(METHOD, help="iterative (the default) or causal.")] = None,
    preset: Annotated[
        str | None, option(METHOD, help="paper, story-iter, story-iter-fast or ar-ldm.")
    ] = None,
    iterations: Annotated[int | None, option(METHOD, help="Rounds after round 0.")] = None,
    reference_scale: Annotated[
        str | None,
        option(METHOD, metavar="FIRST:LAST", help="Weight of the references, first to last round."),
    ] = None,
    references: Annotated[
        str | None, option(METHOD, help="Frames of the last round that a frame sees: all, others or cast.")
    ] = None,
    reference_fit: Annotated[
        str | None, option(METHOD, help="How a reference that is not square is fitted: pad, squash or crop.")
    ] = None,
    reference_start: Annotated[
        int | None, option(METHOD, help="First round that sees the pictures of characters (default 1).")
    ] = None,
    window: Annotated[
        str | None, option(METHOD, metavar="L_M", help="Causal: earlier frames that a frame sees, or all.")
    ] = None,
    drafts: Annotated[
        int | None, option(METHOD, help="Causal: how often frame 0 is drawn before it is kept (default 0).")
    ] = None,
    first_frame: Annotated[
        Path | None, option(METHOD, help="Causal: the picture that the story goes on from, as its frame 0.")
    ] = None,
    model: ModelName = "builtin",
    config: Config = None,
    ip_adapter: IpAdapter = None,
    image_encoder: ImageEncoder = None,
    adapter: Adapter = None,
    lora: Loras = None,
    engine: Annotated[
        Path | None, option(MODEL, help="What `fastory export` wrote, in place of a model.")
    ] = None,
    trust_cache: Annotated[
        bool,
        option(
            MODEL,
            "--trust-cache",
            help="With --engine: hash no file again that is as it was when it was hashed.",
        ),
    ] = False,
    offline: Offline = False,
    steps: Annotated[int | None, option(SAMPLING, help="Denoising steps.")] = None,
    inner_steps: Annotated[
        int | None, option(SAMPLING, help="Steps of every round but the last (default 0: as many).")
    ] = None,
    guidance_scale: Annotated[float | None, option(SAMPLING, help="Classifier-free guidance.")] = None,
    scheduler: Annotated[
        str | None,
        option(SAMPLING, help="ddim, ddim-leading, lcm, euler, euler-ancestral, dpm++, unipc or pndm."),
    ] = None,
    seed: Annotated[int | None, option(SAMPLING, help="Seed of the initial noise.")] = None,
    noise: Annotated[str | None, option(SAMPLING, help="shared by all frames, or per-frame.")] = None,
    style: Annotated[
        str | None, option(PICTURE, help="comic, film, realistic, none, or any text with {prompt}.")
    ] = None,
    negative_prompt: Annotated[str | None, option(PICTURE, help="What the pictures should not show.")] = None,
    width: Annotated[int | None, option(PICTURE, help="Pixels.")] = None,
    height: Annotated[int | None, option(PICTURE, help="Pixels.")] = None,
    dtype: Annotated[str, option(RUN, help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Device = "auto",
    graphs: Annotated[
        str, option(RUN, help="auto (a CUDA graph around a UNet call, on CUDA) or off.")
    ] = "auto",
    batch_size: Annotated[
        int | None, option(RUN, help="Frames at once (default: chosen from free memory).")
    ] = None,
    output: Annotated[
        Path | None, option(OUTPUT, "--output", "-o", help="Run folder (default: under ./stories).")
    ] = None,
    overwrite: Annotated[
        bool, option(OUTPUT, "--overwrite", help="Draw anew what the run folder holds.")
    ] = False,
    frames: Annotated[
        str | None,
        option(
            OUTPUT,
            metavar="3,7-9",
            help="Redraw only these frames of a finished run; counted from 0. 5- is all from 5 on.",
        ),
    ] = None,
    redraw_seed: Annotated[
        int | None, option(OUTPUT, help="Another seed for the frames of --frames.")
    ] = None,
    quiet: Annotated[bool, option(OUTPUT, "--quiet", help="Print the run folder and nothing else.")] = False,
    json_lines: Annotated[bool, option(OUTPUT, "--json", help="Print events as JSON lines.")] = False,
) -> None:
    """Draw stories: every picture of every round, a contact sheet and a storybook page, in a run folder.

    The same command goes on where a run was interrupted.
    """
    settings = {
        "mode": mode,
        "iterations": iterations,
        "reference_scale": reference_scale,
        "references": references,
        "reference_fit": reference_fit,
        "reference_start": reference_start,
        "window": window,
        "drafts": drafts,
        "steps": steps,
        "inner_steps": inner_steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "seed": seed,
        "noise": noise,
        "style": style,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
    }
    with reported(resumable=True):
        from fastory import door
        from fastory.settings import check_placement

        if redraw_seed is not None and frames is None:
            raise InputError("--redraw-seed wants --frames: which frames are to be redrawn?")
        chosen = door.parse_frames(frames)
        door.check_flags(settings, preset)
        check_placement(device, dtype, graphs)
        if batch_size is not None and batch_size < 1:
            raise InputError(f"--batch-size: wanted 1 or more, got {batch_size}")
        read = read_stories(stories or [])
        door.check_stories(read, style)
        if first_frame is not None:
            door.check_first_frame(first_frame)
        door.check_output(output, read)
        if engine is not None:
            beside = {"--config": config, "--ip-adapter": ip_adapter, "--image-encoder": image_encoder,
                      "--adapter": adapter, "--lora": lora, "--model": model if model != "builtin" else None}  # fmt: skip
            if given := [name for name, value in beside.items() if value]:
                raise InputError(f"--engine holds the whole model; {given[0]} is given when it is exported")
            door.check_engine(engine)
            opened = open_engine(engine, device, dtype, trust_cache)
        elif trust_cache:
            raise InputError("--trust-cache is for --engine; a model's hashes are always remembered")
        else:
            opened = open_model(
                model, config, ip_adapter, image_encoder, adapter, lora or [], device, dtype, graphs, offline
            )
        from fastory.runs.generate import generate as draw

        events = draw(
            read,
            model=opened,
            preset=preset,
            output=output,
            under=Path("stories"),
            overwrite=overwrite,
            frames=chosen,
            redraw_seed=redraw_seed,
            batch_size=batch_size,
            first_frame=first_frame,
            **settings,
        )
        show(events, quiet=quiet, json_lines=json_lines)


def read_stories(names: list[str]) -> list[Any]:
    """Story files, and bundled examples by name."""
    from fastory.builtin import DEFAULT_EXAMPLE, EXAMPLES
    from fastory.files import check_names_fit
    from fastory.story import Story

    check_names_fit([Path(name) for name in names])
    names = names or [DEFAULT_EXAMPLE]
    return [
        Story.read(EXAMPLES[name] if name in EXAMPLES and not Path(name).exists() else Path(name))
        for name in names
    ]
