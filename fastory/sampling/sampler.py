"""Denoise one micro-batch of frames against contexts that were projected beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastory.conditioning.context import Context, Shared
from fastory.conditioning.history import HistoryRow
from fastory.conditioning.references import ReferenceRow
from fastory.models.protocol import Caption, Model, UnetInputs
from fastory.sampling.clock import timed
from fastory.sampling.denoiser import denoiser_of
from fastory.sampling.schedulers import SchedulerStep, make_scheduler
from fastory.settings import SCHEDULERS, Settings, is_within

# Shapes of a round whose buffers and graphs are kept: an iterative story has two, a causal one has one.
KEPT_ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Row:
    """One frame to denoise. seed: of its generator, from which its initial noise and the noise of every step are drawn.

    conditional and unconditional: what the two rows of the frame attend to, as the round's context takes it. caption and
    negative: whose pooled text SDXL takes. start: latents (1, c, h, w) without noise that a row which takes but the last steps
    begins from; None for zeros.
    """

    frame: int
    seed: int
    caption: Caption
    negative: Caption
    conditional: ReferenceRow | HistoryRow
    unconditional: ReferenceRow | HistoryRow
    start: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RoundInputs:
    """What the UNet calls of rounds of one shape read. parts: by whether a step is guided, and whether it has references."""

    whole: UnetInputs
    parts: dict[tuple[bool, bool], UnetInputs] = field(default_factory=dict)


class Sampler:
    """Owns the static input buffers of one micro-batch shape; nothing is allocated per step but what the UNet needs.

    It serves one story after the other: see sampler_for.

    No tensor is read on the host inside the step loop, so a CUDA graph can be put around a step.
    """

    def __init__(self, model: Model, settings: Settings, batch_size: int, width: int, height: int) -> None:
        """width, height: of the picture, in pixels. batch_size: frames per micro-batch."""
        self.model, self.settings, self.batch_size = model, settings, batch_size
        placement, sizes = model.placement, model.sizes
        self.serves = served(model, settings, batch_size, width, height)
        self.guided = is_guided(model, settings)
        self.rows = batch_size * rows_per_frame(model, settings)
        self.scheduler = make_scheduler(model, settings.scheduler)
        self.set_steps(settings.steps)
        factor = model.vae_factor
        self.latent_shape = (sizes.latent_channels, height // factor, width // factor)
        options: dict[str, Any] = {"device": placement.device, "dtype": placement.dtype}
        self.latents = torch.zeros(batch_size, *self.latent_shape, **options)
        self.timestep = torch.zeros((), device=placement.device, dtype=self.timesteps.dtype)
        self.timestep_cond = (
            None
            if sizes.guidance_embedding is None
            else model.guidance_embedding(settings.guidance_scale, self.rows)
        )
        self.conditions: dict[str, Tensor] | None = None
        if sizes.pooled_width is not None:
            row = model.added_conditions(torch.zeros(1, sizes.pooled_width, **options), width, height)
            self.conditions = {name: value.repeat(self.rows, 1) for name, value in row.items()}
        self.model_input = torch.zeros(self.rows, *self.latent_shape, **options)
        self.rounds: list[RoundInputs] = []  # the current one first
        self.denoiser = denoiser_of(model, settings.cache_interval)

    def use(self, settings: Settings) -> None:
        """Serve another story, with settings of which `served` says the same."""
        self.settings = settings
        self.scheduler = make_scheduler(self.model, settings.scheduler)
        self.set_steps(settings.steps)
        if self.timestep_cond is not None:
            self.timestep_cond.copy_(self.model.guidance_embedding(settings.guidance_scale, self.rows))

    def set_steps(self, steps: int, taken: int | None = None) -> None:
        """Denoise in this many steps from now on. What a UNet call reads keeps its place, so captured graphs stay good.

        taken: only so many of them, the last ones, from rows' `start` with the noise that belongs there (SDEdit, arXiv
        2108.01073); None for all, from noise alone.
        """
        self.scheduled = steps
        self.steps = steps if taken is None else taken
        self.skipped = steps - self.steps
        self.scheduler.set_timesteps(steps, device="cpu")
        self.timesteps = self.scheduler.timesteps.to(self.model.placement.device)
        # DDIM and PNDM index their tables by a Python int; the others keep a step index and take the tensor.
        by_index = hasattr(self.scheduler, "set_begin_index")
        self.host_timesteps: list[Any] = (
            list(self.scheduler.timesteps) if by_index else self.scheduler.timesteps.tolist()
        )

    @property
    def inputs(self) -> UnetInputs | None:
        """What a UNet call of all rows reads; None before the first round."""
        return self.rounds[0].whole if self.rounds else None

    @property
    def context(self) -> Context | None:
        """What the next micro-batches attend to; None before the first round."""
        return None if self.inputs is None else self.inputs.context

    @torch.inference_mode()
    def set_round(self, shared: Shared) -> None:
        """Make `shared` what the next micro-batches attend to.

        Inputs of the same shapes are written where those of an earlier round were, so that a captured graph stays good: an
        iterative story has two shapes, round 0 without references and every later round; a causal one has one.
        """
        for number, held in enumerate(self.rounds):
            if shared.refill(held.whole.context):
                self.rounds.insert(0, self.rounds.pop(number))
                return
        for dropped in self.rounds[KEPT_ROUNDS - 1 :]:
            for inputs in (dropped.whole, *dropped.parts.values()):
                self.denoiser.forget(inputs)
        del self.rounds[KEPT_ROUNDS - 1 :]
        context = shared.context(self.rows, self.context)
        whole = UnetInputs(self.model_input, self.timestep, context, self.timestep_cond, self.conditions)
        self.rounds.insert(0, RoundInputs(whole))

    def inputs_of(self, guided: bool, referenced: bool) -> UnetInputs:
        """What a step reads: all rows or the conditional ones alone, with references or without, in the same memory."""
        held = self.rounds[0]
        if (guided, referenced) not in held.parts:
            inputs = held.whole if guided == self.guided else held.whole.last_rows(self.batch_size)
            if not referenced:
                inputs = replace(inputs, context=inputs.context.without_references())
            held.parts[guided, referenced] = inputs
        return held.parts[guided, referenced]

    def compile(self) -> Iterator[tuple[int, int]]:
        """Compile what the steps of this round want and is not there yet; yields (done, of all) after each part of it."""
        calls = len(self.host_timesteps)
        wanted = {self.wants(number, calls) for number in range(self.skipped, calls)}
        with torch.inference_mode():
            inputs = [self.inputs_of(*rows) for rows in sorted(wanted)]
        for part in inputs:
            compiling = self.denoiser.compile(part)
            while True:
                with torch.inference_mode():  # not around a yield: the reader's code is not ours
                    done = next(compiling, None)
                if done is None:
                    break
                yield done

    def wants(self, number: int, calls: int) -> tuple[bool, bool]:
        """Whether a call, of `calls`, is guided, and whether it has references."""
        guided = self.guided and is_within(self.settings.guidance_interval, number, calls)
        return guided, is_within(self.settings.reference_interval, number, calls)

    def _load(self, rows: Sequence[Row]) -> list[torch.Generator]:
        """Copy the rows into the static buffers, padded with the last one; returns each row's generator.

        Rows of one seed have one generator, and all of them get its noise.
        """
        padded = [*rows, *[rows[-1]] * (self.batch_size - len(rows))]
        generators = {row.seed: torch.Generator().manual_seed(row.seed) for row in padded}
        noise = {seed: self.noise_of(generator) for seed, generator in generators.items()}
        for index, row in enumerate(padded):
            self.latents[index : index + 1] = self.first_latents(noise[row.seed], row.start)
            self.put(index, row)
        return [generators[row.seed] for row in padded]

    def read(self, n: int, number: int) -> tuple[Tensor, Tensor]:
        """Latents (1, c, h, w) of row n as call `number` reads them, and its timestep: what else may be predicted there."""
        scaled = self.scheduler.scale_model_input(self.latents, self.host_timesteps[number])
        return scaled[n : n + 1], self.timesteps[number]

    def put(self, n: int, row: Row) -> None:
        """Write what row n attends to; its latents stay, so it may be done between two steps."""
        filled = [(self.rows - self.batch_size + n, row.conditional, row.caption)]
        if self.guided:
            filled.append((n, row.unconditional, row.negative))
        assert self.inputs is not None
        for index, row_inputs, caption in filled:
            self.inputs.context.put(index, row_inputs)
            if self.conditions is not None:
                assert caption.pooled is not None
                self.conditions["text_embeds"][index : index + 1] = caption.pooled

    @torch.inference_mode()
    def denoise(
        self, rows: Sequence[Row], prepare: Callable[[int], object] | None = None
    ) -> Iterator[tuple[int, float]]:
        """Denoise up to batch_size rows from their initial noise; yields (its number from 1, seconds) of each finished step.

        prepare: called before every UNet call with its number from 0, to write into the context what that call reads.
        seconds: on the device, without what the reader does between two steps. Afterwards `latents[n : n + 1]` is row n.
        Raises what PyTorch raises when memory runs out.
        """
        solves = SCHEDULERS[self.settings.scheduler].solves
        self.scheduler.set_timesteps(
            self.scheduled, device="cpu"
        )  # clears what multi-step schedulers remember
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.skipped)
        numbers = range(self.skipped, len(self.host_timesteps))
        self.denoiser.begin()
        within = SchedulerStep(self.model.placement.device, self._load(rows), len(numbers), solves)
        steps = map(partial(self._step, within, prepare), numbers)
        yield from enumerate(timed(self.model.placement.device, steps), 1)

    def _step(self, within: SchedulerStep, prepare: Callable[[int], object] | None, number: int) -> None:
        """One denoising step of all rows, from `latents` to `latents`."""
        if prepare is not None:
            prepare(number)
        timestep = self.host_timesteps[number]
        self.timestep.copy_(self.timesteps[number])
        scaled = self.scheduler.scale_model_input(self.latents, timestep)
        calls = len(self.host_timesteps)  # PNDM begins with more calls than steps
        guided, referenced = self.wants(number, calls)
        inputs = self.inputs_of(guided, referenced)
        inputs.latents.copy_(torch.cat([scaled, scaled]) if guided else scaled)
        noise = self._guide(self.denoiser.predict(inputs), guided)
        with within:
            # UniPC and PNDM keep the sample they are given, so it must not be the buffer that is written next.
            latents = self.scheduler.step(noise, timestep, self.latents.clone(), return_dict=False)[0]
        self.latents.copy_(latents)

    def _guide(self, prediction: Tensor, guided: bool) -> Tensor:
        """Classifier-free guidance: rows are [unconditional; conditional]. The result is never the graph's own memory."""
        if not guided:
            return prediction.clone()  # PNDM keeps it for later steps
        unconditional, conditional = prediction.chunk(2)
        return unconditional + self.settings.guidance_scale * (conditional - unconditional)

    def noise_of(self, generator: torch.Generator) -> Tensor:
        """What diffusers draws for one picture from `generator`: (1, c, h, w)."""
        shape = (1, *self.latent_shape)
        return randn_tensor(
            shape, generator=generator, device=self.model.placement.device, dtype=self.model.placement.dtype
        )

    def first_latents(self, noise: Tensor, start: Tensor | None) -> Tensor:
        """What the first step takes (1, c, h, w): noise as the scheduler scales it, or `start` with its share of it."""
        if not self.skipped:
            return noise * self.scheduler.init_noise_sigma
        clean = torch.zeros_like(noise) if start is None else start
        first = self.scheduler.timesteps[self.skipped : self.skipped + 1]
        # On the host and in float32: the scheduler would move its tables to where the latents are, and leave them there.
        return self.scheduler.add_noise(clean.float().cpu(), noise.float().cpu(), first).to(noise)


