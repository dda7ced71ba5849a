"""The module that is trained: causal mode's UNet call with its history, as inference computes it, and its objectives.

context of frame t = [CLIP(c_t) + type_0 ; h_{t-L} + type_1 + time_0 ; ... ; h_{t-1} + type_1 + time_{L-1}]
h = adapter(CA(BLIP(caption, picture)))                       (algorithms.md, section 2)

h comes from one banded pass over the stretch of a story, which equals the runtime's ring frame by frame.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fastory.checkpoints.history_encoder import HistoryEncoder
from fastory.conditioning.history import HistoryContext
from fastory.models.torch_model import StoryModel
from fastory.tuning.batch import Batch, visible_references
from fastory.tuning.objectives.denoising import Denoising, mean_square
from fastory.tuning.objectives.imitation import Teacher, difference
from fastory.tuning.objectives.paired_stories import contrast, patch_loss, patched_noise
from fastory.tuning.objectives.preservation import Untuned
from fastory.tuning.tables import Arrays, history_pixels


class TrainingModule(nn.Module):
    """The UNet, its low-rank updates, and the history encoder of a StoryModel; forward gives the loss."""

    encoder: HistoryEncoder
    no_captions: Tensor
    no_unseen: Tensor
    no_ids: Tensor
    no_mask: Tensor
    no_pixels: Tensor

    def __init__(
        self,
        model: StoryModel,
        nothing: Arrays,
        teacher: Teacher | None = None,
        contrast: float = 0.0,
        untuned: Untuned | None = None,
    ) -> None:
        """nothing: an empty caption and a black picture, a row of Tables. teacher: for batches with references.

        contrast: weight of paired_stories.py's further terms, for batches with pairs and patches. untuned: for
        batches with preserved rows.
        """
        super().__init__()
        self.contrast = contrast
        self.teacher, self.untuned = teacher, untuned
        self.unet, self.encoder = model.unet, model.require_history().encoder
        self.layers = model.layers
        self.denoising = Denoising(model.pipeline.scheduler.config)
        pixels = history_pixels(model.require_history().image_processor, nothing["squares"][None])
        rows = {name: torch.from_numpy(nothing[name])[None] for name in ("captions", "unseen", "ids", "mask")}
        for name, row in {**rows, "pixels": pixels}.items():
            self.register_buffer(f"no_{name}", row, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the objectives that the batch has rows for; of a batch with references, imitation alone."""
        timesteps = batch.timesteps
        if batch.patches is not None:
            alphas = self.denoising.alphas_cumprod(batch.noise, timesteps)
            batch = replace(batch, noise=patched_noise(batch.noise, batch.patches, alphas))
        noisy = self.denoising.noisy(batch.latents, batch.noise, timesteps)
        if batch.references is not None:
            return self.imitate(noisy, batch, batch.references)
        wanted = self.denoising.wanted(batch.latents, batch.noise, timesteps)
        weight: float | Tensor = 1.0
        if batch.preserved is not None:
            assert self.untuned is not None
            captions = self.captions(batch)
            wanted = self.untuned.in_rows(batch.preserved, wanted, noisy, timesteps, captions)
            weight = self.untuned.weights(batch.preserved)
        errors = self.predict(noisy, batch).float() - wanted.float()
        loss = mean_square(errors, weight)
        if batch.pairs is not None:
            loss = loss + self.contrast * contrast(errors, wanted.float(), batch.pairs)
        if batch.patches is not None:
            of_pictures = self.denoising.picture_errors(errors, timesteps)
            loss = loss + self.contrast * patch_loss(of_pictures, batch.patches)
        return loss

    def predict(self, noisy: Tensor, batch: Batch) -> Tensor:
        """The UNet's output (R, c, h, w) for noisy latents."""
        output: Tensor = self.unet(
            noisy,
            batch.timesteps,
            encoder_hidden_states=None,
            cross_attention_kwargs={"context": self.context(batch)},
            return_dict=False,
        )[0]
        return output

    def imitate(self, noisy: Tensor, batch: Batch, references: Tensor) -> Tensor:
        """The layers' difference to the teacher, which sees the same captions and frames, and drops the same rows.

        Another story's frames are those of the next one in the batch; of a pair, those of the other one, which differ in what
        no caption says.
        """
        assert self.teacher is not None
        another = (batch.story + 1) % len(batch.mask) if batch.pairs is None else batch.story ^ 1
        other = replace(batch, story=another)
        target = self.teacher.target(
            noisy,
            batch.timesteps,
            self.captions(batch),
            references.flatten(0, 1),
            visible_references(batch),
            visible_references(other),
        )
        frames = self.frames(batch)
        return difference(self.layers, target, self.context(batch, frames), self.context(other, frames))

    def context(self, batch: Batch, frames: tuple[Tensor, Tensor] | None = None) -> HistoryContext:
        """What the drawn frames attend to, dropped ones to the unconditional row of modes/causal.py.

        frames: self.frames(batch), where it is known.
        """
        drop, kind = batch.dropped[:, None], self.encoder.type_embeddings.weight[0]
        captions = self.captions(batch)
        unseen = torch.where(drop, self.no_unseen, batch.unseen)
        kv, hidden = self.history(batch, *(frames or self.frames(batch)))
        return HistoryContext(
            torch.cat([self.layers.project_text(captions + kind), kv], 1),
            torch.cat([unseen, hidden], 1),
            captions.shape[1],
            self.encoder.config.frame_tokens,
        )

    def captions(self, batch: Batch) -> Tensor:
        """(R, Lt, C_x): the rows' captions, the empty one where a row is dropped."""
        return torch.where(batch.dropped[:, None, None], self.no_captions, batch.captions)

    def frames(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """K and V (B + 1, N - 1, S, W) of every frame, those of the null frame last, and padding (B + 1, N - 1, S)."""
        tokens, padding = self.tokens(batch)
        shape = (len(batch.mask) + 1, -1)
        return self.layers.project_text(tokens).unflatten(0, shape), padding.unflatten(0, shape)

    def history(self, batch: Batch, kv: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """K and V (R, places * S, W) of each frame's window, oldest first, and padding; empty places behind, padded."""
        stories, before = batch.mask.shape[:2]
        places = min(batch.window or before, before)
        # The frame in each place of each row's window; where there is none, any, since it is padded.
        at = torch.arange(places, device=kv.device)[None]
        frame = (batch.index[:, None] - places).clamp(min=0) + at
        empty = frame >= batch.index[:, None]
        story = torch.where(batch.dropped, stories, batch.story)[:, None]
        chosen = kv[story, frame.clamp(max=before - 1)]
        hidden = padding[story, frame.clamp(max=before - 1)] | empty[..., None]
        table = self.layers.project_text(self.encoder.positions()[None])[0, :places]
        return (chosen + table[:, None]).flatten(1, 2), hidden.flatten(1, 2)

    def tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """h of every frame, then of the null frame as often as a story has frames: ((B + 1) * (N - 1), S, C_x), padding."""
        stories, before, size = batch.mask.shape
        ids = torch.cat([batch.ids.flatten(0, 1), self.no_ids])
        mask = torch.cat([batch.mask.flatten(0, 1), self.no_mask])
        m = self.encoder.multimodal(ids, mask, torch.cat([batch.pixels.flatten(0, 1), self.no_pixels]))
        frames, alone = m[:-1].reshape(stories, before * size, -1), m[-1:]
        h = self.encoder(frames, batch.mask.reshape(stories, -1) == 0, batch.window)
        null = self.encoder(alone, self.no_mask == 0, batch.window)
        every = torch.cat([h.reshape(-1, size, h.shape[-1]), null.expand(before, -1, -1)])
        return every, torch.cat([batch.mask.flatten(0, 1), self.no_mask.expand(before, -1)]) == 0

    def learning(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
