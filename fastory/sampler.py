"""Denoise one micro-batch of frames against contexts that were projected beforehand."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastory.attention import Context, Shared
from fastory.errors import FastoryError, InputError
from fastory.model import Caption, StoryModel
from fastory.placement import is_out_of_memory
from fastory.settings import Settings

SCHEDULER_CLASSES = {
    "ddim": "DDIMScheduler",
    "lcm": "LCMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "pndm": "PNDMScheduler",
}


@dataclass(frozen=True)
class Row:
    """One frame to denoise. latents (1, c, h, w): its initial noise.

    inputs and null_inputs: what the conditional and the unconditional row attend to, a row of each of the context's
    per_row tensors. caption and negative: whose pooled text SDXL takes.
    """

    frame: int
    latents: Tensor
    generator: torch.Generator
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
        self.takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        factor = model.vae_factor
        self.latent_shape = (int(unet.config.in_channels), height // factor, width // factor)
        options: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
        self.latents = torch.zeros(batch_size, *self.latent_shape, **options)
        self.timestep = torch.zeros((), device=model.device, dtype=self.timesteps.dtype)
        self.timestep_cond = self._guidance_embedding() if self.distilled else None
        self.conditions = self._added_conditions(width, height)
        self.model_input = torch.zeros(self.rows, *self.latent_shape, **options)
        self.context: Context | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

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
        """Copy the rows into the static buffers; a short micro-batch is padded with its last frame."""
        padded = [*rows, *[rows[-1]] * (self.batch_size - len(rows))]
        for place, row in enumerate(padded):
            self.latents[place : place + 1] = row.latents
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
        generators = [row.generator for row in rows]
        return generators + [_copy(rows[-1].generator) for _ in range(self.batch_size - len(rows))]

    @torch.inference_mode()
    def denoise(self, rows: Sequence[Row]) -> Iterator[int]:
        """Denoise up to batch_size rows from their initial noise; yields the number of each finished step.

        Afterwards `latents[n : n + 1]` is row n. Raises what PyTorch raises when memory runs out.
        """
        generators = self._load(rows)
        self.scheduler.set_timesteps(
            self.settings.steps, device="cpu"
        )  # clears what multi-step schedulers remember
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        options = {"generator": generators} if self.takes_generator else {}
        for number, timestep in enumerate(self.host_timesteps):
            self.timestep.copy_(self.timesteps[number])
            scaled = self.scheduler.scale_model_input(self.latents, timestep)
            self.model_input.copy_(torch.cat([scaled, scaled]) if self.guided else scaled)
            noise = self._guide(self._captured() if self.model.placement.graphs else self._predict())
            # UniPC and PNDM keep the sample they are given, so it must not be the buffer that is written next.
            latents = self.scheduler.step(
                noise, timestep, self.latents.clone(), **options, return_dict=False
            )[0]
            self.latents.copy_(latents)
            yield number + 1

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

    def _captured(self) -> Tensor:
        """The same call replayed from a CUDA graph, captured on first use: one launch in place of some thousand."""
        if self.graph is None:
            aside = torch.cuda.Stream(self.model.device)
            aside.wait_stream(torch.cuda.current_stream(self.model.device))
            with torch.cuda.stream(
                aside
            ):  # compiles kernels and lets libraries choose, which capture forbids
                self._predict()
                self._predict()
            torch.cuda.current_stream(self.model.device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.prediction = self._predict()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise FastoryError(
                    f"a UNet call could not be captured ({error}); draw with --graphs off"
                ) from error
            self.graph = graph
        self.graph.replay()
        return self.prediction

    def _guide(self, prediction: Tensor) -> Tensor:
        """Classifier-free guidance: rows are [unconditional; conditional]."""
        if not self.guided:
            return prediction
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


def make_scheduler(model: StoryModel, name: str) -> Any:
    """The named scheduler with the checkpoint's own noise schedule.

    Raises InputError for LCM on a UNet that was not distilled for it (no time_cond_proj_dim).
    """
    if name == "lcm" and model.unet.config.time_cond_proj_dim is None:
        raise InputError(
            f"scheduler lcm wants a UNet distilled for it (time_cond_proj_dim); {model.name} has none. "
            "Give an LCM UNet with --model, or another --scheduler."
        )
    kind, config = getattr(diffusers, SCHEDULER_CLASSES[name]), dict(model.pipeline.scheduler.config)
    if "clip_sample" in inspect.signature(kind).parameters:
        # DDIM clips by default, which is for pixels. A checkpoint that came with another scheduler does not say so.
        config.setdefault("clip_sample", False)
    return kind.from_config(config)


def noise_seed(own: int | None, seed: int, noise: str, frame: int) -> int:
    """The generator's seed: the frame's own; else `seed` (shared), or the first 8 bytes of sha256("seed:frame")."""
    if own is not None:
        return own
    if noise == "shared":
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{frame}".encode()).digest()[:8], "big")


def _copy(generator: torch.Generator) -> torch.Generator:
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    return twin
