"""Workers on any number of machines: an actor of Ray for each GPU, on a cluster that runs already."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastory import packages
from fastory.batch.drawer import Drawer
from fastory.batch.messages import (
    Checked,
    CheckStories,
    Drawing,
    Drawn,
    DrawStory,
    Lost,
    Message,
    Noted,
    NotOpened,
    Opened,
    Refused,
    Task,
)
from fastory.batch.ray_frame_actor import frame_actors
from fastory.batch.travelling import File, FilesChanged, Receiver, Sender, scratch_folder
from fastory.errors import InputError
from fastory.modes.executor import HERE, Executor
from fastory.wording import last_words

if TYPE_CHECKING:
    from fastory.batch.ray_frames import FrameActors

NEAREST = "auto"  # the cluster of RAY_ADDRESS, or the one that runs on this machine
AHEAD = 8  # messages that an actor may be ahead of the batch that writes its pictures
GROWTH = 10.0  # seconds between two looks at the cluster's size
REACHED = 5.0  # seconds for an address to answer


class RayDrawer:
    """What an actor runs. Its model is opened once, and again where Ray has started it anew."""

    def __init__(self, drawing: Drawing, device: str, together: int, options: Mapping[str, Any]) -> None:
        """together: actors that draw a story, this one and those it makes; options: of each, as Ray has them."""
        self._actors = frame_actors(drawing, device, together - 1, options)
        self._others: FrameActors | None = None
        self._drawer = Drawer(drawing, device)

    def open(self) -> Opened | NotOpened:
        """Open the model."""
        return self._drawer.open()

    def check(self, task: CheckStories) -> Checked | NotOpened:
        """What the model says against stories."""
        opened = self._drawer.open()
        return opened if isinstance(opened, NotOpened) else self._drawer.check(task)

    def draw(self, task: DrawStory, there: Sequence[File]) -> Iterator[Message | FilesChanged]:
        """Draw a story, from the files that the batch has; whatever changes is sent before the message that tells of it."""
        opened = self._drawer.open()
        if isinstance(opened, NotOpened):
            yield Refused(opened.message, opened.exit_code)
            return
        with scratch_folder() as folder:
            sender = Sender(folder, there)
            for message in self._drawer.draw(replace(task, folder=folder), self._executor()):
                if changed := sender.changed().files:
                    yield FilesChanged(changed)
                if isinstance(message, Drawn) and self._others is not None and not self._others.was_asked:
                    yield Noted("drawn by one actor: its frames wait for each other, or were finished")
                yield message

    def _executor(self) -> Executor:
        if self._others is None and self._actors:
            from fastory.batch.ray_frames import FrameActors  # PyTorch, which the batch itself does without

            self._others = FrameActors(self._actors)
        return self._others or HERE


class RayWorker:
    """An actor, as the batch sees it."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self.actor = actor
        self.receiver: Receiver | None = None
        self.pending: Any = actor.open.remote()

    def send(self, task: Task) -> None:
        """Have the actor check stories, or draw one."""
        if isinstance(task, CheckStories):
            self.pending = self.actor.check.remote(task)
            return
        self.receiver = Receiver(task.folder)
        sent = replace(task, folder=Path())
        self.pending = self.actor.draw.remote(sent, self.receiver.files())

    def messages(self, ray: Any) -> Iterator[Message]:
        """What is there now, of an actor of which ray.wait says that something is."""
        try:
            ready = isinstance(self.pending, ray.ObjectRef)
            message = ray.get(self.pending if ready else next(self.pending))
        except (ray.exceptions.RayError, StopIteration) as error:
            self._let_go()
            self.pending = self.actor.open.remote()  # answered when Ray has started it anew, wherever that is
            reason = "ended" if isinstance(error, StopIteration) else f"is gone ({last_words(error, 120)})"
            yield Lost(reason)
            return
        if isinstance(message, FilesChanged):
            assert self.receiver is not None
            self.receiver.take(message)
            return
        if ready or isinstance(message, Drawn | Refused):
            self._let_go()
        yield message

    def _let_go(self) -> None:
        self.pending = None
        if self.receiver is not None:
            self.receiver.close()
            self.receiver = None


