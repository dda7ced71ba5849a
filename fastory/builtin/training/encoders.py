"""The clip stage: what captions and reference pictures become before the UNet reads them.

Both encoders learn by naming what is there. The text encoder's last state must tell who stands where, doing what; the
image encoder's embedding must tell the free attributes of every species in the picture. A contrastive loss was not
used: nothing compares the two, and it left two-character pictures unlearned in the prototype.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from fastory.builtin.training.autoencoder import to_tensor
from fastory.builtin.training.loop import Batch, Objective
from fastory.builtin.training.networks import (
    PATCH_SIZE,
    REFERENCE_SIZE,
    WIDTH,
    Network,
    build_image_encoder,
    build_text_encoder,
)
from fastory.builtin.training.tokenizer import build_tokenizer
from fastory.builtin.world.captions import TOKEN_LIMIT, caption, sample_names
from fastory.builtin.world.corpus import sample_tale
from fastory.builtin.world.drawing import (
    ACTIONS,
    COLOURS,
    HATS,
    PLACES,
    SCARVES,
    SPECIES,
    Character,
    Scene,
    Tale,
    draw,
)
from fastory.builtin.world.looks import ATTRIBUTES, Said, sample_said

MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
RESTORED = 20  # one picture of so many goes through the autoencoder; each costs as much as ten others
ABSENT = -100  # what cross_entropy ignores
FREE = {"colour": COLOURS, "hat": HATS, "scarf": SCARVES}
SAID_SHARE = 0.5  # of training captions that say something of a look
KEPT_WEIGHT = 20.0  # of the distance to the states that a UNet has learned to read


def build_feature_extractor() -> CLIPImageProcessorPil:
    """The image processor of the folder: bicubic to 96 x 96, CLIP's normalisation."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": REFERENCE_SIZE},
        crop_size={"height": REFERENCE_SIZE, "width": REFERENCE_SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def pixel_values(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) as the feature extractor would give them, (B, 3, 96, 96)."""
    size = (REFERENCE_SIZE, REFERENCE_SIZE)
    resized = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def pixels_of(decoded: Tensor) -> Tensor:
    """What an autoencoder decoded, (B, 3, 128, 128) in -1..1, as pixel_values would give its picture, on its device."""
    size = (REFERENCE_SIZE, REFERENCE_SIZE)
    small = F.interpolate(decoded.float().clamp(-1, 1), size=size, mode="bicubic", antialias=True)
    small = (small / 2 + 0.5).clamp(0, 1)  # bicubic overshoots; 8-bit pictures cannot
    mean, std = (torch.tensor(values, device=decoded.device).view(3, 1, 1) for values in (MEAN, STD))
    return (small - mean) / std


@dataclass(frozen=True)
class Labels:
    """What a frame shows, as indices. The columns of a slot are species, action, colour, hat, scarf."""

    place: int
    slots: np.ndarray  # (2, 5), left and right; ABSENT in the second row of a frame with one character
    free: np.ndarray  # (6 species, 3), colour, hat, scarf; ABSENT where the species is not in the frame


def label(tale: Tale, scene: Scene) -> Labels:
    """The labels of a scene."""
    slots, free = np.full((2, 5), ABSENT), np.full((len(SPECIES), 3), ABSENT)
    for slot, role in enumerate(scene.roles):
        who = tale.cast[role.member]
        attributes = [options.index(getattr(who, key)) for key, options in FREE.items()]
        slots[slot] = [SPECIES.index(who.species), ACTIONS.index(role.action), *attributes]
        free[SPECIES.index(who.species)] = attributes
    return Labels(PLACES.index(scene.place), slots, free)


def said_labels(tale: Tale, scene: Scene, said: tuple[Said, ...]) -> np.ndarray:
    """(2, 3), left and right: colour, hat and scarf as a caption says them; one past the last value for unsaid."""
    found = np.array([[len(FREE[name]) for name in ATTRIBUTES]] * 2)
    for slot, role in enumerate(scene.roles):
        for column, name in enumerate(ATTRIBUTES):
            if name in said[role.member]:
                found[slot, column] = FREE[name].index(getattr(tale.cast[role.member], name))
    return found


class _SpeciesHeads(nn.Module):
    """Presence and free attributes of each species, linear in the embedding: averages of embeddings stay readable."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [1, *(len(options) for options in FREE.values())]
        self.linear = nn.Linear(WIDTH, len(SPECIES) * sum(self.sizes))

    def forward(self, embeddings: Tensor) -> list[Tensor]:
        return list(self.linear(embeddings).view(len(embeddings), len(SPECIES), -1).split(self.sizes, -1))

    def loss(self, embeddings: Tensor, free: Tensor) -> Tensor:
        present, *attributes = self(embeddings)
        target = (free[..., 0] != ABSENT).float()
        loss = 3 * F.binary_cross_entropy_with_logits(present.squeeze(-1).float(), target)
        for logits, wanted in zip(attributes, free.unbind(-1), strict=True):
            loss = loss + F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=ABSENT)
        return loss


