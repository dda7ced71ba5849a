"""`fastory tune`: parameter-efficient tuning of causal mode on a folder of stories."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from fastory import files
from fastory.errors import FastoryError, InputError
from fastory.models.torch_model import StoryModel
from fastory.tuning.batches import Batches
from fastory.tuning.objectives.imitation import Teacher
from fastory.tuning.objectives.paired_stories import check_paired_stories, paired_stories_of
from fastory.tuning.objectives.preservation import Untuned
from fastory.tuning.sizes import HistorySizes, Tuning, tuning_folder
from fastory.tuning.state import HINT, KEPT, Learner, Progress, is_adapter, write_tensors
from fastory.tuning.stories import Example, digest_of, read_examples
from fastory.tuning.tables import Tables, encode_examples, open_tables
from fastory.tuning.trainable import adapter_file, prepare
from fastory.tuning.training_module import TrainingModule
from fastory.tuning.validation import Validation
from fastory.wording import counted

LOG_EVERY = 10
NO_RESULT = ("save_every", "validate_every")  # settings that do not change the weights


@dataclass(frozen=True)
class Encoded:
    """Frames of the stories whose latents and captions are computed, of how many."""

    done: int
    frames: int


@dataclass(frozen=True)
class Stepped:
    """A step was made. loss: the mean since the last one, at every tenth step, else None."""

    step: int
    steps: int
    loss: float | None


@dataclass(frozen=True)
class Validated:
    """Pictures were drawn for TensorBoard. loss: on stories that are not trained, None where all are."""

    step: int
    loss: float | None


@dataclass(frozen=True)
class Tuned:
    """The adapter is written."""

    adapter: Path
    step: int


Event = Encoded | Stepped | Validated | Tuned


@dataclass
class TuningRun:
    """A tuning whose input is good. held_out: stories, the last ones by name, that are not trained.

    of_base: weights of the history encoder that the base brings.
    """

    model: StoryModel
    examples: list[Example]
    tuning: Tuning
    size: tuple[int, int]
    output: Path
    held_out: int
    progress: Progress
    accelerator: Accelerator
    writer_class: Any
    teacher: Teacher | None
    untuned: Untuned | None
    of_base: Collection[str]

    @property
    def tables(self) -> Path:
        """Where the tables of these stories, this base and this size lie."""
        history = self.model.require_history().encoder.config.as_dict()
        said = [digest_of(self.examples), self.size, sorted(self.model.hashes.items()), history]
        said += ["references"] if self.teacher else []
        return self.progress.folder / f"tables-{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}"


def tune(
    stories: str | Path,
    output: str | Path,
    *,
    model: str = "builtin",
    adapter: str | None = None,
    ip_adapter: str | None = None,
    image_encoder: str | None = None,
    tuning: Tuning | None = None,
    sizes: HistorySizes | None = None,
    held_out: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    offline: bool = False,
) -> Iterator[Event]:
    """Tune causal mode of `model` on a folder of stories; the result is one file for --adapter. Yields events.

    adapter: a file to start from. ip_adapter, image_encoder: what tuning.imitate imitates, where the base's folder does not
    bring it. held_out: stories kept for validation. The same call goes on where it was
    interrupted, from the folder <output>.tuning, where TensorBoard's files are as well.
    Everything is checked before the first event and before anything is written: raises InputError.
    """
    files: dict[str, Any] = {"adapter": adapter, "ip_adapter": ip_adapter, "image_encoder": image_encoder}
    run = begin(Path(stories), Path(output), model, files, tuning or Tuning(), sizes or HistorySizes(), held_out,
                device, overwrite, offline)  # fmt: skip
    return events_of(run, overwrite)


def begin(
    stories: Path,
    output: Path,
    model: str,
    files: Mapping[str, Any],
    tuning: Tuning,
    sizes: HistorySizes,
    held_out: int,
    device: str,
    overwrite: bool,
    offline: bool,
) -> TuningRun:
    """Open and check everything; writes nothing."""
    tuning.check()
    writer_class = summary_writer()
    folder = tuning_folder(output)
    if files.get("adapter") is not None and sizes.size is not None:
        raise InputError(
            "--adapter starts from an encoder, --history-size makes a new one; give one of the two"
        )
    idle = DistributedDataParallelKwargs(find_unused_parameters=tuning.imitate > 0 and tuning.self_attention)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision(device), kwargs_handlers=[idle])
    if device == "auto":
        device = str(accelerator.device) if accelerator.device.type == "cuda" else "cpu"
    opened = StoryModel.open(model, **files, device=device, dtype="float32", graphs="off", offline=offline)
    teacher = teacher_of(opened, tuning)
    untuned = Untuned(opened, tuning.preserve) if tuning.preserve else None  # before there are updates
    size = trained_size(opened, tuning)
    examples = read_examples(stories, size)
    if not 0 <= held_out < len(examples):
        raise InputError(
            f"--validation: wanted 0 to {len(examples) - 1} of the {len(examples)} stories, got {held_out}"
        )
    check_paired_stories(paired_stories_of(examples[: len(examples) - held_out]), tuning)
    requested = {name: value for name, value in asdict(tuning).items() if name not in NO_RESULT}
    identity = {**requested, **{f"history {k}": v for k, v in asdict(sizes).items()}, "size": size,
                "validation": held_out, "stories": digest_of(examples), "base": opened.hashes}  # fmt: skip
    longest = min(tuning.frames, max(len(example.prompts) for example in examples)) - 1
    window = tuning.window if isinstance(tuning.window, int) else longest
    of_base = prepare(
        opened, sizes, tuning.rank, max(window, 1), tuning.seed, tuning.self_attention, tuning.freeze_encoder
    )
    check_window(opened.require_history().encoder.config.positions, tuning, longest)
    progress = Progress(folder, identity)
    check_output(output, progress, overwrite)
    return TuningRun(
        opened,
        examples,
        tuning,
        size,
        output,
        held_out,
        progress,
        accelerator,
        writer_class,
        teacher,
        untuned,
        of_base,
    )


def check_output(output: Path, progress: Progress, overwrite: bool) -> None:
    """InputError for an output or a folder beside it that no tuning made, or another tuning without `overwrite`."""
    ours = progress.check(overwrite)
    if not output.exists():
        return
    if not (ours or overwrite):
        raise InputError(
            f"{output} exists and no tuning beside it made it; choose another --output, or --overwrite"
        )
    if not is_adapter(output):
        raise InputError(
            f"{output} is no adapter of a tuning, and nothing else is ever replaced; move it away, or {HINT}"
        )


def teacher_of(model: StoryModel, tuning: Tuning) -> Teacher | None:
    """The base and its IP-Adapter, before anything is changed, where they are imitated."""
    if not tuning.imitate:
        return None
    if model.adapter is None:
        raise InputError(
            f"--imitate: {model.name} has no IP-Adapter to imitate; wanted: --ip-adapter FILE.safetensors "
            "(and --image-encoder FOLDER)"
        )
    return Teacher(model, tuning.imitate_scale)


def summary_writer() -> Any:
    """TensorBoard's writer of losses and pictures."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "tuning writes its losses and pictures to TensorBoard files, and the package tensorboard is not installed; "
            "run: pip install 'fastory[tune]'"
        ) from None
    return SummaryWriter