class RayWorkers:
    """The actors of a batch: one for each GPU of the cluster, where it has none one for each CPU core; more as it grows.

    Where several draw a story together, one of them is the batch's worker, and has the others.
    """

    def __init__(
        self, drawing: Drawing, address: str, device: str, gpus: float, most: int, together: int = 1
    ) -> None:
        """address: HOST:PORT, or NEAREST. gpus: of each actor, or a share of one. most: workers. together: actors of each.

        Raises InputError where there is no cluster.
        """
        self._ray = connected(address)
        self._needed = needed_of(nodes_of(self._ray), device, gpus)
        self._most, self._together, self._looked = most, together, time.monotonic()
        # A retry of Ray's own would draw from the files of the first attempt: `draw` is called again by the queue, which
        # bounds how often, with all that has arrived since. What has no state is retried for ever.
        methods = {
            "open": self._ray.method(max_task_retries=-1),
            "check": self._ray.method(max_task_retries=-1),
            "draw": self._ray.method(
                max_task_retries=0, num_returns="streaming", _generator_backpressure_num_objects=AHEAD
            ),
        }
        members = {name: method(getattr(RayDrawer, name)) for name, method in methods.items()}
        options = {
            "num_gpus": self._needed.get("GPU", 0),
            "num_cpus": 1,
            "max_restarts": -1,
            "scheduling_strategy": "SPREAD",
        }
        kind = self._ray.remote(type("Drawer", (RayDrawer,), members))
        self._actor = kind.options(**options)
        self._arguments = (drawing, device, together, options)
        self.workers: list[RayWorker] = []
        self._grow()

    def _grow(self) -> None:
        teams = how_many(nodes_of(self._ray), self._needed) // self._together
        wanted = max(1, min(self._most, teams))
        for number in range(len(self.workers) + 1, wanted + 1):
            self.workers.append(RayWorker(f"actor {number}", self._actor.remote(*self._arguments)))

    def wait(self, timeout: float) -> Iterator[tuple[RayWorker, Message]]:
        """What actors have said, after at most `timeout` seconds."""
        if time.monotonic() - self._looked > GROWTH:
            self._looked = time.monotonic()
            self._grow()
        busy = [worker for worker in self.workers if worker.pending is not None]
        if not busy:
            return
        waited = [worker.pending for worker in busy]
        ready, _ = self._ray.wait(waited, num_returns=1, timeout=timeout)
        if ready:
            ready, _ = self._ray.wait(waited, num_returns=len(waited), timeout=0)
        for worker, pending in zip(busy, waited, strict=True):
            if pending in ready:
                for message in worker.messages(self._ray):
                    yield worker, message

    def close(self) -> None:
        """End the actors, and leave the cluster, which goes on."""
        for worker in self.workers:
            if worker.receiver is not None:
                worker.receiver.close()
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker.actor)
        self._ray.shutdown()


def connected(address: str) -> Any:
    """Ray, connected to a cluster that runs. Raises InputError where there is none, or where Ray is not installed."""
    packages.require("--ray", "ray", "ray")
    address = os.environ.get("RAY_ADDRESS", NEAREST) if address == NEAREST else address
    todo = "start one with `ray start --head`, and `ray start --address HOST:PORT` on every other machine, this one too"
    if address.startswith("ray://"):
        raise InputError(
            f"--ray {address}: Ray's client has no streams of messages; run this on a machine of the cluster"
        )
    if address != NEAREST:
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdecimal():
            raise InputError(f"--ray {address}: wanted HOST:PORT of a cluster; {todo}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACHED).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"--ray {address}: no cluster answers there ({error}); {todo}") from error
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ConnectionError, RuntimeError for another version, ..
        raise InputError(
            f"--ray {address}: no cluster can be joined here ({last_words(error)}); {todo}"
        ) from error
    return ray


def nodes_of(ray: Any) -> list[dict[str, float]]:
    """What each machine of the cluster has, by Ray's names: CPU, GPU, memory, .."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def needed_of(nodes: Sequence[dict[str, float]], device: str, gpus: float) -> dict[str, float]:
    """What a worker takes of a machine: GPUs where there are any, else a core. device: as --device has it."""
    on_gpus = device == "cuda" or (device != "cpu" and any(node.get("GPU") for node in nodes))
    return {"GPU": gpus, "CPU": 1.0} if on_gpus else {"CPU": 1.0}


def how_many(nodes: Sequence[dict[str, float]], needed: dict[str, float]) -> int:
    """Workers that fit on these machines, none of which is parted over two."""
    return sum(
        min(int(node.get(name, 0) / amount + 1e-9) for name, amount in needed.items()) for node in nodes
    )
