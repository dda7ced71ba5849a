"""Denoise one micro-batch of frames against contexts that were projected beforehand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastory.errors import FastoryError
from fastory.models.torch_model import Caption, StoryModel
from fastory.processors.projected import Context, Shared
from fastory.runtime import is_out_of_memory
from fastory.sampling.clock import timed
from fastory.sampling.schedulers import SchedulerStep, make_scheduler
from fastory.settings import Settings


class Replayed(Protocol):
    """A captured UNet call."""

    def replay(self) -> None:
        """Compute it again from what its static inputs hold now."""


@contextmanager
def explained(capture: AbstractContextManager[Any]) -> Iterator[None]:
    """`capture`, with the error that a failed call raised in place of the one that torch raises at the end of it.

    Raises FastoryError for a call that cannot be captured; memory that ran out is what it is, so that less is tried.
    """
    first: RuntimeError | None = None
    try:
        with capture:
            try:
                yield
            except RuntimeError as error:
                first = error
                raise
    except RuntimeError as error:
        first = first or error
        if is_out_of_memory(first):
            raise first from None
        raise FastoryError(f"a UNet call could not be captured ({first}); draw with --graphs off") from error


@dataclass(frozen=True, eq=False)
class Row:
    """One frame to denoise. seed: of its generator, from which its initial noise and the noise of every step are drawn.

    inputs and null_inputs: what the conditional and the unconditional row attend to, a row of each of the context's
    per_row tensors. caption and negative: whose pooled text SDXL takes.
    """

    frame: int
    seed: int
    caption: Caption
    negative: Caption
    inputs: tuple[Tensor, ...]
    null_inputs: tuple[Tensor, ...]


class Sampler:
    """Owns the static input buffers of one micro-batch shape; nothing is allocated per step but what the UNet needs.

    No tensor is read on the host inside the step loop, so a CUDA graph can be put around a step.
    """

    def __init__(
        self, model: StoryModel, settings: Settings, batch_size: int, width: int, height: int
    ) -> None:
        """width, height: of the picture, in pixels. batch_size: frames per micro-batch."""
        self.model, self.settings, self.batch_size = model, settings, batch_size
        unet = model.unet
        self.distilled = unet.config.time_cond_proj_dim is not None
        self.guided = is_guided(model, settings)
        self.rows = batch_size * rows_per_frame(model, settings)
        self.scheduler = make_scheduler(model, settings.scheduler)
        self.scheduler.set_timesteps(settings.steps, device="cpu")
        self.timesteps = self.scheduler.timesteps.to(model.device)
        # DDIM and PNDM index their tables by a Python int; the others keep a step index and take the tensor.
        by_index = hasattr(self.scheduler, "set_begin_index")
        self.host_timesteps: list[Any] = (
            list(self.scheduler.timesteps) if by_index else self.scheduler.timesteps.tolist()
        )
        factor = model.vae_factor
        self.latent_shape = (int(unet.config.in_channels), height // factor, width // factor)
        options: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
        self.latents = torch.zeros(batch_size, *self.latent_shape, **options)
        self.timestep = torch.zeros((), device=model.device, dtype=self.timesteps.dtype)
        self.timestep_cond = self._guidance_embedding() if self.distilled else None
        self.conditions = self._added_conditions(width, height)
        self.model_input = torch.zeros(self.rows, *self.latent_shape, **options)
        self.context: Context | None = None
        self.graph: Replayed | None = None

    def _guidance_embedding(self) -> Tensor:
        """The guidance scale as an input, for UNets distilled with it (LCM)."""
        weights = torch.full((self.rows,), self.settings.guidance_scale - 1)
        dim = int(self.model.unet.config.time_cond_proj_dim)
        embedding = self.model.pipeline.get_guidance_scale_embedding(weights, embedding_dim=dim)
        return embedding.to(self.model.device, self.model.dtype)

    def _added_conditions(self, width: int, height: int) -> dict[str, Tensor] | None:
        if self.model.family != "sdxl":
            return None
        pooled = torch.zeros(1, self.model.pipeline.text_encoder_2.config.projection_dim)
        row = self.model.added_conditions(pooled.to(self.model.device, self.model.dtype), width, height)
        return {name: value.repeat(self.rows, 1) for name, value in row.items()}

    @torch.inference_mode()
    def set_round(self, shared: Shared) -> None:
        """Make `shared` what the next micro-batches attend to.

        Inputs of the same shapes are written where the last round's were, so that a captured graph stays good: an
        iterative story has two shapes, round 0 without references and every later round; a causal one has one.
        """
        if self.context is None or not shared.refill(self.context):
            self.graph = None
            self.context = shared.context(self.rows)

    def _load(self, rows: Sequence[Row]) -> list[torch.Generator]:
        """Copy the rows into the static buffers, padded with the last one; returns each row's generator.

        A row that stands in for others, too, has one generator, and all of them get its noise.
        """
        padded = [*rows, *[rows[-1]] * (self.batch_size - len(rows))]
        generators = {row: torch.Generator().manual_seed(row.seed) for row in padded}
        noise = {row: self.initial_noise(generator) for row, generator in generators.items()}
        for place, row in enumerate(padded):
            self.latents[place : place + 1] = noise[row]
        inputs = [(row.inputs, row.caption) for row in padded]
        if self.guided:
            inputs = [(row.null_inputs, row.negative) for row in padded] + inputs
        assert self.context is not None
        for place, (tensors, caption) in enumerate(inputs):
            for buffer, tensor in zip(self.context.per_row, tensors, strict=True):
                buffer[place : place + 1] = tensor
            if self.conditions is not None:
                assert caption.pooled is not None
                self.conditions["text_embeds"][place : place + 1] = caption.pooled
        return [generators[row] for row in padded]

    @torch.inference_mode()
    def denoise(self, rows: Sequence[Row]) -> Iterator[tuple[int, float]]:
        """Denoise up to batch_size rows from their initial noise; yields (its number from 1, seconds) of each finished step.

        seconds: on the device, without what the reader does between two steps. Afterwards `latents[n : n + 1]` is row n.
        Raises what PyTorch raises when memory runs out.
        """
        within = SchedulerStep(self.model.device, self._load(rows))
        self.scheduler.set_timesteps(
            self.settings.steps, device="cpu"
        )  # clears what multi-step schedulers remember
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        steps = map(partial(self._step, within), range(len(self.host_timesteps)))
        yield from enumerate(timed(self.model.device, steps), 1)

    def _step(self, within: SchedulerStep, number: int) -> None:
        """One denoising step of all rows, from `latents` to `latents`."""
        timestep = self.host_timesteps[number]
        self.timestep.copy_(self.timesteps[number])
        scaled = self.scheduler.scale_model_input(self.latents, timestep)
        self.model_input.copy_(torch.cat([scaled, scaled]) if self.guided else scaled)
        noise = self._guide(self._replayed() if self.model.placement.graphs else self._predict())
        with within:
            # UniPC and PNDM keep the sample they are given, so it must not be the buffer that is written next.
            latents = self.scheduler.step(noise, timestep, self.latents.clone(), return_dict=False)[0]
        self.latents.copy_(latents)

    def _predict(self) -> Tensor:
        """One UNet call over the static buffers -> (rows, c, h, w)."""
        return self.model.unet(
            self.model_input,
            self.timestep,
            encoder_hidden_states=None,
            timestep_cond=self.timestep_cond,
            added_cond_kwargs=self.conditions,
            cross_attention_kwargs={"context": self.context},
            return_dict=False,
        )[0]

    def _replayed(self) -> Tensor:
        """The same call replayed from a CUDA graph, captured on first use: one launch in place of some thousand.

        The result lies in the graph's own memory, which the next replay writes again.
        """
        if self.graph is None:
            self.graph, self.prediction = self._capture()
        self.graph.replay()
        return self.prediction

    def _capture(self) -> tuple[Replayed, Tensor]:
        """A graph of the call, and where its replay leaves the prediction."""
        device, graph = self.model.device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            # torch's own capture stream belongs to the device that was current at the first capture of the process.
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(
                aside
            ):  # compiles kernels and lets libraries choose, which capture forbids
                self._predict()
                self._predict()
            torch.cuda.current_stream(device).wait_stream(aside)
            with explained(torch.cuda.graph(graph, stream=aside)):
                prediction = self._predict()
        return graph, prediction

    def _guide(self, prediction: Tensor) -> Tensor:
        """Classifier-free guidance: rows are [unconditional; conditional]. The result is never the graph's own memory."""
        if not self.guided:
            return prediction.clone()  # PNDM keeps it for later steps
        unconditional, conditional = prediction.chunk(2)
        return unconditional + self.settings.guidance_scale * (conditional - unconditional)

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """What diffusers draws for one picture from `generator`: (1, c, h, w), scaled for the scheduler."""
        shape = (1, *self.latent_shape)
        noise = randn_tensor(shape, generator=generator, device=self.model.device, dtype=self.model.dtype)
        return noise * self.scheduler.init_noise_sigma


def is_guided(model: StoryModel, settings: Settings) -> bool:
    """Whether a frame has an unconditional row; a UNet distilled with guidance (LCM) takes the scale as an input."""
    return settings.guidance_scale > 1 and model.unet.config.time_cond_proj_dim is None


def rows_per_frame(model: StoryModel, settings: Settings) -> int:
    """Rows of a UNet call that one frame takes."""
    return 2 if is_guided(model, settings) else 1


def frame_seed(own: int | None, redraw_seed: int | None, settings: Settings, frame: int) -> int:
    """The seed of a frame's noise, by the first that is given: --redraw-seed, the frame's own, the run's."""
    if redraw_seed is not None:
        return noise_seed(None, redraw_seed, settings.noise, frame)
    return noise_seed(own, settings.seed, settings.noise, frame)


def noise_seed(own: int | None, seed: int, noise: str, frame: int) -> int:
    """The generator's seed: the frame's own; else `seed` (shared), or the first 8 bytes of sha256("seed:frame")."""
    if own is not None:
        return own
    if noise == "shared":
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{frame}".encode()).digest()[:8], "big")
