"""A server of a test's own: a process as a user starts it, and requests to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from run_folders import CAPTIONS

SETTINGS = {"steps": 2, "iterations": 1}
STORY: dict[str, Any] = {"title": "Snow", "frames": CAPTIONS, "settings": SETTINGS}


class Answer:
    """status, headers, body of an answer."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, dict(response.getheaders()), response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """`fastory serve` on a free port."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "fastory",
            "serve",
            str(folder),
            "--no-open",
            "--port",
            "0",
            *options,
        ]
        self.folder = folder
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # a pipe that nobody reads would be full some time
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, self.said()
        parts = urlsplit(self.address)
        self.host, self.port = parts.hostname or "", parts.port or 0
        self.token = parse_qs(parts.query)["token"][0]

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """A request with the token; a body that is not bytes is sent as JSON. A header of "" is not sent."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Authorization": f"Bearer {self.token}", **(headers or {})}
        try:
            connection.request(method, path, data, {k: v for k, v in sent.items() if v})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def create(self, story: Mapping[str, Any] = STORY, *, draw: bool = True) -> str:
        """The id of a new story."""
        answer = self.ask("POST", "/stories", {"story": story, "draw": draw})
        assert answer.status == 201, answer.body
        return str(answer.json["id"])

    def until(self, story: str, state: str, within: float = 120) -> dict[str, Any]:
        """The story, once it is in this state."""
        until = time.monotonic() + within
        while time.monotonic() < until:
            shown: dict[str, Any] = self.ask("GET", f"/stories/{story}").json
            if shown["state"] == state:
                return shown
            assert not shown["error"], shown["error"]
            time.sleep(0.05)
        raise AssertionError(f"{story} is {shown['state']} and not {state}")

    def kill(self) -> None:
        """As the system does it, at once."""
        self.process.kill()
        self.process.wait()

    def close(self) -> str:
        """Ctrl-C. Returns what was said on stderr."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        finally:
            if self.process.poll() is None:
                self.process.kill()
        return self.said()

    def said(self) -> str:
        """What it wrote to stderr so far, the process that draws included."""
        self.stderr.seek(0)
        return self.stderr.read()