def served(
    model: Model, settings: Settings, batch_size: int, width: int, height: int
) -> tuple[int, int, int, str, int, bool]:
    """Equal for stories that one sampler can serve."""
    how = settings.scheduler, settings.cache_interval
    return batch_size, width, height, *how, is_guided(model, settings)


def sampler_for(model: Model, settings: Settings, batch_size: int, width: int, height: int) -> Sampler:
    """A sampler for a story: what an earlier one left at the model where it serves this one, with what it has captured.

    One that does not goes before the new one comes. Two stories that are drawn at the same time have one each.
    """
    wanted = served(model, settings, batch_size, width, height)
    while model.idle_samplers:
        idle: Sampler = model.idle_samplers.pop()
        if idle.model is model and idle.serves == wanted:
            idle.use(settings)
            return idle
        del idle
    return Sampler(model, settings, batch_size, width, height)


def leave_idle(sampler: Sampler | None) -> None:
    """Leave the sampler of a finished story at its model, where the next story takes it."""
    if sampler is not None:
        sampler.model.idle_samplers[:] = [sampler]


def is_guided(model: Model, settings: Settings) -> bool:
    """Whether a frame has an unconditional row; a UNet distilled with guidance (LCM) takes the scale as an input."""
    return settings.guidance_scale > 1 and model.sizes.guidance_embedding is None


def rows_per_frame(model: Model, settings: Settings) -> int:
    """Rows of a UNet call that one frame takes."""
    return 2 if is_guided(model, settings) else 1