class _SlotHeads(nn.Module):
    """Attributes of the character in one half of the picture or of the caption."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        self.linear = nn.Linear(WIDTH, sum(sizes))

    def loss(self, states: Tensor, wanted: Tensor) -> Tensor:
        parts = self.linear(states).float().split(self.sizes, -1)
        pairs = zip(parts, wanted.unbind(-1), strict=True)
        return torch.stack(
            [F.cross_entropy(p.flatten(0, -2), w.flatten(), ignore_index=ABSENT) for p, w in pairs]
        ).sum()


class ClipObjective(Objective):
    """Text and image encoder, each with linear heads that are thrown away."""

    name = "clip"
    learning_rate = 1e-3
    ema_decay = 0.998

    def __init__(
        self,
        vae: Network | None = None,
        text_encoder: Network | None = None,
        pictures: int = 40,
        tokenizer: CLIPTokenizer | None = None,
        new_words: bool = False,
    ) -> None:
        """text_encoder, tokenizer: kept as they are, because a UNet has learned to read them.

        new_words: the tokenizer has words that the text encoder has yet to learn. Then the image encoder is kept, and the
        states of captions without new words are held to what they were.
        """
        super().__init__()
        self.tokenizer: CLIPTokenizer = tokenizer or build_tokenizer()
        self.text_encoder = text_encoder or build_text_encoder(len(self.tokenizer), TOKEN_LIMIT)
        self.text_is_kept = text_encoder is not None and not new_words
        self.image_is_kept = new_words
        self.text_encoder.requires_grad_(not self.text_is_kept)
        self.image_encoder = build_image_encoder()
        self.species_heads = _SpeciesHeads()
        self.half_heads = _SlotHeads((len(SPECIES), len(ACTIONS), len(COLOURS), len(HATS), len(SCARVES)))
        looks = tuple(len(FREE[name]) + 1 for name in ATTRIBUTES)  # one more for unsaid
        self.left_heads = _SlotHeads((len(SPECIES), len(ACTIONS), len(PLACES), *looks))
        self.right_heads = _SlotHeads((len(SPECIES) + 1, len(ACTIONS), *looks))
        for head in (self.left_heads, self.right_heads):
            head.requires_grad_(not self.text_is_kept)
        for network in (self.image_encoder, self.species_heads, self.half_heads):
            network.requires_grad_(not self.image_is_kept)
        # A list, as below: what the text encoder was before it learned new words.
        self._before = [copy.deepcopy(self.text_encoder).eval().requires_grad_(False)] if new_words else []
        self.pictures = pictures
        # A list hides the frozen autoencoder from parameters(): it only spoils pictures as drawing would.
        self._vae = [] if vae is None else [vae.eval().requires_grad_(False)]

    def batch(
        self,
        rng: np.random.Generator,
        progress: float,
        paint: Callable[[tuple[Character, ...], Scene, np.random.Generator], Image.Image] = draw,
    ) -> Batch:
        """Pictures, their captions and labels. Nearly half show two characters: telling them apart is learned last.

        paint: what draws a scene.
        """
        pictures: list[np.ndarray] = []
        texts: list[str] = []
        labels: list[Labels] = []
        looks: list[np.ndarray] = []
        while len(texts) < self.pictures:
            tale = sample_tale(rng, 4, 1 + int(rng.random() < 0.9), looks="trained")
            names = sample_names(rng, len(tale.cast))
            for scene in tale.scenes:
                said = sample_said(rng, len(tale.cast), SAID_SHARE, any(names))
                texts.append(caption(rng, tale.cast, scene, names, said))
                labels.append(label(tale, scene))
                looks.append(said_labels(tale, scene, said))
                if not self.image_is_kept:
                    pictures.append(np.asarray(paint(tale.cast, scene, rng)))
        seen = {} if self.image_is_kept else self._seen(np.stack(pictures))
        return {
            **seen,
            "ids": self._ids(texts),
            "said": torch.from_numpy(np.stack(looks)),
            "place": torch.tensor([shown.place for shown in labels]),
            "slots": torch.from_numpy(np.stack([shown.slots for shown in labels])),
            "free": torch.from_numpy(np.stack([shown.free for shown in labels])),
        }

    def _seen(self, pictures: np.ndarray) -> Batch:
        return {
            "pixels": pixel_values(pictures),
            "pictures": to_tensor(pictures[: self.pictures // RESTORED]),
        }

    def _ids(self, texts: list[str]) -> Tensor:
        return self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=TOKEN_LIMIT, return_tensors="pt"
        )["input_ids"]

    def as_generated(self, batch: Batch) -> Tensor:
        """The pixels, some of them through the autoencoder, as every picture will be that is a reference."""
        pixels, pictures = batch["pixels"], batch["pictures"]
        if not self._vae:
            return pixels
        vae = self._vae[0].to(pictures.device)
        with torch.no_grad():
            restored = pixels_of(vae(pictures).sample)
        return torch.cat([restored, pixels[len(pictures) :]])

    @staticmethod
    def spoiled(pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) with another brightness of their channels and noise: drawn pictures are not perfect."""
        pixels = pixels * (0.9 + 0.2 * torch.rand(len(pixels), 3, 1, 1, device=pixels.device))
        strength = 0.15 * torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
        return pixels + strength * torch.randn_like(pixels)

    def forward(self, batch: Batch) -> Tensor:
        parts = [] if self.image_is_kept else [self._image_loss(batch)]
        return torch.stack(parts if self.text_is_kept else [*parts, self._text_loss(batch)]).sum()

    def _image_loss(self, batch: Batch) -> Tensor:
        pixels = self.spoiled(self.as_generated(batch))
        out = self.image_encoder(pixels, output_hidden_states=True)
        loss = self.species_heads.loss(out.image_embeds, batch["free"])
        # After two layers each half of the picture must know its character: without it, binding takes ten times
        # longer to appear. One character stands in both halves.
        side = REFERENCE_SIZE // PATCH_SIZE
        patches = out.hidden_states[2][:, 1:].unflatten(1, (side, side))
        halves = torch.stack(
            [patches[:, :, : side // 2].mean((1, 2)), patches[:, :, side // 2 :].mean((1, 2))], 1
        )
        slots = batch["slots"]
        right = torch.where(slots[:, 1:] == ABSENT, slots[:, :1], slots[:, 1:])
        return loss + 0.5 * self.half_heads.loss(halves, torch.cat([slots[:, :1], right], 1))

    def _text_loss(self, batch: Batch) -> Tensor:
        states = self.text_encoder(batch["ids"]).last_hidden_state
        loss = self._kept_loss(batch, states) if self._before else 0
        last = states[:, -1]  # padding repeats the end token
        left, right = self._wanted(batch)
        return loss + self.left_heads.loss(last, left) + self.right_heads.loss(last, right)

    @staticmethod
    def _wanted(batch: Batch) -> tuple[Tensor, Tensor]:
        """What the heads must name: species, action, place and said looks on the left; without place on the right."""
        left, right, said = batch["slots"][:, 0, :2], batch["slots"][:, 1, :2].clone(), batch["said"]
        right[:, 0] = torch.where(right[:, 0] == ABSENT, len(SPECIES), right[:, 0])
        return torch.cat([left, batch["place"][:, None], said[:, 0]], 1), torch.cat([right, said[:, 1]], 1)

    def _kept_loss(self, batch: Batch, states: Tensor) -> Tensor:
        """The distance of captions that say nothing of looks to what their states were."""
        unsaid = torch.tensor([len(FREE[name]) for name in ATTRIBUTES], device=states.device)
        rows = (batch["said"] == unsaid).flatten(1).all(1)
        with torch.no_grad():
            before = self._before[0].to(states.device)(batch["ids"][rows]).last_hidden_state
        return KEPT_WEIGHT * F.mse_loss(states[rows], before) if rows.any() else states.sum() * 0

    @torch.no_grad()
    def accuracies(self, rng: np.random.Generator) -> dict[str, float]:
        """Shares of free attributes read from embeddings (one, two characters) and of captions fully understood."""
        batch = {k: v.to(next(self.parameters()).device) for k, v in self.batch(rng, 1.0).items()}
        found: dict[str, float] = {}
        if not self.image_is_kept:
            _, *attributes = self.species_heads(self.image_encoder(batch["pixels"]).image_embeds)
            two = ((batch["free"][..., 0] != ABSENT).sum(1) == 2)[:, None].expand(-1, len(SPECIES))
            for key, logits, wanted in zip(FREE, attributes, batch["free"].unbind(-1), strict=True):
                right = logits.argmax(-1) == wanted
                for count, rows in ((1, ~two), (2, two)):
                    found[f"{key} {count}"] = right[rows & (wanted != ABSENT)].float().mean().item()
        states = self.text_encoder(batch["ids"]).last_hidden_state
        found["captions"] = self._understood(states[:, -1], batch).float().mean().item()
        if self._before:
            found["moved"] = self._kept_loss(batch, states).item() / KEPT_WEIGHT
        return {key: round(value, 5) for key, value in found.items()}

    def _understood(self, states: Tensor, batch: Batch) -> Tensor:
        """Of each caption whether everything is named right; of an absent right one only that it is absent."""
        good = torch.ones(len(states), dtype=torch.bool, device=states.device)
        for heads, wanted in zip((self.left_heads, self.right_heads), self._wanted(batch), strict=True):
            parts = heads.linear(states).split(heads.sizes, -1)
            for part, answer in zip(parts, wanted.unbind(1), strict=True):
                good &= (part.argmax(-1) == answer) | (answer == ABSENT)
        return good

    def sample(self, folder: Path) -> None:
        """No pictures in this stage: prints accuracies."""
        print(f"clip: {self.accuracies(np.random.default_rng(5))}", flush=True)

    def finish(self, folder: Path) -> None:
        """Write tokenizer, text encoder, image encoder and feature extractor."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.image_encoder.save_pretrained(folder / "image_encoder")
        build_feature_extractor().save_pretrained(folder / "feature_extractor")