def precision(device: str) -> str:
    """bf16 on a GPU that has it; off on the CPU, where it is slower and rounds."""
    return (
        "bf16" if device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    )


def trained_size(model: StoryModel, tuning: Tuning) -> tuple[int, int]:
    """(width, height) of the trained pictures: as asked for, or as the model's folder or its UNet says."""
    requested = {"width": tuning.width, "height": tuning.height}
    own = dict(zip(requested, model.native_size, strict=True))
    width, height = (requested[name] or int(model.defaults.get(name) or own[name]) for name in requested)
    for name, value in (("--width", width), ("--height", height)):
        if value < model.size_factor or value % model.size_factor:
            raise InputError(
                f"{name}: wanted a multiple of {model.size_factor} pixels for this UNet, got {value}"
            )
    return width, height


def check_window(positions: int, tuning: Tuning, longest: int) -> None:
    """InputError for a window with more frames than the encoder has time embeddings."""
    wanted = longest if tuning.window == "all" else tuning.window
    if isinstance(wanted, int) and wanted > positions:
        raise InputError(
            f"--window {tuning.window} takes {counted(wanted, 'frame')} of history, and the encoder has "
            f"time embeddings for {positions}; give a smaller --window or --frames, or with a new encoder a larger --positions"
        )


def events_of(run: TuningRun, overwrite: bool) -> Iterator[Event]:
    """Encode the stories, train, write the adapter. Holds the folder's lock meanwhile."""
    with files.disk_errors(run.progress.folder, KEPT), ExitStack() as stack:
        if run.accelerator.is_main_process:
            claim(run, overwrite, stack)
        state = None if overwrite else run.progress.read()
        if state and is_written(run.output, state.get("adapter")):
            if run.accelerator.is_main_process:
                run.progress.clear()  # a kill may have left some of it
            yield Tuned(run.output, state["step"])
            return
        if run.accelerator.is_main_process:
            for done, frames in encode_examples(
                run.model, run.examples, run.size, run.tables, run.teacher is not None
            ):
                yield Encoded(done, frames)
        run.accelerator.wait_for_everyone()
        tables = open_tables(run.model, run.examples, run.size, run.tables)
        yield from train(run, tables, state, stack)


def is_written(output: Path, digest: str | None) -> bool:
    """Whether the output is the adapter of this hash; without a hash none was written."""
    return digest is not None and output.is_file() and files.sha256_of(output) == digest


