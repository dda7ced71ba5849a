"""The unet stage: a text-conditioned denoiser, and the drawn stories that it and the adapter stage see."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from fastory.builtin.training.autoencoder import to_pictures, to_tensor
from fastory.builtin.training.characters import parts_of
from fastory.builtin.training.encoders import SAID_SHARE, pixel_values, pixels_of
from fastory.builtin.training.loop import Batch, Objective, stream
from fastory.builtin.training.networks import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    SMALL,
    WIDTH,
    Network,
    Sizes,
    build_scheduler,
    build_unet,
)
from fastory.builtin.training.patches import patch
from fastory.builtin.world.captions import TOKEN_LIMIT, caption, sample_names
from fastory.builtin.world.corpus import sample_training_tale
from fastory.builtin.world.drawing import draw_with_boxes
from fastory.builtin.world.looks import NOTHING, Said, sample_said

FRAMES = 8  # of a training story
PURE_NOISE = 0.05  # of the frames: at the last timestep, where every run begins
PATCHED_REFERENCES = 0.35  # of the pictures: those that a run draws are patchy until references agree


class Corpus(Dataset):
    """Latents and reference embeddings of drawn stories, encoded once, in memory-mapped files.

    latents (stories, 8, 8, 16, 16) float16, scaled; embeddings (stories, 8, 128) float16, of the pictures as drawn, some
    with patches, or, for every third story, as they come back from the autoencoder; own (stories, 8, 2, 128), of what a run
    cuts out of them. The files' names carry the marks of the networks that made them: a retrained autoencoder finds no stale
    latents.
    """

    def __init__(self, folder: Path, seed: int, stories: int, workers: int = 0) -> None:
        self.folder, self.seed, self.stories, self.workers = folder, seed, stories, workers
        self.patched = 0.0  # the share of pictures with patches: none while latents are encoded
        self.tales = [sample_training_tale(stream("tale", seed, 0, i), FRAMES) for i in range(stories)]

    def open(self, name: str, shape: tuple[int, ...], mark: str) -> np.ndarray:
        """A table (stories, 8, *shape) of float16, zeros where it is new. One process makes it before others open it."""
        path = self.folder / f"{name}-{self.seed}-{self.stories}-{mark}.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(path, "w+", np.float16, (self.stories, FRAMES, *shape)).flush()
        return np.load(path, mmap_mode="r+")

    def open_tables(self, latents_mark: str, embeddings_mark: str | None = None) -> None:
        """Open or make the latents and, where there is an image encoder, the embeddings."""
        self.latents = self.open("latents", (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE), latents_mark)
        if embeddings_mark is not None:
            mark = f"{latents_mark}-{embeddings_mark}"
            self.embeddings = self.open("embeddings", (WIDTH,), mark)
            self.own, self.boxes = self.open("own", (2, WIDTH), mark), self.open("boxes", (2, 4), mark)

    def __len__(self) -> int:
        return self.stories

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor, Tensor]:
        """A story's number, its drawn frames (8, 3, 128, 128), their pixels for the image encoder (8, 3, 96, 96), its boxes."""
        rng, tale = stream("draw", self.seed, 0, index), self.tales[index]
        patches = stream("patches", self.seed, 0, index)
        drawn, boxes = [], torch.zeros(FRAMES, 2, 4)
        for number, scene in enumerate(tale.scenes):
            before = copy.deepcopy(rng)
            picture, found = draw_with_boxes(tale.cast, scene, rng)
            if patches.random() < self.patched:
                picture = patch(picture, tale.cast, scene, before, patches)
            drawn.append(np.asarray(picture))
            boxes[number, : len(found)] = torch.tensor(found)
        pictures = np.stack(drawn)
        return index, to_tensor(pictures), pixel_values(pictures), boxes

    def _missing(
        self, table: np.ndarray, part: int, parts: int
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor, Tensor]]:
        """The stories of this part without an entry, eight at a time: numbers, frames, pixels, boxes; frames flattened."""
        todo = [index for index in range(part, self.stories, parts) if not np.any(table[index])]
        loader: DataLoader = DataLoader(self, 8, sampler=todo, num_workers=self.workers)
        for number, (indices, pictures, pixels, boxes) in enumerate(loader):
            if part == 0 and number % 25 == 0:
                print(f"corpus: story {8 * number} of {len(todo)}", flush=True)
            yield indices.numpy(), pictures.flatten(0, 1), pixels.flatten(0, 1), boxes

    @torch.no_grad()
    def encode_latents(self, vae: Network, part: int, parts: int, device: str) -> None:
        """Encode every parts-th story from `part` on that has no latents yet."""
        vae.to(device)
        for indices, pictures, _, _ in self._missing(self.latents, part, parts):
            latents = vae.encode(pictures.to(device)).latent_dist.mean * vae.config.scaling_factor
            self.latents[indices] = latents.unflatten(0, (-1, FRAMES)).cpu().numpy()

    @torch.no_grad()
    def embed_references(
        self, vae: Network, image_encoder: Network, part: int, parts: int, device: str
    ) -> None:
        """Embed every parts-th story from `part` on that has no embeddings yet; needs the latents."""
        vae.to(device), image_encoder.to(device)
        self.patched = PATCHED_REFERENCES
        for indices, pictures, pixels, boxes in self._missing(self.own, part, parts):
            pixels = pixels.to(device).unflatten(0, (-1, FRAMES))
            pictures = pictures.unflatten(0, (-1, FRAMES))
            for row in np.flatnonzero(indices % 3 == 0):
                latents = torch.from_numpy(self.latents[indices[row]]).float().to(device)
                pictures[row] = vae.decode(latents / vae.config.scaling_factor).sample.cpu()
                pixels[row] = pixels_of(pictures[row].to(device))
            embeddings = image_encoder(pixels.flatten(0, 1)).image_embeds.unflatten(0, (-1, FRAMES))
            self.embeddings[indices], self.boxes[indices] = embeddings.cpu().numpy(), boxes.numpy()
            for story in zip(indices.tolist(), pictures, embeddings, strict=True):
                self._embed_own(*story, image_encoder, device)

    def _embed_own(
        self, index: int, pictures: Tensor, embeddings: Tensor, image_encoder: Network, device: str
    ) -> None:
        """The embeddings of each character of a story's frames."""
        rng, parts, places = stream("parts", self.seed, 0, index), [], []
        own = embeddings[:, None].repeat(1, 2, 1)
        for frame, scene in enumerate(self.tales[index].scenes):
            if len(scene.roles) == 2:
                boxes = [tuple(box) for box in self.boxes[index, frame].astype(float)]
                parts += parts_of(rng, to_pictures(pictures[frame : frame + 1])[0], boxes)
                places += [(frame, 0), (frame, 1)]
            else:
                own[frame, 1] = 0
        if parts:
            found = image_encoder(pixel_values(np.stack(parts)).to(device)).image_embeds
            own[tuple(zip(*places, strict=True))] = found
        self.own[index] = own.cpu().numpy()


