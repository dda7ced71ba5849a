"""The history stage: an encoder of (caption, picture) that names what it saw, where `fastory tune` then starts.

Trained on the noise loss alone, an encoder takes far longer to tell two characters of a picture apart than the rest of a
tuning takes together. So it learns that first, as the clip stage does: every token of a caption must name the species
and the free attributes of the character whose word is next to it. At every token, since nobody knows beforehand which
tokens a layer will attend to. The vision part begins as the image encoder that the model already has.

A history is made of pictures that the model drew, and where a caption leaves a colour open, it draws bodies of two. So
half of the pictures here are patchy, and what is named is the larger part.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from fastory.builtin.training.encoders import ABSENT, FREE, ClipObjective
from fastory.builtin.training.loop import Batch, Objective
from fastory.builtin.training.networks import PATCH_SIZE, REFERENCE_SIZE, WIDTH, Network
from fastory.builtin.training.patches import patchy
from fastory.builtin.words import SPECIES_WORDS
from fastory.builtin.world.captions import TOKEN_LIMIT
from fastory.builtin.world.drawing import SPECIES
from fastory.checkpoints.history_encoder import HistoryConfig, HistoryEncoder

POSITIONS = 39  # a story of 40 frames with the whole of its past
START = "history-start.safetensors"


def build_history_encoder(vocabulary_size: int) -> HistoryEncoder:
    """The built-in model's: vision of the image encoder's sizes, three text layers, all tokens of a caption."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": REFERENCE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_act": "quick_gelu",
    }
    text = {
        "vocab_size": vocabulary_size,
        "hidden_size": WIDTH,
        "encoder_hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKEN_LIMIT,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")),
    }
    encoder = HistoryEncoder(HistoryConfig(vision, text, TOKEN_LIMIT, POSITIONS, 4, WIDTH // 2))
    # Near nothing: the UNet meets its captions as it knows them.
    nn.init.zeros_(encoder.type_embeddings.weight)
    nn.init.normal_(encoder.time_embeddings.weight, std=0.02)
    return encoder


@torch.no_grad()
def see_as(vision: Network, image_encoder: Network, pixels: Tensor) -> None:
    """Give a BlipVisionModel the weights of a CLIP vision model of its sizes.

    Blip has no normalisation before its first layer; CLIP's goes into the embeddings with the mean deviation that
    `pixels` (B, 3, h, w) show, which later steps repair.
    """
    clip = image_encoder.vision_model
    before = clip.pre_layrnorm
    deviation = clip.embeddings(pixels).std(-1).mean()

    def normed(weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """Over the last dimension, the channels."""
        return before.weight * (weight - weight.mean(-1, keepdim=True)) / deviation + bias

    own = vision.embeddings
    own.class_embedding.copy_(normed(clip.embeddings.class_embedding).view(1, 1, -1))
    own.position_embedding.copy_(normed(clip.embeddings.position_embedding.weight, before.bias)[None])
    patches = clip.embeddings.patch_embedding.weight
    own.patch_embedding.weight.copy_(normed(patches.movedim(0, -1)).movedim(-1, 0))
    own.patch_embedding.bias.zero_()
    for layer, source in zip(vision.encoder.layers, clip.encoder.layers, strict=True):
        attention = source.self_attn
        three = attention.q_proj, attention.k_proj, attention.v_proj
        layer.self_attn.qkv.weight.copy_(torch.cat([own.weight for own in three]))
        layer.self_attn.qkv.bias.copy_(torch.cat([own.bias for own in three]))
        layer.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
        layer.layer_norm1.load_state_dict(source.layer_norm1.state_dict())
        layer.layer_norm2.load_state_dict(source.layer_norm2.state_dict())
        layer.mlp.load_state_dict(source.mlp.state_dict())


class HistoryObjective(Objective):
    """The history encoder with one linear head for all tokens, which is thrown away."""

    name = "history"
    learning_rate = 1e-3
    ema_decay = 0.998

    def __init__(
        self,
        vae: Network,
        text_encoder: Network,
        image_encoder: Network,
        tokenizer: CLIPTokenizer,
        pictures: int = 40,
    ) -> None:
        """Pictures, captions and labels come as in the clip stage."""
        super().__init__()
        self._clip = [
            ClipObjective(vae, text_encoder, pictures, tokenizer)
        ]  # a list hides it from parameters()
        self.tokenizer = tokenizer
        self.encoder = build_history_encoder(len(tokenizer))
        pixels = self._clip[0].batch(np.random.default_rng(0), 0.0)["pixels"]
        see_as(self.encoder.vision, image_encoder, pixels)
        self.sizes = [len(SPECIES), *(len(options) for options in FREE.values())]
        self.words = nn.Linear(WIDTH, sum(self.sizes))
        # The species that each token of the vocabulary is a word for.
        self.species = torch.full((len(tokenizer),), ABSENT)
        for number, species in enumerate(SPECIES):
            for word in SPECIES_WORDS[species]:
                (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
                self.species[token] = number
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(name.startswith(("vision.", "text.")))

    def batch(self, rng: np.random.Generator, progress: float) -> Batch:
        """Pictures, their captions and the free attributes of every species in them."""
        batch = self._clip[0].batch(rng, progress, patchy)
        return {name: batch[name] for name in ("pixels", "pictures", "ids", "free")}

    def named(self, batch: Batch, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of every token of the captions and what they should name: species, colour, hat, scarf."""
        ids = batch["ids"]
        ended = ids == self.tokenizer.eos_token_id
        mask = (ended.cumsum(1) - ended.long() == 0).long()  # the first end token is part of the caption
        tokens = self.encoder.multimodal(ids, mask, pixels)
        species = self.next_species(ids)
        rows, places = torch.where(mask == 1)
        which = species[rows, places]
        logits = self.words(tokens[rows, places]).float().split(self.sizes, -1)
        return list(logits), [which, *batch["free"][rows, which].unbind(-1)]

    def next_species(self, ids: Tensor) -> Tensor:
        """The species whose word is nearest to each token of ids (B, S), the earlier of two as near."""
        species = self.species.to(ids.device)[ids]
        at = torch.arange(ids.shape[1], device=ids.device)
        distance = (at[:, None] - at).abs().expand(len(ids), -1, -1)
        nearest = distance.masked_fill((species == ABSENT)[:, None], 2 * ids.shape[1]).argmin(-1)
        return species.gather(1, nearest)

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the cross entropies."""
        clip = self._clip[0]
        pairs = zip(*self.named(batch, clip.spoiled(clip.as_generated(batch))), strict=True)
        return torch.stack([F.cross_entropy(logits, wanted) for logits, wanted in pairs]).sum()

    @torch.no_grad()
    def sample(self, folder: Path) -> None:
        """No pictures in this stage: prints accuracies."""
        device = next(self.parameters()).device
        batch = {k: v.to(device) for k, v in self.batch(np.random.default_rng(5), 1.0).items()}
        found = zip(("species", *FREE), *self.named(batch, batch["pixels"]), strict=True)
        right = {
            key: round((logits.argmax(-1) == wanted).float().mean().item(), 3)
            for key, logits, wanted in found
        }
        print(f"history: {right}", flush=True)

    def finish(self, folder: Path) -> None:
        """Write an adapter for `fastory tune --adapter`, without updates of the UNet."""
        tensors = {f"history.{k}": v.cpu().contiguous() for k, v in self.encoder.state_dict().items()}
        save_file(tensors, folder / START, {"history": json.dumps(self.encoder.config.as_dict())})