def claim(run: TuningRun, overwrite: bool, stack: ExitStack) -> None:
    """Make and lock the tuning's folder; with `overwrite` remove what a tuning left there."""
    folder = run.progress.folder
    files.folder_for(folder, HINT)
    stack.enter_context(files.locked_folder(folder, "tunes in", HINT))
    run.progress.check(overwrite)  # by another process since the door
    run.progress.begin(anew=overwrite)


def train(run: TuningRun, tables: Tables, state: dict[str, Any] | None, stack: ExitStack) -> Iterator[Event]:
    """All steps, from the last checkpoint on, then the file of averaged weights."""
    tuning, accelerator = run.tuning, run.accelerator
    module = TrainingModule(run.model, tables.nothing, run.teacher, tuning.contrast, run.untuned).to(
        run.model.device
    )
    learner = Learner(module.learning(), tuning.learning_rate, tuning.ema_decay)
    if state and "file" in state:
        run.progress.resume(learner, state)
    count = len(run.examples)
    source = batches_of(run, module, tables, range(count - run.held_out), tuning)
    plain = replace(tuning, contrast=0.0, patches=0.0, first_frames=0.0, preserve=0.0)
    judge = Validation(
        run.model, module, batches_of(run, module, tables, range(count - run.held_out, count), plain)
    )
    writer = None
    if accelerator.is_main_process:
        writer = run.writer_class(str(run.progress.folder / "tensorboard"), purge_step=learner.step)
        stack.callback(writer.close)
    parallel, optimizer = accelerator.prepare(module, learner.optimizer, device_placement=[False, False])
    losses: list[torch.Tensor] = []
    while learner.step < tuning.steps:
        imitated = learner.step < tuning.imitate
        batch = source.draw(learner.step, accelerator.process_index, references=imitated)
        losses.append(one_step(accelerator, parallel, optimizer, learner, batch.to(run.model.device), tuning))
        loss = log(writer, losses, learner) if learner.step % LOG_EVERY == 0 else None
        yield Stepped(learner.step, tuning.steps, loss)
        if not accelerator.is_main_process:
            continue
        if learner.step % tuning.save_every == 0 or learner.step == tuning.steps:
            run.progress.save(learner)
        if tuning.validate_every and (
            learner.step % tuning.validate_every == 0 or learner.step == tuning.steps
        ):
            with learner.averaged():
                found = judge.show(writer, learner.step, run.examples[-1], run.size)
            yield Validated(learner.step, found)
    if accelerator.is_main_process:
        yield finish(run, module, learner)


def batches_of(
    run: TuningRun, module: TrainingModule, tables: Tables, stories: range, tuning: Tuning
) -> Batches:
    """The batches of some of the stories."""
    timesteps = int(module.denoising.scheduler.config.num_train_timesteps)
    paired = paired_stories_of(run.examples[: stories.stop]) if tuning.contrast or tuning.patches else ()
    return Batches(tables, stories, tuning, run.model.require_history(), timesteps, paired)


def one_step(
    accelerator: Accelerator, parallel: Any, optimizer: Any, learner: Learner, batch: Any, tuning: Tuning
) -> torch.Tensor:
    """Loss, gradients, one step of the optimizer, the averages."""
    for group in optimizer.param_groups:
        group["lr"] = tuning.learning_rate * learning_rate_factor(learner.step, tuning)
    loss = parallel(batch)
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(loss)
    for parameter in learner.named.values():  # updates of self-attention have no part in an imitation
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    accelerator.clip_grad_norm_(learner.named.values(), tuning.clip)
    optimizer.step()
    learner.average.step(learner.named.values())
    learner.step += 1
    return loss.detach()


def learning_rate_factor(step: int, tuning: Tuning) -> float:
    """Warm-up, then constant, then a straight line down to 2 % over the last half: no schedule of diffusers' get_scheduler.

    It is a function of the step alone, so a resume needs no state of it.
    """
    rest = 2 * (1 - step / tuning.steps)
    return min(1.0, (step + 1) / max(1, tuning.warmup)) * max(0.02, min(1.0, rest))


def log(writer: Any, losses: list[torch.Tensor], learner: Learner) -> float:
    """The mean of the last losses, to TensorBoard as well, where there is a writer: in the main process.

    Raises FastoryError where it is not finite.
    """
    loss = float(torch.stack(losses).mean())
    losses.clear()
    if not np.isfinite(loss):
        raise FastoryError(
            f"the loss is {loss} at step {learner.step}; tune anew with a lower --learning-rate, and --overwrite"
        )
    if writer is not None:
        writer.add_scalar("loss", loss, learner.step)
        writer.add_scalar("learning rate", learner.optimizer.param_groups[0]["lr"], learner.step)
    return loss


def finish(run: TuningRun, module: TrainingModule, learner: Learner) -> Tuned:
    """Write the averaged weights as an adapter; tables and state are not needed any more."""
    with learner.averaged():
        digest = write_tensors(run.output, *adapter_file(module, run.of_base))
    run.progress.finish(learner.step, digest)
    return Tuned(run.output, learner.step)
