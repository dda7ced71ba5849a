"""`fastory serve`: the local page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fastory.cli.options import (
    RUN,
    Adapter,
    Config,
    Device,
    Distilled,
    Dtype,
    ImageEncoder,
    IpAdapter,
    Loras,
    ModelName,
    ModelOptions,
    Offline,
    option,
    parse_lora,
)
from fastory.cli.reporting import quiet_libraries, reported, say, stderr
from fastory.errors import InputError

NETWORK = "Network"


def serve(
    folder: Annotated[Path, typer.Argument(help="The folder of the stories.")] = Path("stories"),
    model: ModelName = "builtin",
    config: Config = None,
    ip_adapter: IpAdapter = None,
    image_encoder: ImageEncoder = None,
    adapter: Adapter = None,
    lora: Loras = None,
    distilled: Distilled = None,
    offline: Offline = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    host: Annotated[
        str,
        option(
            NETWORK,
            help="Listen on this name or address too, for other machines (default 127.0.0.1: this one alone).",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, option(NETWORK, help="Default 8010; 0 for a free one.")] = 8010,
    token: Annotated[
        str | None,
        option(NETWORK, help="The word that the address carries (default: a new one; at least 16 letters)."),
    ] = None,
    no_open: Annotated[bool, option(RUN, "--no-open", help="Open no browser.")] = False,
) -> None:
    """A page on this machine to write stories, watch them being drawn, lock frames and redraw others; /docs has its API."""
    with reported(resumable=True):
        from fastory import door, packages

        packages.require("fastory serve", "serve", "fastapi", "uvicorn")
        door.check_paths({"FOLDER": folder})
        door.check_placement(device, dtype)
        if not 0 <= port <= 65535:
            raise InputError(f"--port: wanted 0 to 65535, got {port}")
        if token is not None and (len(token) < 16 or not token.isascii() or not token.isalnum()):
            raise InputError(
                "--token: wanted at least 16 letters and digits, as whoever knows it may draw and delete"
            )
        options = ModelOptions(model, config, ip_adapter, image_encoder, adapter, lora, distilled, offline)
        opened = arguments(options, device, dtype)
        if offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        quiet_libraries()
        from fastory.serve.server import serve as run

        if host not in ("127.0.0.1", "localhost", "::1"):
            stderr.print(
                "  other machines can reach this server; whoever has the address with its token may draw and delete",
                soft_wrap=True,
            )
        run(
            folder,
            opened,
            host=host,
            port=port,
            token=token,
            announce=lambda address: announce(address, no_open),
        )


def arguments(options: ModelOptions, device: str, dtype: str) -> dict[str, object]:
    """What StoryModel.open takes, as plain values. Names are checked here, what they lead to where the model is opened."""
    from fastory import door

    loras = [parse_lora(text) for text in options.lora or []]
    named = {name: getattr(options, name) for name in ("config", "ip_adapter", "image_encoder", "adapter")}
    distilled = options.distilled or "auto"
    door.check_model(options.model, **named, loras=[path for path, _ in loras], distilled=distilled)
    plain = {name: None if value is None else str(value) for name, value in named.items()}
    return {
        **plain,
        "model": options.model,
        "loras": loras,
        "distilled": distilled,
        "device": device,
        "dtype": dtype,
        "offline": options.offline,
    }


def announce(address: str, no_open: bool) -> None:
    """Print the address, and show it."""
    say(address)
    if not no_open:
        import webbrowser

        webbrowser.open(address)
