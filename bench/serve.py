"""How long a request waits while a story is drawn, and what many stories cost: `python bench/serve.py [--out FILE]`.

A server of its own in a temporary folder, the built-in model. latency: milliseconds of each kind of request, one after the
other from one client, while a story is drawn the whole time. memory: resident MiB of the server and of the process that
draws, after 10 and after 100 stories of one frame, with the list asked for after each.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil
import torch

CAPTIONS = [f"a {animal} is sleeping in the snow" for animal in ("fox", "cat", "bear", "rabbit")]
LONG = {"title": "Long", "frames": CAPTIONS * 2, "settings": {"steps": 15, "iterations": 60}}
SHORT = {"title": "Short", "frames": CAPTIONS[:1], "settings": {"steps": 1, "iterations": 0}}


class Client:
    """One connection that is kept, as a browser keeps it."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        self.headers = {"Authorization": f"Bearer {parse_qs(parts.query)['token'][0]}"}

    def ask(self, method: str, path: str, body: Any = None) -> bytes:
        """The body of an answer. Raises RuntimeError for a refusal."""
        data = None if body is None else json.dumps(body)
        self.connection.request(method, path, data, self.headers)
        answer = self.connection.getresponse()
        content = answer.read()
        if answer.status >= 400:
            raise RuntimeError(f"{method} {path}: {answer.status} {content[:200]!r}")
        return content

    def draw(self, story: Any) -> str:
        """The id of a story that is put into the queue."""
        return str(json.loads(self.ask("POST", "/stories", {"story": story, "draw": True}))["id"])

    def state(self, story: str) -> Any:
        """All that is known of it."""
        return json.loads(self.ask("GET", f"/stories/{story}"))


def latencies(client: Client, story: str, repeats: int) -> dict[str, dict[str, float]]:
    """Percentiles in milliseconds by request, while `story` is drawn; RuntimeError where it was finished before."""
    check = {"story": {"frames": CAPTIONS}}
    requests: dict[str, tuple[str, str, Any]] = {
        "list": ("GET", "/stories", None),
        "story": ("GET", f"/stories/{story}", None),
        "picture": ("GET", f"/stories/{story}/frames/0", None),
        "check": ("POST", "/check", check),
        "page": ("GET", "/", None),
    }
    found: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(repeats):
        for name, (method, path, body) in requests.items():
            start = time.perf_counter()
            client.ask(method, path, body)
            found[name].append(1000 * (time.perf_counter() - start))
    if client.state(story)["state"] != "drawing":
        raise RuntimeError("the story was finished before all was measured: give fewer --repeats")
    found["all"] = [value for values in found.values() for value in values]
    return {name: percentiles(values) for name, values in found.items()}


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95 and the largest."""
    cuts = statistics.quantiles(values, n=100)
    return {
        "p50": round(cuts[49], 2),
        "p95": round(cuts[94], 2),
        "max": round(max(values), 2),
        "n": len(values),
    }


def memory(client: Client, server: psutil.Process, stories: int) -> dict[str, dict[str, float]]:
    """Resident MiB of the server and of its child after 10 stories and after all."""
    found = {}
    for number in range(1, stories + 1):
        story = client.draw(SHORT)
        while client.state(story)["state"] != "finished":
            time.sleep(0.02)
        client.ask("GET", "/stories")
        if number in (10, stories):
            child = max(server.children(recursive=True), key=lambda process: process.memory_info().rss)
            sizes = {"server": server, "drawing": child}
            found[str(number)] = {name: round(p.memory_info().rss / 2**20, 1) for name, p in sizes.items()}
    return found


def main() -> int:
    """Print the rows, and write them to --out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastory", "serve", folder, "--no-open", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            client = Client(process.stdout.readline().strip())
            story = client.draw(LONG)
            while not any(client.state(story)["pictures"]):
                time.sleep(0.1)
            rows: dict[str, Any] = {"latency_ms": latencies(client, story, options.repeats)}
            client.ask("POST", f"/stories/{story}/cancel")
            while client.state(story)["state"] != "paused":
                time.sleep(0.05)
            rows["memory_mib"] = memory(client, psutil.Process(process.pid), options.stories)
            process.terminate()
    rows |= {"date": time.strftime("%Y-%m-%d"), "cores": psutil.cpu_count(), "torch": torch.__version__}
    print(json.dumps(rows, indent=1))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
