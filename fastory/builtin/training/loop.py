"""The training loop that all stages share: seeded, resumable, one or several processes with averaged gradients.

A loop of its own beside that of fastory.tuning: a stage ends after minutes of processor time, draws its batches in worker
processes and shows samples, where a tuning ends after steps, reads tables and writes TensorBoard's files. What both do is
the step of an optimizer.
"""

import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from fastory import files

Batch = dict[str, Tensor]


class Objective(nn.Module):
    """One stage: its networks, and a loss as forward(batch). `name` also names its folder of state."""

    name: str
    learning_rate: float
    ema_decay: float

    def batch(self, rng: np.random.Generator, progress: float) -> Batch:
        """A batch on the CPU that depends on rng and progress (0..1) alone."""
        raise NotImplementedError

    def hasten(self) -> None:
        """Make steps cheaper where products are in bfloat16; a stage that gains nothing by it stays as it is."""

    def sample(self, folder: Path) -> None:
        """Write pictures, or print figures, that show how far training has come."""
        raise NotImplementedError

    def finish(self, folder: Path) -> None:
        """Write the trained networks."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plan:
    """How long, where and from which seed a stage trains. Either minutes or steps bounds it.

    Minutes are processor time of one process on a CPU, so that other work on the machine does not eat the schedule,
    and wall time on a GPU. bf16: products in bfloat16 on a CPU, too; weights and sums stay float32.
    """

    workdir: Path
    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    save_every: float = 60.0
    show_every: float = 600.0
    bf16: bool = False
    log_every: int = 100

    def clock(self) -> float:
        """Seconds from an arbitrary start, of the kind that `minutes` counts."""
        return time.monotonic() if self.device.startswith("cuda") else time.process_time()

    def progress(self, step: int, seconds: float) -> float:
        """The share of the stage that is done, 0..1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, seconds / (60 * (self.minutes or 1.0)))


class TrainingState:
    """Optimizer, averaged weights, step and seconds of a stage, and their folder."""

    def __init__(self, objective: Objective, plan: Plan) -> None:
        self.named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.named], objective.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.average = [p.detach().clone() for _, p in self.named]
        self.step, self.seconds = 0, 0.0
        self.folder = plan.workdir / f"state-{objective.name}"

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resume needs, by name: weights, averages, both moments."""
        tensors: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.named, self.average, strict=True):
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = average
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = self.optimizer.state[parameter][key]
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def save(self) -> None:
        """Write the state beside its place and rename it, so that a kill leaves the old one or the new one."""
        fresh, old = self._beside()
        files.remove(fresh)
        files.remove(old)
        files.make_folder(fresh)
        tensors, progress = self.tensors(), {"schema": 1, "step": self.step, "seconds": self.seconds}
        files.write(fresh / "state.safetensors", lambda path: save_file(tensors, path))
        files.atomic_write(fresh / "state.json", json.dumps(progress).encode())  # last: with it all is there
        files.sync_tree(fresh)
        files.replace_folder(fresh, self.folder, old)
        files.remove(old)

    def _beside(self) -> tuple[Path, Path]:
        """Where a state is written, and where the one before it is moved while the new one takes its place."""
        return self.folder.with_name(f"{self.folder.name}.new"), self.folder.with_name(
            f"{self.folder.name}.old"
        )

    def resume(self) -> bool:
        """Take up the saved state, if there is one."""
        fresh, old = self._beside()
        if not self.folder.exists() and (fresh / "state.json").exists():
            files.replace(fresh, self.folder)
        elif not self.folder.exists() and old.exists():
            files.replace(old, self.folder)
        if not self.folder.exists():
            return False
        tensors = load_file(self.folder / "state.safetensors")
        progress = json.loads((self.folder / "state.json").read_text())
        self.step, self.seconds = progress["step"], progress["seconds"]
        with torch.no_grad():
            for (name, parameter), average in zip(self.named, self.average, strict=True):
                parameter.copy_(tensors[f"weight.{name}"])
                average.copy_(tensors[f"average.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    **{k: tensors[f"{k}.{name}"].to(parameter.device) for k in ("exp_avg", "exp_avg_sq")},
                }
        return True

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Exponential moving average; the decay grows from 0, so that the first weights are soon forgotten."""
        decay = min(decay, (1 + self.step) / (20 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for _, p in self.named], 1 - decay)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange weights and averages: call it before and after writing or sampling."""
        for (_, parameter), average in zip(self.named, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


def learning_rate_factor(step: int, progress: float) -> float:
    """Warm-up over 150 steps, constant, then a straight line down to 2 % over the last half.

    progress: of the plan, which may be bounded by minutes. The schedules of diffusers' get_scheduler count steps.
    """
    return min(1.0, (step + 1) / 150) * max(0.02, min(1.0, 2 * (1 - progress)))


def stream(name: str, seed: int, rank: int, step: int) -> np.random.Generator:
    """The randomness of one step: it depends on these four alone, so a resume needs no generator state."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), rank, step])


