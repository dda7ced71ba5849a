"""The module that is trained: causal mode's UNet call with its history, as inference computes it, and what of it learns.

context of frame t = [CLIP(c_t) + type_0 ; h_{t-L} + type_1 + time_0 ; ... ; h_{t-1} + type_1 + time_{L-1}]
h = adapter(CA(BLIP(caption, picture)))                       (algorithms.md, section 2)

h comes from one banded pass over the stretch of a story, which equals the runtime's ring frame by frame.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from fastory.checkpoints.history import History, image_processor
from fastory.checkpoints.history_encoder import HistoryEncoder
from fastory.conditioning.history import HistoryContext
from fastory.errors import InputError
from fastory.models.torch_model import StoryModel
from fastory.tuning.imitation import Teacher, difference
from fastory.tuning.paired_stories import contrast, patch_loss, patched_noise
from fastory.tuning.preservation import Untuned
from fastory.tuning.sizes import HistorySizes
from fastory.tuning.tables import Arrays, history_pixels

RANK = 8
# The parts of an encoder that the base brings which learn; of a new encoder, and of an adapter's own, everything does.
LEARNS = ("type_embeddings.", "time_embeddings.", "local_attention.", "adapter.")
LEARNS_WITHIN = (".crossattention.self.", ".crossattention.output.dense.")
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Batch:
    """B stretches of stories with up to N frames each, and R frames to draw among them.

    ids, mask (B, N - 1, S), pixels (B, N - 1, 3, s, s): what can become history. story, index (R,): which stretch a
    drawn frame is in, and its index there, the number of frames before it. latents, noise (R, c, h, w); timesteps (R,);
    captions (R, Lt, C_x), unseen (R, Lt); dropped (R,) True for a row without conditions. window: L_M, 0 is all.
    references (B, N - 1, T, C_x): the history for an IP-Adapter, in a step that imitates it. pairs (P, 2): rows with a
    history that have the same caption and noise, of two stories. patches (R, c, h, w): what is added to the latents of a
    noisy picture, and not wanted. preserved (R,): rows that are wanted as the base predicts them.
    """

    ids: Tensor
    mask: Tensor
    pixels: Tensor
    story: Tensor
    index: Tensor
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: Tensor
    unseen: Tensor
    dropped: Tensor
    window: int
    references: Tensor | None = None
    pairs: Tensor | None = None
    patches: Tensor | None = None
    preserved: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


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
        self.scheduler = DDPMScheduler.from_config(model.pipeline.scheduler.config)
        self.prediction = self.scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            raise InputError(f"the base predicts {self.prediction!r}; wanted one of {', '.join(PREDICTIONS)}")
        pixels = history_pixels(model.require_history().image_processor, nothing["squares"][None])
        rows = {name: torch.from_numpy(nothing[name])[None] for name in ("captions", "unseen", "ids", "mask")}
        for name, row in {**rows, "pixels": pixels}.items():
            self.register_buffer(f"no_{name}", row, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """The mean square error of the prediction, epsilon or v as the base's scheduler says.

        paired_stories.py has what is added. Of a batch with references instead how far the layers are from the teacher's.
        """
        if batch.patches is not None:
            alphas = self.scheduler.alphas_cumprod.to(batch.noise)[batch.timesteps]
            batch = replace(batch, noise=patched_noise(batch.noise, batch.patches, alphas))
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        if batch.references is not None:
            return self.imitate(noisy, batch, batch.references)
        wanted = batch.noise
        if self.prediction == "v_prediction":
            wanted = self.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        weight: float | Tensor = 1.0
        if batch.preserved is not None:
            assert self.untuned is not None
            wanted = self.preserve(noisy, batch, wanted, batch.preserved)
            weight = torch.where(batch.preserved, self.untuned.weight, 1.0).view(-1, 1, 1, 1)
        errors = self.predict(noisy, batch).float() - wanted.float()
        loss = (weight * errors.square()).mean()
        if batch.pairs is not None:
            loss = loss + self.contrast * contrast(errors, wanted.float(), batch.pairs)
        if batch.patches is not None:
            loss = loss + self.contrast * patch_loss(
                self.picture_errors(errors, batch.timesteps), batch.patches
            )
        return loss

    def preserve(self, noisy: Tensor, batch: Batch, wanted: Tensor, rows: Tensor) -> Tensor:
        """`wanted` (R, c, h, w) with the base's prediction in these rows (R,)."""
        assert self.untuned is not None
        predicted = self.untuned.predict(noisy[rows], batch.timesteps[rows], self.captions(batch)[rows])
        return wanted.masked_scatter(rows.view(-1, 1, 1, 1), predicted.to(wanted))

    def picture_errors(self, errors: Tensor, timesteps: Tensor) -> Tensor:
        """Errors of a prediction (R, c, h, w) as errors of the latents that it amounts to."""
        alphas = self.scheduler.alphas_cumprod.to(errors)[timesteps].view(-1, 1, 1, 1)
        noise = (1 - alphas).sqrt()
        return -errors * (noise if self.prediction == "v_prediction" else noise / alphas.sqrt())

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


