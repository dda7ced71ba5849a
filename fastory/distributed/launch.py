"""What torchrun says of this process, and the process group of a run. Reading it imports no PyTorch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

from fastory.errors import FastoryError, InputError
from fastory.wording import last_words

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# For all processes to start, those of other hosts too, and after which a host that was switched off counts as gone.
SILENCE = timedelta(minutes=5)


@dataclass(frozen=True)
class Launch:
    """This process among those of torchrun. rank: of `size`; local_rank: on this host, which is the number of its device."""

    rank: int
    size: int
    local_rank: int

    def device(self, requested: str) -> str:
        """--device of this process: its own one of the host's CUDA devices, where there are any.

        Raises InputError for a device that is named, as all processes would draw on it, and where the host has too few.
        """
        if requested.startswith("cuda:"):
            raise InputError(
                f"--device {requested}: under torchrun each process has a device of its own; wanted auto, cpu or cuda"
            )
        import torch

        devices = torch.cuda.device_count() if requested in ("auto", "cuda") else 0
        if devices and self.local_rank >= devices:
            raise InputError(
                f"rank {self.rank} is process {self.local_rank} of its host, which has {devices} CUDA device(s); wanted "
                f"--nproc-per-node {devices} or less"
            )
        return f"cuda:{self.local_rank}" if devices and self.rank else requested


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What torchrun set in the environment; None for a process of its own. Raises InputError for what is no number."""
    if any(name not in environment for name in NEEDED):
        return None
    try:
        rank, size, local = (int(environment[name]) for name in NEEDED[:3])
    except ValueError as error:
        raise InputError(
            f"RANK, WORLD_SIZE, LOCAL_RANK: wanted numbers, as torchrun sets them ({error})"
        ) from error
    return Launch(rank, size, local) if size > 1 else None


@contextlib.contextmanager
def process_group(launch: Launch) -> Iterator[None]:
    """The group of all processes, joined. Raises FastoryError where one of them does not come.

    What travels are pictures as PNG and, once a round, tokens of references (250 KB for 100 frames): Gloo carries both, between
    CPUs and between GPUs, and tells at once when a process at the other end is gone.
    """
    from torch import distributed

    try:
        distributed.init_process_group("gloo", rank=launch.rank, world_size=launch.size, timeout=SILENCE)
    except Exception as error:
        raise FastoryError(
            f"rank {launch.rank}: not all {launch.size} processes of torchrun came together ({last_words(error)})"
        ) from error
    yield
