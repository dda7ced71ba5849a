"""`fastory convert`: pickled checkpoints into safetensors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fastory.cli.progress import show_json
from fastory.cli.reporting import quiet_libraries, reported, say
from fastory.errors import InputError


@dataclass(frozen=True)
class Converted:
    """A checkpoint is converted. output: the folder or file that was written."""

    checkpoint: Path
    output: Path


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
    json_lines: Annotated[bool, typer.Option("--json", help="Print events as JSON lines.")] = False,
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
        door.check_conversion(out or output)
        if offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        quiet_libraries()
        from fastory.checkpoints import convert_checkpoint

        written = convert_checkpoint(
            checkpoint, out or output, config=config, overwrite=overwrite, offline=offline
        )
        show_json([Converted(checkpoint, written)]) if json_lines else say(str(written))
