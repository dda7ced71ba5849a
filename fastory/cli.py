"""The command line: parse, call, print."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # `python -m fastory.cli`: what follows is imported where Ctrl-C is met
    from fastory.__main__ import main as interruptible

    interruptible()
    sys.exit()

import difflib
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperCommand, TyperGroup

from fastory import __version__, packages
from fastory.errors import FastoryError, InputError
from fastory.threads import wait_passively
from fastory.wording import counted, last_words

if TYPE_CHECKING:
    from fastory.events import Event, FrameDrawn


class Command(TyperCommand):
    """A command that, of the options it knows, names those alone that are near a misspelt one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """click finds --pdf near --drafts: the dashes count there."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if isinstance(near := getattr(error, "possibilities", None), list):
                name = getattr(error, "option_name", "").lstrip("-")
                words = {option.lstrip("-"): option for option in near}
                error.possibilities = [words[word] for word in difflib.get_close_matches(name, words)]  # type: ignore[attr-defined]
            raise


class Commands(TyperGroup):
    """The commands; --debug counts before a command's name and after it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """--debug, wherever it stands before a bare --, is the group's."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(arg for arg in args[:end] if arg != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Captions in, a consistent sequence of pictures out.",
    epilog="Exit codes: 0 done; 1 something ran out, or a library failed; 2 what was asked for cannot be done; 3 an export "
    "whose engines have to be built elsewhere; 130 stopped by Ctrl-C, and the same command goes on.",
)
stderr = Console(stderr=True, highlight=False)

STORY, MODEL, METHOD, SAMPLING, PICTURE, TENSORRT, RUN, OUTPUT = (
    "Story",
    "Model",
    "Method",
    "Sampling",
    "Picture",
    "TensorRT",
    "Running",
    "Output",
)


def option(panel: str, *names: str, **extra: Any) -> Any:
    """A Typer option in a help panel."""
    return typer.Option(*names, rich_help_panel=panel, show_default=False, **extra)


