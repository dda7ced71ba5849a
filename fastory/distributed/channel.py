"""Messages between two processes of torchrun: in order, and a process that is gone is a message too."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch
from torch import distributed

from fastory.distributed.messages import Alive, Lost, Stop

CPU = torch.device("cpu")
ENDING = 10.0  # seconds that the other process has to say that it ends
BEAT = 30.0  # seconds between two signs of life


class Channel:
    """To and from the process `peer`.

    A thread receives, so that whoever sends never waits until its message is read.
    """

    def __init__(self, peer: int) -> None:
        """All processes must have joined the group."""
        self.peer = peer
        self.lost: Lost | None = None
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, message: object) -> None:
        """Send anything that can be pickled. What cannot be sent any more is left: `receive` says that the other is gone."""
        try:
            with self._sending:
                if not self._ended.is_set():
                    distributed.send_object_list([message], dst=self.peer, device=CPU)
        except RuntimeError as error:
            self._end(str(error))

    def receive(self, timeout: float | None = None) -> Any:
        """The next message; Lost, ever again, where the other process is gone. Raises queue.Empty after `timeout` seconds."""
        message = self._received.get(timeout=timeout)
        if isinstance(message, Lost):
            self._received.put(message)
        return message

    def poll(self) -> Any:
        """The next message, or None."""
        try:
            return self.receive(timeout=0)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Say that nothing follows, and read on until the other says so too: its thread does, whatever it draws."""
        self._stop()
        self._receiver.join(
            ENDING
        )  # a thread that still waits for Gloo would take the process down at its end

    def _stop(self) -> None:
        self.send(Stop())
        self._ended.set()

    def _receive(self) -> None:
        while True:
            box: list[Any] = [None]
            try:
                distributed.recv_object_list(box, src=self.peer, device=CPU)
            except RuntimeError as error:
                self._end(str(error))
                return
            if isinstance(box[0], Alive):
                continue
            self._received.put(box[0])
            if isinstance(box[0], Stop):
                self._stop()
                return

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self.send(Alive())

    def _end(self, reason: str) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self.lost = Lost(reason)
            self._received.put(self.lost)
