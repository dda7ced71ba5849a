"""Workers on this machine: a process for each of its devices, which ends when the one that started it is gone."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from fastory.batch.drawer import Drawer, set_threads, stay_out_of_stdout
from fastory.batch.messages import CheckStories, Drawing, Lost, Message, NotOpened, Task

START = "spawn"  # a process that was forked cannot use CUDA


class LocalWorker:
    """A process that draws. It is started anew where it ended."""

    def __init__(self, name: str, drawing: Drawing, device: str, threads: int | None) -> None:
        """threads: of PyTorch, None for its own choice."""
        self.name = name
        self._arguments = (drawing, device, threads)
        self.start()

    def start(self) -> None:
        """Start the process, which opens its model at once."""
        context: Any = multiprocessing.get_context(START)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, *self._arguments), daemon=True)
        with _interrupts_held():
            self.process.start()
        theirs.close()

    def send(self, task: Task) -> None:
        """Give it something to do. A process that is gone says so by itself."""
        with suppress(OSError):
            self.connection.send(task)

    def end(self) -> None:
        """End the process at once: a run folder is made for it."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class LocalWorkers:
    """The workers of this machine."""

    def __init__(self, drawing: Drawing, devices: Sequence[str], threads: int | None) -> None:
        """devices: of each worker, as --device has it."""
        self.workers: list[LocalWorker] = []
        for number, device in enumerate(devices, start=1):
            self.workers.append(LocalWorker(f"worker {number}", drawing, device, threads))

    def wait(self, timeout: float) -> Iterator[tuple[LocalWorker, Message]]:
        """What workers have said, after at most `timeout` seconds. One that ended is started anew."""
        by_connection: dict[Any, LocalWorker] = {worker.connection: worker for worker in self.workers}
        for connection in wait(list(by_connection), timeout):
            worker = by_connection[connection]
            try:
                yield worker, worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join()
                code = worker.process.exitcode or 0
                reason = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                worker.connection.close()
                worker.start()
                yield worker, Lost(reason)

    def close(self) -> None:
        """End all of them."""
        for worker in self.workers:
            worker.end()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A process that is started meanwhile never hears Ctrl-C: it is ended by the one that started it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(connection: Connection, drawing: Drawing, device: str, threads: int | None) -> None:
    """A worker's whole life."""
    stay_out_of_stdout()
    if threads is not None:
        set_threads(threads)
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks), daemon=True).start()
    drawer = Drawer(drawing, device)
    opened = drawer.open()
    connection.send(opened)
    while not isinstance(opened, NotOpened):
        task = tasks.get()
        if isinstance(task, CheckStories):
            connection.send(drawer.check(task))
            continue
        for message in drawer.draw(task):
            connection.send(message)
    threading.Event().wait()  # until whoever started this one has read why, and ends it


def _listen(connection: Connection, tasks: queue.SimpleQueue[Task]) -> None:
    while True:
        try:
            tasks.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the batch is gone: a kill at any moment is what the run folder is made for


def devices_here(requested: str, workers: int | None) -> list[str]:
    """The device of each worker: every CUDA device has one, the CPU as many as --workers says, by default one."""
    cuda = 0
    if requested in ("auto", "cuda"):
        import torch

        cuda = torch.cuda.device_count()
    if not cuda:
        return [requested] * (workers or 1)
    count = workers or cuda
    return [f"cuda:{number % cuda}" for number in range(count)]


def threads_each(devices: Sequence[str]) -> int | None:
    """Threads of each worker where several share the CPU; None where one alone draws, or CUDA does."""
    from fastory.threads import allowed_cores

    if len(devices) == 1 or devices[0].startswith("cuda"):
        return None
    return max(1, len(allowed_cores()) // len(devices))