def print_version(wanted: bool) -> None:
    """--version: the version on stdout, and nothing else is done."""
    if wanted:
        say(f"fastory {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What every command takes."""
    global debugging
    debugging = debug


debugging = False


@contextmanager
def reported(resumable: bool = False, kept: str = "Finished pictures") -> Iterator[None]:
    """Print what a user did wrong, or what ran out, as one message; exit code 2, 1, or 130 for Ctrl-C.

    What a library raises is one line as well, exit code 1; with --debug every error's traceback stands before its line.
    """
    try:
        yield
    except typer.Exit:
        raise
    except FastoryError as error:
        raise failed(error, str(error), error.exit_code) from None
    except BrokenPipeError:
        drop_stdout()  # whoever read our lines is gone
        raise typer.Exit(1) from None
    except (Exception, KeyboardInterrupt) as error:
        if was_interrupted(error):
            hint = f" {kept} are kept; the same command goes on from them." if resumable else ""
            stderr.print(f"[bold]stopped.[/]{hint}", soft_wrap=True)
            raise typer.Exit(130) from None
        hint = "" if debugging else "; run with --debug for the traceback"
        raise failed(error, f"{last_words(error)}{hint}", 1) from None


def failed(error: BaseException, text: str, code: int) -> typer.Exit:
    """Print an error; returns what ends the command with `code`."""
    if debugging:
        stderr.print(escape("".join(traceback.format_exception(error))), soft_wrap=True, end="")
    stderr.print(f"[bold red]error:[/] {_plain(text)}", soft_wrap=True)
    return typer.Exit(code)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what happened: a library that is being imported may make another error of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def say(text: str) -> None:
    """A line of results on stdout. Raises FastoryError where it cannot be written, as on a full disk."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_stdout()
        raise FastoryError(f"stdout could not be written: {error.strerror or error}") from error


def drop_stdout() -> None:
    """Keep Python from failing once more while it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command(cls=Command)
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
    model: Annotated[
        str,
        option(MODEL, help="builtin, a diffusers folder, a .safetensors file (with --config), or a hub id."),
    ] = "builtin",
    config: Annotated[
        Path | None, option(MODEL, help="Folder with the configuration of a single .safetensors file.")
    ] = None,
    ip_adapter: Annotated[str | None, option(MODEL, help="IP-Adapter weights (.safetensors).")] = None,
    image_encoder: Annotated[str | None, option(MODEL, help="Folder of the CLIP image encoder.")] = None,
    adapter: Annotated[
        str | None, option(MODEL, help="Causal: what `fastory tune` wrote (.safetensors).")
    ] = None,
    lora: Annotated[
        list[str] | None, option(MODEL, metavar="PATH[:WEIGHT]", help="LoRA file; repeatable.")
    ] = None,
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
    offline: Annotated[bool, option(MODEL, "--offline", help="Never ask a hub.")] = False,
    steps: Annotated[int | None, option(SAMPLING, help="Denoising steps.")] = None,
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
    device: Annotated[str, option(RUN, help="auto, cpu, cuda or cuda:N.")] = "auto",
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


@app.command(cls=Command)
def doctor() -> None:
    """Print versions, devices, and which kernels would run and why not others, to paste in a bug report."""
    with reported():
        _quiet_libraries()
        from fastory.doctor import report

        say("\n".join(report()))


@app.command(cls=Command)
def words() -> None:
    """Print the words that the built-in model knows, and sentences it draws; other models take any English."""
    with reported():
        from fastory.builtin.words import vocabulary_lines

        say("\n".join(vocabulary_lines()))


@app.command(cls=Command)
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A .ckpt, .bin or .pt file.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Argument(
            help="The folder to write, or an IP-Adapter's .safetensors file (default: beside the checkpoint).",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The same as OUT.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="AR-LDM: folder with tokenizer/ and blip_tokenizer/, and configs to use instead."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask a hub.")] = False,
) -> None:
    """Turn a pickled checkpoint into safetensors; nothing in the file is executed (weights_only).

    An AR-LDM or Causal-Story checkpoint becomes a model folder for `fastory generate --mode causal --model OUT`, an
    IP-Adapter a file for --ip-adapter. Which of them it is, its keys tell.
    """
    with reported():
        if out is not None and output is not None and out != output:
            raise InputError(f"OUT is {out} and --output {output}; give one of them")
        from fastory import door

        door.check_pickle(checkpoint)
        door.check_paths({"OUT": out, "--output": output, "--config": config})
        if offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        _quiet_libraries()
        from fastory.checkpoints import convert_checkpoint

        written = convert_checkpoint(
            checkpoint, out or output, config=config, overwrite=overwrite, offline=offline
        )
        say(str(written))


@app.command(cls=Command)
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
    ip_adapter: Annotated[
        str | None, option(MODEL, help="What --imitate imitates (.safetensors); the built-in brings its own.")
    ] = None,
    image_encoder: Annotated[str | None, option(MODEL, help="Folder of its CLIP image encoder.")] = None,
    offline: Annotated[bool, option(MODEL, "--offline", help="Never ask a hub.")] = False,
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
        int, option(METHOD, help="First steps that learn from the base's IP-Adapter (default 0).")
    ] = 0,
    imitate_scale: Annotated[
        float, option(METHOD, help="Weight of the references that are imitated (default 0.5).")
    ] = 0.5,
    contrast: Annotated[
        float,
        option(METHOD, help="Weight of what tells stories with the same captions apart (default 0)."),
    ] = 0.0,
    patches: Annotated[
        float, option(METHOD, help="Share of frames with patches of such a story, to be mended (default 0).")
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
    device: Annotated[str, option(RUN, help="auto, cpu, cuda or cuda:N.")] = "auto",
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

        check_placement(device, "auto", "auto")
        door.check_paths({"STORIES": stories, "--output": output})
        door.check_model(model, ip_adapter=ip_adapter, image_encoder=image_encoder, adapter=adapter)
        _quiet_libraries()
        if offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        from fastory.tuning.loop import tune as start
        from fastory.tuning.sizes import HistorySizes, Tuning

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
        events = start(
            stories,
            output,
            model=model,
            adapter=adapter,
            ip_adapter=ip_adapter,
            image_encoder=image_encoder,
            tuning=tuning,
            sizes=HistorySizes(history_size, frame_tokens, positions, local_heads, bottleneck),
            held_out=validation,
            device=device,
            overwrite=overwrite,
            offline=offline,
        )
        show_tuning(events, quiet)


@app.command(cls=Command)
def export(
    onnx: Annotated[bool, option(OUTPUT, "--onnx", help="ONNX graphs (the default).")] = False,
    trt: Annotated[
        bool, option(OUTPUT, "--trt", help="TensorRT engines from the graphs, for this machine's GPU.")
    ] = False,
    output: Annotated[
        Path | None,
        option(OUTPUT, "--output", "-o", help="Folder (default: ./engines/<model>-<hash>)."),
    ] = None,
    overwrite: Annotated[
        bool, option(OUTPUT, "--overwrite", help="Replace the export that is there.")
    ] = False,
    quiet: Annotated[bool, option(OUTPUT, "--quiet", help="Print the folder and nothing else.")] = False,
    model: Annotated[
        str,
        option(MODEL, help="builtin, a diffusers folder, a .safetensors file (with --config), or a hub id."),
    ] = "builtin",
    config: Annotated[
        Path | None, option(MODEL, help="Folder with the configuration of a single .safetensors file.")
    ] = None,
    ip_adapter: Annotated[str | None, option(MODEL, help="IP-Adapter weights (.safetensors).")] = None,
    image_encoder: Annotated[str | None, option(MODEL, help="Folder of the CLIP image encoder.")] = None,
    adapter: Annotated[
        str | None, option(MODEL, help="Causal: what `fastory tune` wrote (.safetensors).")
    ] = None,
    lora: Annotated[
        list[str] | None, option(MODEL, metavar="PATH[:WEIGHT]", help="LoRA file; repeatable.")
    ] = None,
    offline: Annotated[bool, option(MODEL, "--offline", help="Never ask a hub.")] = False,
    dtype: Annotated[str, option(METHOD, help="float32 (the default), float16 or bfloat16.")] = "float32",
    groups: Annotated[
        int,
        option(
            METHOD, help="Groups of references: 1 for the frames, and 1 for every character with pictures."
        ),
    ] = 1,
    bind: Annotated[
        str,
        option(METHOD, help="What computes attention: ort (ONNX Runtime, the default), portable or trt."),
    ] = "ort",
    rtx: Annotated[
        str | None,
        option(TENSORRT, metavar="SM", help="TensorRT for RTX, for another machine's GPU, such as sm89."),
    ] = None,
    size: Annotated[
        list[str] | None,
        option(TENSORRT, metavar="NAME=LEAST:MOST", help="Sizes that an engine takes; repeatable."),
    ] = None,
    component: Annotated[
        list[str] | None, option(TENSORRT, help="Build only this component; repeatable.")
    ] = None,
    refit: Annotated[
        bool, option(TENSORRT, "--refit", help="Engines that take other weights later.")
    ] = False,
    version_compatible: Annotated[
        bool, option(TENSORRT, "--version-compatible", help="Engines for later TensorRT versions as well.")
    ] = False,
    hardware_compatible: Annotated[
        bool, option(TENSORRT, "--hardware-compatible", help="Engines for every GPU from Ampere on.")
    ] = False,
) -> None:
    """Write a model as ONNX graphs, each compared with torch, for `fastory generate --engine FOLDER`.

    The weight of the references, their number and who sees them are inputs of the graphs. The same command with another
    --bind changes the small graph files of a finished export alone. With --trt engines are built beside them; where
    TensorRT or a GPU is missing, the graphs and a build script are written, and the exit code is 3.
    """
    with reported():
        flags = {
            "refit": refit,
            "version_compatible": version_compatible,
            "hardware_compatible": hardware_compatible,
        }
        wanted = [f"--{name.replace('_', '-')}" for name, given in flags.items() if given]
        wanted += ["--rtx"] * (rtx is not None) + ["--size"] * bool(size) + ["--component"] * bool(component)
        if wanted and not trt:
            raise InputError(f"{wanted[0]} is about engines; give --trt as well")
        if rtx is not None and any(flags.values()):
            raise InputError(f"TensorRT for RTX has no {wanted[0]}; leave it out")
        packages.require("fastory export", "onnx", "onnx", "onnxscript", "onnxruntime")
        from fastory import door

        door.check_paths({"--output": output})
        bounds = checked_engines(rtx, size or []) if trt else {}
        opened = open_model(
            model, config, ip_adapter, image_encoder, adapter, lora or [], "cpu", dtype, "off", offline
        )
        folder = show_export(export_events(opened, output, groups, bind, overwrite), quiet)
        if trt:
            show_engines(engine_events(folder, rtx, component or [], bounds, flags), quiet)
        say(str(folder))


def export_events(model: Any, output: Path | None, groups: int, bind: str, overwrite: bool) -> Iterator[Any]:
    """The events of an export."""
    from fastory.export.onnx import export_onnx

    return export_onnx(model, output, groups=groups, binding=bind, overwrite=overwrite)


def checked_engines(rtx: str | None, sizes: list[str]) -> dict[str, tuple[int, int]]:
    """The bounds of --size. Raises InputError for those and for a target before anything is exported."""
    from fastory.export.profiles import parse_sizes
    from fastory.export.tensorrt import check_target

    if rtx is not None:
        check_target(rtx)
    return parse_sizes(sizes)


def engine_events(
    folder: Path,
    rtx: str | None,
    components: list[str],
    bounds: dict[str, tuple[int, int]],
    flags: dict[str, bool],
) -> Iterator[Any]:
    """The events of building engines of an exported folder."""
    from fastory.export.tensorrt import build, build_rtx

    if rtx is not None:
        return build_rtx(folder, rtx, components=components, sizes=bounds)
    return build(folder, components=components, sizes=bounds, **flags)


def show_engines(events: Iterator[Any], quiet: bool) -> None:
    """A line for each engine."""
    for event in events:
        if not quiet:
            said = f"{event.engine.name}: {event.bytes / 1e6:.0f} MB, {event.seconds:.0f} s"
            stderr.print(f"  {said}", soft_wrap=True)


def show_export(events: Iterator[Any], quiet: bool) -> Path:
    """A line for each component. Returns the folder."""
    from fastory.export import onnx

    folder = Path()

    def note(text: str) -> None:
        if not quiet:
            stderr.print(f"  {text}", soft_wrap=True)

    for event in events:
        match event:
            case onnx.Exported():
                note(f"{event.component}: {event.bytes / 1e6:.1f} MB of weights, {event.seconds:.0f} s")
            case onnx.Compared(worst=None):
                note("bfloat16: graphs checked; compared with torch as float32, which a CPU runtime computes")
            case onnx.Compared(comparisons=count, worst=onnx.Parity() as worst):
                note(
                    f"{count} comparisons with torch agree; nearest to what is allowed: {worst.component}, "
                    f"{worst.error:.2g} from float64 of {worst.allowed:.2g}"
                )
            case onnx.Rebound():
                note(f"bound for {event.binding}; the weights are as they were")
            case onnx.Finished():
                folder = event.folder
    return folder


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


def open_model(
    model: str,
    config: Path | None,
    ip_adapter: str | None,
    image_encoder: str | None,
    adapter: str | None,
    loras: list[str],
    device: str,
    dtype: str,
    graphs: str,
    offline: bool,
) -> Any:
    """The StoryModel that the options name."""
    from fastory import door

    parsed = [parse_lora(text) for text in loras]
    door.check_model(
        model,
        config=config,
        ip_adapter=ip_adapter,
        image_encoder=image_encoder,
        adapter=adapter,
        loras=[path for path, _ in parsed],
    )
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    _quiet_libraries()
    from fastory.models.torch_model import StoryModel

    return StoryModel.open(
        model,
        config=config,
        ip_adapter=ip_adapter,
        image_encoder=image_encoder,
        adapter=adapter,
        loras=parsed,
        device=device,
        dtype=dtype,
        graphs=graphs,
        offline=offline,
    )


def open_engine(folder: Path, device: str, dtype: str, trust_cache: bool) -> Any:
    """The EngineModel of an export folder."""
    _quiet_libraries()
    from fastory.models.engine_model import EngineModel

    return EngineModel.open_engine(folder, device, dtype, trust_cache)


def parse_lora(text: str) -> tuple[str, float]:
    """PATH[:WEIGHT]; a colon that no number follows belongs to the path."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0


def show(events: Iterator[Event], *, quiet: bool, json_lines: bool) -> None:
    """Print events as JSON lines, as progress, or only the run folder."""
    from fastory.events import as_json

    if json_lines:
        for event in events:
            say(as_json(event))
        return
    with Screen(quiet) as screen:
        for event in events:
            screen.show(event)


def show_tuning(events: Iterator[Any], quiet: bool) -> None:
    """A bar over the steps of a tuning and its losses; the adapter's path on stdout."""
    from fastory.tuning import loop

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=stderr, disable=quiet, speed_estimate_period=120) as bar:
        task = bar.add_task("", total=None)
        for event in events:
            match event:
                case loop.Encoded():
                    bar.update(task, description="encoding frames", completed=event.done, total=event.frames)
                case loop.Stepped():
                    said = None if event.loss is None else f"loss {event.loss:.4f}"
                    bar.update(task, completed=event.step, total=event.steps, description=said)
                case loop.Validated():
                    said = "pictures drawn" if event.loss is None else f"validation loss {event.loss:.4f}"
                    bar.console.print(f"  step {event.step}: {said}", soft_wrap=True)
                case loop.Tuned():
                    bar.update(task, visible=False)
                    say(str(event.adapter))


