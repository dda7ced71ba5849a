"""CPU threads: how they wait for each other, and how many a run takes. Imports no PyTorch.

OpenMP's threads spin while they wait. Beside other work that is ten to a hundred times slower than to sleep, since a
thread that spins holds the core on which the one it waits for should run. How they wait is read from the environment
when PyTorch loads, so it belongs to whoever starts the process: the `fastory` command and `python -m fastory...` set
it, an `import fastory` in a program of the user's does not.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

# What says how OpenMP's threads wait: the standard's variable, GNU's and LLVM's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# What says how many there are; PyTorch follows both.
COUNT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WINDOW = 0.2  # seconds over which idle time is measured: 20 ticks of Linux's clock a core
QUIET = 0.9  # share of idle time from which on a machine counts as quiet


def wait_passively() -> None:
    """Have this process's threads sleep while they wait, unless the user has said how; before PyTorch is loaded.

    Where PyTorch is loaded already its threads go on waiting as they did: OpenMP has no call that changes it.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def wait_is_passive() -> bool:
    """Whether the environment says that threads sleep while they wait."""
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


def is_ours(orig_argv: list[str]) -> bool:
    """Whether the module of a `python -m` command line (sys.orig_argv) is one of fastory's."""
    named = re.compile(r"(-\w*m)?fastory(\.[\w.]+)?")
    return any(named.fullmatch(argument) for argument in orig_argv[1:])


def choose(default: int) -> int:
    """How many threads a new run takes here; default: PyTorch's own number, which is never exceeded.

    OMP_NUM_THREADS and MKL_NUM_THREADS count as they are. The number decides a picture's last bits: whoever wants the
    same ones whatever else the machine does sets it.
    """
    if default == 1 or any(name in os.environ for name in COUNT):
        return default
    cores = allowed_cores()
    return threads_for(default, len(cores), cpu_quota(), idle_cores(cores))


def threads_for(default: int, cores: int, quota: float, idle: float) -> int:
    """The most threads that each find a core free, at least one.

    cores: that the process may run on; quota: CPU seconds a second that its control group allows, inf for no limit; idle:
    cores' worth of idle time. A convolution ends when its last thread does, so one that waits for a core holds up the others:
    on 2 cores, with a load of 6 of programs that sleep and wake, two threads took 5 to 11 times as long as one (beside two
    busy loops, which the system interrupts at once, 0.6 times).
    """
    free = int(idle) if idle < QUIET * cores else cores
    allowed = math.ceil(quota) if quota < cores else cores
    return max(1, min(default, free, allowed))


def allowed_cores() -> set[int]:
    """Numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def idle_cores(cores: set[int]) -> float:
    """How many of these cores' worth of time was idle just now; measured over 0.2 s."""
    import psutil  # here, as the command line imports this module before it prints its help

    busy = psutil.cpu_percent(interval=WINDOW, percpu=True)
    ours = [busy[core] for core in cores if core < len(busy)]
    return sum(1 - percent / 100 for percent in ours)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float:
    """CPU seconds a second that this process's control group and those above it allow; inf where none is set.

    root: where control groups are mounted; groups: this process's, as Linux lists them. Reads versions 1 and 2.
    """
    quotas = [_quota(folder) for folder in _group_folders(root, groups)]
    return min((quota for quota in quotas if quota > 0), default=math.inf)


def _group_folders(root: Path, groups: Path) -> Iterator[Path]:
    """The group's folder and those above it. A container may be shown a path that is not there, or its root alone."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        if not controllers:
            mounts = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu"]
        else:
            continue
        for mount in mounts:
            below = mount / path.lstrip("/")
            yield from (folder for folder in (below, *below.parents) if folder.is_relative_to(mount))


def _quota(folder: Path) -> float:
    """The limit that this group sets itself, or inf."""
    try:
        if (folder / "cpu.max").exists():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(allowed) / int(period) if allowed.strip() not in ("max", "-1") else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf  # the root has none, and what cannot be read is no limit that we know of