def visible_references(batch: Batch) -> Tensor:
    """(R, B * (N - 1) + 1) bool: a row sees the frames of its window; dropped, the null reference in their place."""
    stories, before = batch.mask.shape[:2]
    frame, index = torch.arange(before, device=batch.index.device), batch.index[:, None]
    within = (frame < index) & (frame >= index - (batch.window or before))
    own = batch.story[:, None, None] == torch.arange(stories, device=frame.device)[None, :, None]
    kept = (own & within[:, None] & ~batch.dropped[:, None, None]).flatten(1)
    return torch.cat([kept, (batch.dropped & (batch.index > 0))[:, None]], 1)


def prepare(
    model: StoryModel,
    sizes: HistorySizes,
    rank: int | None,
    longest: int,
    seed: int,
    self_attention: bool = False,
    freeze_encoder: bool = False,
) -> set[str]:
    """Give `model` the history encoder and the low-rank updates that will be trained, and freeze all else.

    longest: frames of the longest window. Returns the encoder's weights that the base brings: an adapter need not have
    them. Raises InputError where sizes, rank and what the model brings do not fit.
    """
    model.family.require_causal(model.name)
    history, tensors = start(model, sizes)
    if freeze_encoder and history is None:
        raise InputError(
            "--freeze-encoder: the history encoder would be new and stay as it is; wanted --adapter, or a base that has one"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = history.encoder if history else None
        grown = new_encoder(model, sizes, longest) if encoder is None else extended(encoder, sizes)
        of_base = brought(history, tensors)
        teach(grown, whole=not of_base and not freeze_encoder, within=not freeze_encoder)
        rank = rank_of(tensors, rank)
        model.unet.requires_grad_(False)
        if rank:
            add_updates(model.unet, rank, tensors, self_attention)
    tokenizer = history.tokenizer if history else model.pipeline.tokenizer
    attached = History(grown.to(model.device), tokenizer, image_processor(grown.config), {}, ())
    model.checkpoint = replace(model.checkpoint, history=attached)
    return of_base


def start(model: StoryModel, sizes: HistorySizes) -> tuple[History | None, dict[str, Tensor]]:
    """The history to begin with, None for a new one, and the tensors of the adapter it was opened with, if any."""
    history = model.checkpoint.history
    tensors: dict[str, Tensor] = {}
    for source in history.sources if history else ():
        tensors |= {k: v for k, v in load_file(source).items() if k.startswith(("history.", "unet."))}
    if not sizes.size:
        return history, tensors
    if brought(history, tensors):
        raise InputError(
            f"--history-size: {model.name} has a history encoder of its own, which an adapter cannot replace"
        )
    return None, {}


def brought(history: History | None, tensors: Mapping[str, Tensor]) -> set[str]:
    """Weights of the encoder that the base itself has and the adapter does not."""
    own = set(history.encoder.state_dict()) if history else set()
    return own - {name.removeprefix("history.") for name in tensors}


def new_encoder(model: StoryModel, sizes: HistorySizes, longest: int) -> HistoryEncoder:
    """A history encoder of the base's text width, with the base's own tokenizer.

    Its type and time embeddings begin near zero, so that the frozen UNet meets its captions as it knows them.
    """
    tokenizer = model.pipeline.tokenizer
    width = model.cross_attention_dim
    config = sizes.new(width, len(tokenizer), int(tokenizer.model_max_length), longest)
    encoder = HistoryEncoder(config)
    nn.init.zeros_(encoder.type_embeddings.weight)
    nn.init.normal_(encoder.time_embeddings.weight, std=0.02)
    return encoder.eval()


def extended(encoder: HistoryEncoder, sizes: HistorySizes) -> HistoryEncoder:
    """The given encoder, or one with its weights and the parts that it lacks."""
    config = sizes.over(encoder.config)
    if config == encoder.config:
        return encoder
    grown = HistoryEncoder(config)
    grown.load_state_dict(encoder.state_dict(), strict=False)
    return grown.eval()


def teach(encoder: HistoryEncoder, whole: bool, within: bool = True) -> None:
    """Mark what learns: all of a new encoder or an adapter's own (`whole`); of the base's, what LEARNS names.

    within: what LEARNS_WITHIN names as well.
    """
    for name, parameter in encoder.named_parameters():
        part = name.startswith(LEARNS) or (within and any(inner in name for inner in LEARNS_WITHIN))
        parameter.requires_grad_(part or whole)


def rank_of(tensors: Mapping[str, Tensor], rank: int | None) -> int:
    """The rank of the updates. Raises InputError where it is not that of the adapter the tuning starts from."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A")}
    if not ranks:
        return RANK if rank is None else rank
    if len(ranks) > 1 or rank not in (None, *ranks):
        had = ", ".join(map(str, sorted(ranks)))
        raise InputError(f"--rank: the adapter to start from has low-rank updates of rank {had}, got {rank}")
    return ranks.pop()


def add_updates(unet: Any, rank: int, tensors: Mapping[str, Tensor], self_attention: bool = False) -> None:
    """Low-rank updates (peft) of every cross-attention's four matrices, beginning with the given ones, else at zero.

    self_attention: of the self-attentions' as well; always where the given ones have some.
    """
    # alpha = rank: peft's scaling is 1, and B A is what is added to the weight.
    both = self_attention or any(".attn1." in name for name in tensors)
    pattern = r"\.(to_q|to_k|to_v|to_out\.0)"
    layers = r".*\.attn[12]" if both else r".*\.attn2"
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers + pattern))
    updates = {n.removeprefix("unet."): tensor for n, tensor in tensors.items() if n.startswith("unet.")}
    set_peft_model_state_dict(unet, {f"{name}.weight": tensor for name, tensor in updates.items()})


def adapter_file(
    module: TrainingModule, of_base: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file that --adapter opens (fastory/checkpoints/history.py).

    What learned, and of the encoder also what did not but is not in `of_base`, the base's own.
    A second key of metadata would stand before or behind the first by chance, and equal weights must be equal bytes.
    """
    tensors = {
        f"history.{name}": parameter
        for name, parameter in module.encoder.named_parameters()
        if parameter.requires_grad or name not in of_base
    }
    if hasattr(module.unet, "peft_config"):  # rank 0 has no updates
        updates = get_peft_model_state_dict(module.unet, save_embedding_layers=False)
        tensors |= {f"unet.{name.removesuffix('.weight')}": tensor for name, tensor in updates.items()}
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return copies, {"history": json.dumps(module.encoder.config.as_dict())}