class _GroupNorm(nn.GroupNorm):
    """Of float32 values, in bfloat16 out where that came in."""

    def forward(self, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            return super().forward(values.float()).to(values.dtype)


class Drawn(NamedTuple):
    """The frames of a batch: the story and the number of each, the draw from [0, 1) by which its conditions are dropped, and
    what its caption says of each of its story's cast.
    """

    stories: np.ndarray
    frames: np.ndarray
    dropped: np.ndarray
    looks: Sequence[tuple[Said, ...]]


class UnetObjective(Objective):
    """v prediction from captions alone; a tenth of the captions is empty, for guidance."""

    name = "unet"
    learning_rate = 1e-3
    ema_decay = 0.998
    high_noise = 0.3

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: CLIPTokenizer,
        text_encoder: Network,
        vae: Network,
        sizes: Sizes = SMALL,
        frames: int = 32,
    ) -> None:
        super().__init__()
        self.unet = build_unet(sizes).to(memory_format=torch.channels_last)
        self.scheduler = build_scheduler()
        self.corpus, self.tokenizer, self.frames = corpus, tokenizer, frames
        self.text_encoder = text_encoder.eval()  # eval: it has no dropout; it learns with the UNet
        self._frozen = [vae.eval().requires_grad_(False)]

    def hasten(self) -> None:
        """Make products in bfloat16 pay on a CPU: a step of the UNet takes 0.6 of what it takes in float32.

        What PyTorch has in bfloat16 there is slow in two places: attention's fused backward pass and group norms. Compiled, a
        step is half of that again, but its gradients are no longer those of float32 (cosine 0.94 at the first convolution,
        0.9999 without), so it is not.
        """
        for module in self.unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.__class__ = _GroupNorm
            if isinstance(module, Attention) and not module.is_cross_attention:
                module.set_processor(AttnProcessor())

    def batch(self, rng: np.random.Generator, progress: float) -> Batch:
        """Frames of different stories with captions of their own making."""
        stories = rng.integers(self.corpus.stories, size=self.frames)
        frames = rng.integers(FRAMES, size=self.frames)
        dropped = rng.random(self.frames)
        texts: list[str] = []
        looks: list[tuple[Said, ...]] = []
        for story, frame, drop in zip(stories, frames, dropped, strict=True):
            tale = self.corpus.tales[story]
            names = sample_names(rng, len(tale.cast))
            said = sample_said(rng, len(tale.cast), SAID_SHARE, any(names))
            text = caption(rng, tale.cast, tale.scenes[frame], names, said)
            texts.append("" if drop < 0.1 else text)
            looks.append((NOTHING,) * len(tale.cast) if drop < 0.1 else said)
        latents = np.stack([self.corpus.latents[s, f] for s, f in zip(stories, frames, strict=True)])
        return {
            "latents": torch.from_numpy(latents).float(),
            "ids": self._ids(texts),
            "timesteps": torch.from_numpy(self._timesteps(rng)),
            **self._references(rng, Drawn(stories, frames, dropped, looks)),
        }

    def _ids(self, texts: list[str]) -> Tensor:
        return self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=TOKEN_LIMIT, return_tensors="pt"
        )["input_ids"]

    def _timesteps(self, rng: np.random.Generator) -> np.ndarray:
        """Uniform, a share once more in 450..999, where layout and colours are decided, and a share at 999."""
        timesteps = rng.integers(0, 1000, self.frames)
        timesteps = np.where(
            rng.random(self.frames) < self.high_noise, rng.integers(450, 1000, self.frames), timesteps
        )
        return np.where(rng.random(self.frames) < PURE_NOISE, 999, timesteps)

    def _references(self, rng: np.random.Generator, drawn: Drawn) -> Batch:
        """What a stage's batch holds of other frames."""
        return {}

    def _conditions(self, batch: Batch) -> dict[str, object]:
        return {}

    def text_states(self, ids: Tensor) -> Tensor:
        """Caption states (B, 40, 128)."""
        return self.text_encoder(ids).last_hidden_state

    def forward(self, batch: Batch) -> Tensor:
        latents, timesteps = batch["latents"], batch["timesteps"]
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, timesteps).contiguous(
            memory_format=torch.channels_last
        )
        wanted = self.scheduler.get_velocity(latents, noise, timesteps)
        predicted = self.unet(
            noisy, timesteps, self.text_states(batch["ids"]), **self._conditions(batch)
        ).sample
        return F.mse_loss(predicted.float(), wanted)

    @torch.no_grad()
    def denoise(
        self,
        texts: list[str],
        seed: int,
        references: Tensor | None = None,
        scale: float = 0.0,
        guidance: float = 3.0,
    ) -> np.ndarray:
        """Pictures uint8 (B, 128, 128, 3) in 25 DDIM steps, for samples; the runtime has its own loop."""
        device = next(self.unet.parameters()).device
        states = self.text_states(self._ids(["" for _ in texts] + texts).to(device))
        generator = torch.Generator().manual_seed(seed)
        shape = (len(texts), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        latents = torch.randn(shape, generator=generator).to(device)
        conditions = self._guided_references(references, len(texts), scale, device)
        scheduler = build_scheduler()
        scheduler.set_timesteps(25)
        for timestep in scheduler.timesteps:
            both = self.unet(torch.cat([latents, latents]), timestep, states, **conditions).sample
            empty, full = both.chunk(2)
            latents = scheduler.step(empty + guidance * (full - empty), timestep, latents).prev_sample
        vae = self._frozen[0].to(device)
        return np.concatenate(
            [to_pictures(vae.decode(p / vae.config.scaling_factor).sample) for p in latents.split(16)]
        )

    def _guided_references(
        self, references: Tensor | None, rows: int, scale: float, device: torch.device
    ) -> dict:
        return {}

    def sample(self, folder: Path) -> None:
        """Sixteen captions with their pictures, unet.png."""
        tales = [sample_training_tale(stream("sample", 1, 0, i), 4) for i in range(4)]
        rng = np.random.default_rng(3)
        looks = [sample_said(rng, len(tale.cast), SAID_SHARE) for tale in tales]
        pairs = zip(tales, looks, strict=True)
        texts = [caption(rng, t.cast, scene, said=said) for t, said in pairs for scene in t.scenes]
        print(*texts, sep="\n")
        pictures = self.denoise(texts, seed=11)
        rows = [np.concatenate(list(pictures[i : i + 8]), 1) for i in (0, 8)]
        Image.fromarray(np.concatenate(rows)).save(folder / f"{self.name}.png")

    def finish(self, folder: Path) -> None:
        """Write UNet, text encoder and scheduler."""
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self._plain_unet().save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")

    def _plain_unet(self) -> Network:
        """The UNet without what other files hold."""
        return self.unet
