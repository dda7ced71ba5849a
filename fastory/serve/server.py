"""The server: a folder's lock held, its address made, and the application served until Ctrl-C."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastory import files
from fastory.errors import InputError
from fastory.serve.api import make_app, new_token
from fastory.serve.drawing import Drawing
from fastory.serve.gate import Gate
from fastory.serve.pages import pages
from fastory.serve.shelf import HINT, Shelf

LOOPBACK = "127.0.0.1"
MOST_CONNECTIONS = 200
HEADER_BYTES = 32 * 1024
CLOSE_WITHIN = 1  # seconds; streams of events never end by themselves


def serve(
    folder: Path,
    model: Mapping[str, Any],
    *,
    host: str,
    port: int,
    token: str | None,
    announce: Callable[[str], object],
) -> None:
    """Serve a folder of stories until it is interrupted.

    model: arguments of StoryModel.open. port: 0 for a free one. token: None for a new one. announce: is called with the
    address, once connections are taken. Raises InputError for a folder or an address that cannot be, FastoryError where
    another server has the folder.
    """
    import uvicorn

    shelf = Shelf(folder)
    with files.locked_folder(shelf.own, "serves", HINT), listening(host, port) as bound:
        number = bound.getsockname()[1]
        drawing = Drawing(shelf, model)
        app = make_app(shelf, drawing)
        app.include_router(pages(drawing.model_name))
        secret = token or new_token()
        config = uvicorn.Config(
            Gate(app, secret, host, number),
            log_level=logging.ERROR,
            access_log=False,
            server_header=False,
            lifespan="on",
            limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=CLOSE_WITHIN,
        )
        announce(f"http://{_in_address(host)}:{number}/?token={secret}")
        uvicorn.Server(config).run(sockets=[bound])


def listening(host: str, port: int) -> socket.socket:
    """A socket that takes connections. Raises InputError for an address that is taken, or none of this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Said to be TCP, asyncio sends a small answer at once; otherwise it waits 40 ms for an acknowledgement.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except (OSError, OverflowError, UnicodeError) as error:
        raise _no_address(host, port, error) from error
    try:
        if os.name == "posix":  # elsewhere it would share the port with whoever has it
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()
    except (OSError, OverflowError) as error:
        bound.close()
        raise _no_address(host, port, error) from error
    return bound


def _no_address(host: str, port: int, error: Exception) -> InputError:
    said = error.strerror if isinstance(error, OSError) and error.strerror else error
    return InputError(f"cannot listen on {host}:{port}: {said}; give another --port or --host")


def _in_address(host: str) -> str:
    shown = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
    return f"[{shown}]" if ":" in shown else shown