class Screen:
    """Progress for people: notes on stderr, a bar over the story's denoising steps, the run folder on stdout."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeRemainingColumn(),  # from the measured step times
            TextColumn("left"),
            console=stderr,
            disable=quiet or not stderr.is_terminal,
            speed_estimate_period=120,
        )
        self.task = self.progress.add_task("", visible=False)
        self.round, self.frame, self.done_in_round = "", -1, 0
        self.titles: dict[int, str] = {}  # stories that are being drawn, by their place in the call
        self.total = 0
        self.since = time.monotonic()
        self.drawn: dict[int, tuple[int, int]] = {}  # causal: finished frames and all, by the story's place

    def __enter__(self) -> Screen:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def note(self, text: str) -> None:
        """One line above the bar."""
        if not self.quiet:
            self.progress.console.print(f"  {text}", soft_wrap=True)

    def count(self, drawn: FrameDrawn) -> None:
        """Causal mode where there is no bar: a line for each frame. Iterative mode has one for each round."""
        if self.round or stderr.is_terminal:
            return
        done, total = self.drawn[drawn.place]
        self.drawn[drawn.place] = (done + 1, total)
        title = f"{_plain(self.titles[drawn.place])}: " if len(self.titles) > 1 else ""
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        self.note(f"{title}frame {drawn.frame} drawn ({done + 1} of {total}): {seconds:.1f} s")

    def show(self, event: Event) -> None:
        """One event."""
        from fastory import events

        match event:
            case events.StoryStarted():
                state = (
                    f"; {event.finished} of {counted(event.total, 'picture')} finished"
                    if event.finished
                    else ""
                )
                rounds = f", {counted(event.rounds - 1, 'round')}" if event.rounds > 1 else ""
                self.note(f"[bold]{_plain(event.story)}[/]: {counted(event.frames, 'frame')}{rounds}{state}")
                self.drawn[event.place] = (event.finished, event.total)
                self.total += (event.total - event.finished) * event.steps
                if self.titles:  # drawn side by side with others
                    self.progress.update(self.task, total=self.total, visible=self.total > 0)
                else:
                    self.progress.reset(self.task, total=self.total, visible=self.total > 0)
                self.titles[event.place] = event.story
            case events.BatchChosen():
                self.note(_plain(event.reason))
            case events.Notice():
                self.note(f"[yellow]note:[/] {_plain(event.message)}")
            case events.RoundStarted():
                self.round, self.done_in_round = f"round {event.round} of {event.rounds}", 0
            case events.StepDone():
                first, last = event.frames[0], event.frames[-1]
                which = f"frame {first}" if first == last else f"frames {first}-{last}"
                if not self.round and first != self.frame:  # causal: what memory may cost is one frame
                    self.frame, self.done_in_round = first, 0
                title = self.titles[event.place] if len(self.titles) > 1 else ""
                which += f", draft {event.draft}" if event.draft else ""
                parts = [title, self.round, which, f"step {event.step} of {event.steps}"]
                described = _plain(", ".join(part for part in parts if part))
                done = 0 if event.draft else len(event.frames)
                self.done_in_round += done
                self.progress.update(self.task, advance=done, description=described)
            case events.FrameDrawn() if event.left_out:
                which = (
                    f"frame {event.frame} of round {event.round}" if self.round else f"frame {event.frame}"
                )
                self.note(f"[yellow]note:[/] {which} {event.left_out}; it is left out as a reference")
                self.count(event)
            case events.FrameDrawn():
                self.count(event)
            case events.BatchHalved():
                self.progress.update(self.task, advance=-self.done_in_round)
                what = f"round {event.round}" if event.frame is None else f"frame {event.frame}"
                again = f"{what} again, {event.size} at once"
                self.note(f"[yellow]out of memory[/] ({_plain(event.needed)}); {again}")
            case events.RoundFinished():
                self.note(f"round {event.round} of {event.rounds}: {event.seconds:.1f} s")
            case events.StoryFinished():
                self.titles, self.total, self.round = {}, 0, ""
                self.note(f"sheet      {_plain(event.sheet)}")
                self.note(f"storybook  {_plain(event.storybook)}")
                self.progress.update(self.task, visible=False)
                self.progress.refresh()
                say(str(event.folder))


def _plain(value: object) -> str:
    """Text that rich prints as it is."""
    return escape(str(value))


def _quiet_libraries() -> None:
    """Keep import-time remarks of transformers and diffusers off the user's screen; their errors still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def main() -> None:
    """The commands, once this module is imported; see fastory.__main__."""
    wait_passively()
    try:
        app()
    except OSError as error:  # --help into a full disk
        drop_stdout()
        stderr.print(f"[bold red]error:[/] {_plain(last_words(error))}", soft_wrap=True)
        sys.exit(1)