def _shared(value: float) -> float:
    """The first process's value on all of them: clocks differ, learning rates and ends must not."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return float(tensor)


class _Batches(Dataset):
    """The batch of a step, by its number. Worker processes read the latest progress from shared memory."""

    def __init__(self, objective: Objective, plan: Plan, rank: int) -> None:
        self.objective, self.plan, self.rank = objective, plan, rank
        self.seconds = torch.zeros(1, dtype=torch.float64).share_memory_()

    def __getitem__(self, step: int) -> Batch:
        rng = stream(self.objective.name, self.plan.seed, self.rank, step)
        return self.objective.batch(rng, self.plan.progress(step, float(self.seconds)))


def _batches(batches: _Batches, first_step: int) -> Iterator[Batch]:
    """Batches from a step on: drawn by worker processes on a GPU's machine, by this process on a CPU."""
    steps = range(first_step, 2**40)
    workers = batches.plan.workers
    prefetch = 4 if workers else None
    return iter(DataLoader(batches, None, sampler=steps, num_workers=workers, prefetch_factor=prefetch))


def _progresses(state: TrainingState, plan: Plan) -> Iterator[float]:
    """The progress at every step until the end; the clock is read, and shared, at every tenth step."""
    started = plan.clock() - state.seconds
    progress = _shared(plan.progress(state.step, state.seconds))
    while progress < 1:
        yield progress
        state.seconds = plan.clock() - started
        if plan.steps is not None or state.step % 10 == 0:
            progress = _shared(plan.progress(state.step, state.seconds))


def train(objective: Objective, plan: Plan) -> Objective:
    """Train a stage to the end of its plan and leave the averaged weights in the objective.

    An interrupted stage goes on where its folder in plan.workdir left off. Raises FloatingPointError on a loss that
    is not finite.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    objective.to(plan.device)
    state = TrainingState(objective, plan)
    resumed = state.resume()
    model = DistributedDataParallel(objective) if dist.is_initialized() else objective
    if rank == 0:
        count = sum(p.numel() for _, p in state.named)
        print(
            f"{objective.name}: {count / 1e6:.2f} M weights, {'resumed at' if resumed else 'from'} step {state.step}"
        )
    losses: list[Tensor] = []
    saved = shown = plan.clock()
    first_step, first_seconds = state.step, state.seconds
    source = _Batches(objective, plan, rank)
    batches = _batches(source, state.step)
    for progress in _progresses(state, plan):
        source.seconds[0] = state.seconds
        torch.manual_seed(int(stream(f"noise {objective.name}", plan.seed, rank, state.step).integers(2**62)))
        losses.append(_step(model, next(batches), objective, state, plan, progress))
        if rank == 0 and state.step % plan.log_every == 0:
            loss = torch.stack(losses).mean().item()
            rate = (state.step - first_step) / max(1e-9, state.seconds - first_seconds)
            print(
                f"{objective.name} step {state.step} {progress:.1%} loss {loss:.4f} {rate:.2f} steps/s",
                flush=True,
            )
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss of stage {objective.name} is {loss} at step {state.step}")
            losses.clear()
        if rank == 0 and plan.clock() - saved > plan.save_every:
            state.save()
            saved = plan.clock()
        if rank == 0 and plan.clock() - shown > plan.show_every:
            _show(objective, state, plan)
            shown = plan.clock()
    if rank == 0 and state.step > first_step:
        state.save()
    state.swap_average()
    return objective


def _step(
    model: nn.Module, batch: Batch, objective: Objective, state: TrainingState, plan: Plan, progress: float
) -> Tensor:
    batch = {key: tensor.to(plan.device, non_blocking=True) for key, tensor in batch.items()}
    for group in state.optimizer.param_groups:
        group["lr"] = objective.learning_rate * learning_rate_factor(state.step, progress)
    kind = plan.device.partition(":")[0]
    with torch.autocast(kind, torch.bfloat16, enabled=plan.bf16 or kind == "cuda"):
        loss = model(batch)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in state.named], 1.0)
    state.optimizer.step()
    state.step += 1
    state.update_average(objective.ema_decay)
    return loss.detach()


def _show(objective: Objective, state: TrainingState, plan: Plan) -> None:
    """Sample pictures with the averaged weights."""
    folder = plan.workdir / "samples"
    folder.mkdir(exist_ok=True)
    state.swap_average()
    with torch.no_grad():
        objective.sample(folder)
    state.swap_average()


def join(rank: int, processes: int, store: Path) -> None:
    """Enter the group of processes that average their gradients, meeting at the file `store`.

    One thread each: on two cores, two processes were faster than one with two threads. A GPU each, where there are.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if processes == 1:
        return
    several = torch.cuda.device_count() >= processes
    if several:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if several else "gloo"
    dist.init_process_group(backend, init_method=store.resolve().as_uri(), rank=rank, world_size=processes)
