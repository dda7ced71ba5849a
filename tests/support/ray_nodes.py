"""Nodes of Ray on this machine, each with an address of its own: `ray start --block`, ended by their own process ids."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil

LIMIT = 240.0  # seconds for a node to start
MEMORY = 100_000_000  # bytes of a node's object store


class Node:
    """A node with one CPU and no GPU."""

    def __init__(self, folder: Path, address: str, *arguments: str) -> None:
        self.log = folder / f"{address}.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}", "--num-cpus=1",
             "--num-gpus=0", f"--object-store-memory={MEMORY}", *arguments],
            stdout=self.log.open("w"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": f"{LIMIT:g}",
                 "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> None:
        """Until it runs."""
        until = time.monotonic() + LIMIT
        while "Ray runtime started" not in (said := self.log.read_text()):
            assert self.process.poll() is None and time.monotonic() < until, said
            time.sleep(0.1)

    def actors(self, title: str = "Drawer") -> list[psutil.Process]:
        """Its processes that draw, by how Ray titles them: their class, and the method that runs."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in found if _title(process).startswith(f"ray::{title}")]

    def kill(self) -> None:
        """All its processes at once, by SIGKILL."""
        with_children = [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        with_children += [child for process in with_children for child in process.children(recursive=True)]
        for process in with_children:
            process.kill()
        psutil.wait_procs(with_children, timeout=30)
        self.process.wait()


def _title(process: psutil.Process) -> str:
    """How a process calls itself; nothing for one that has ended meanwhile."""
    try:
        return "".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie, too
        return ""


@contextmanager
def two_nodes() -> Iterator[tuple[str, Node, Node]]:
    """The cluster's address, the node on which a driver runs, and another."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie in it: their paths must be short
    nodes = []
    try:
        port = free_port()
        nodes.append(
            Node(
                folder,
                "127.0.0.1",
                "--head",
                f"--port={port}",
                "--include-dashboard=false",
                f"--temp-dir={folder}",
            )
        )
        nodes[0].wait()
        nodes.append(Node(folder, "127.0.0.2", f"--address=127.0.0.1:{port}"))
        nodes[1].wait()
        yield f"127.0.0.1:{port}", *nodes
    finally:
        for node in nodes:
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Above 20000: Ray's own workers take those from 10002 on."""
    while True:
        with closing(socket.create_server(("127.0.0.1", 0))) as server:
            port = int(server.getsockname()[1])
        if port > 20000:
            return port
