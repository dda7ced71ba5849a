"""The processes of torchrun beside rank 0: each draws what it is sent, and sends the pictures back. They write nothing."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial

from fastory.distributed import share
from fastory.distributed.channel import Channel
from fastory.distributed.launch import Launch, process_group
from fastory.distributed.messages import BeginStory, DrawFrames, DrawStories, Failed, Lost, Stop
from fastory.distributed.ranks import hello_of
from fastory.errors import FastoryError
from fastory.models.protocol import Model
from fastory.wording import last_words

Open = Callable[[str, str | None, bool | None], Model]
"""Opens the model: on a device, in a dtype and with graphs, None for what the command line says."""


def follow(launch: Launch, device: str, open_model: Open) -> int:
    """Draw what rank 0 sends until it says that nothing follows. Returns an exit code: 0, or 1 where this process failed.

    What went wrong is said by rank 0; where that is gone, by rank 1.
    """
    with process_group(launch):
        channel = Channel(0)
        signal.signal(signal.SIGTERM, partial(_ended_by_torchrun, launch, channel))
        try:
            own = launch.device(device)
            follower = Follower(channel, lambda dtype, graphs: open_model(own, dtype, graphs))
            return _said(launch, channel) if follower.run() else 0
        except KeyboardInterrupt:
            return 130  # rank 0 has had it, too
        except Exception as error:
            code = error.exit_code if isinstance(error, FastoryError) else 1
            channel.send(Failed(str(error) if isinstance(error, FastoryError) else last_words(error), code))
            while not isinstance(channel.receive(), Stop | Lost):
                pass
            return 1
        finally:
            channel.close()


def _ended_by_torchrun(launch: Launch, channel: Channel, *_: object) -> None:
    """SIGTERM: torchrun ends all processes when one has died."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun says it more than once
    sys.exit(_said(launch, channel))


def _said(launch: Launch, channel: Channel) -> int:
    """Say that rank 0 is gone, where it is; exit code 1."""
    if channel.lost is not None and launch.rank == 1:
        sys.stderr.write(
            "error: rank 0 ended while others went on. What is finished is kept; the same command goes on.\n"
        )
    return 1


class Follower:
    """Draws for rank 0 what it sends."""

    def __init__(self, channel: Channel, open_model: share.Open) -> None:
        """open_model(dtype, graphs): on the device of this process; None for what the command line says."""
        self._channel = channel
        self._drawer = share.ShareDrawer(open_model)
        channel.send(hello_of(self._drawer.model))

    def run(self) -> bool:
        """Until rank 0 says that nothing follows. True where it is gone."""
        while True:
            message = self._channel.receive()
            match message:
                case Stop() | Lost():
                    return isinstance(message, Lost)
                case BeginStory():
                    self._drawer.begin(message)
                case DrawFrames():
                    self._send(self._drawer.frames(message))
                case DrawStories():
                    self._send(self._drawer.stories(message))

    def _send(self, answers: Iterator[share.Answer]) -> None:
        for answer in answers:
            self._channel.send(answer)
