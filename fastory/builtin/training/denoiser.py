"""The unet and adapter stages: a text-conditioned denoiser, then references beside the text."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from fastory.builtin.training.autoencoder import to_pictures, to_tensor
from fastory.builtin.training.encoders import SAID_SHARE, pixel_values, pixels_of
from fastory.builtin.training.loop import Batch, Objective, stream
from fastory.builtin.training.networks import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    REFERENCE_TOKENS,
    SMALL,
    WIDTH,
    Network,
    Sizes,
    build_scheduler,
    build_unet,
)
from fastory.builtin.world.captions import TOKEN_LIMIT, caption, sample_names
from fastory.builtin.world.corpus import sample_training_tale
from fastory.builtin.world.drawing import Tale, draw
from fastory.builtin.world.looks import sample_said

FRAMES = 8  # of a training story
REFERENCES = 6  # slots; fewer references are repeated, which leaves a softmax over them unchanged
TRAINED_SCALE = 0.5  # the weight of references at which the adapter was trained, in the files


class Corpus(Dataset):
    """Latents and reference embeddings of drawn stories, encoded once, in memory-mapped files.

    latents (stories, 8, 8, 16, 16) float16, scaled; embeddings (stories, 8, 128) float16, of the pictures as drawn or,
    for every third story, as they come back from the autoencoder. Stories are drawn again from the seed. Files carry
    the marks of the networks that made them: a retrained autoencoder finds no stale latents.
    """

    def __init__(self, folder: Path, seed: int, stories: int, workers: int = 0) -> None:
        self.folder, self.seed, self.stories, self.workers = folder, seed, stories, workers
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
            self.embeddings = self.open("embeddings", (WIDTH,), f"{latents_mark}-{embeddings_mark}")

    def __len__(self) -> int:
        return self.stories

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        """A story's number, its drawn frames (8, 3, 128, 128) and their pixels for the image encoder (8, 3, 96, 96)."""
        rng, tale = stream("draw", self.seed, 0, index), self.tales[index]
        pictures = np.stack([np.asarray(draw(tale.cast, scene, rng)) for scene in tale.scenes])
        return index, to_tensor(pictures), pixel_values(pictures)

    def _missing(
        self, table: np.ndarray, part: int, parts: int
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """The stories of this part without an entry, eight at a time: numbers, frames and pixels, frames flattened."""
        todo = [index for index in range(part, self.stories, parts) if not np.any(table[index])]
        loader: DataLoader = DataLoader(self, 8, sampler=todo, num_workers=self.workers)
        for number, (indices, pictures, pixels) in enumerate(loader):
            if part == 0 and number % 25 == 0:
                print(f"corpus: story {8 * number} of {len(todo)}", flush=True)
            yield indices.numpy(), pictures.flatten(0, 1), pixels.flatten(0, 1)

    @torch.no_grad()
    def encode_latents(self, vae: Network, part: int, parts: int, device: str) -> None:
        """Encode every parts-th story from `part` on that has no latents yet."""
        vae.to(device)
        for indices, pictures, _ in self._missing(self.latents, part, parts):
            latents = vae.encode(pictures.to(device)).latent_dist.mean * vae.config.scaling_factor
            self.latents[indices] = latents.unflatten(0, (-1, FRAMES)).cpu().numpy()

    @torch.no_grad()
    def embed_references(
        self, vae: Network, image_encoder: Network, part: int, parts: int, device: str
    ) -> None:
        """Embed every parts-th story from `part` on that has no embeddings yet; needs the latents."""
        vae.to(device), image_encoder.to(device)
        for indices, _, pixels in self._missing(self.embeddings, part, parts):
            pixels = pixels.to(device).unflatten(0, (-1, FRAMES))
            for row in np.flatnonzero(indices % 3 == 0):
                latents = torch.from_numpy(self.latents[indices[row]]).float().to(device)
                pixels[row] = pixels_of(vae.decode(latents / vae.config.scaling_factor).sample)
            embeddings = image_encoder(pixels.flatten(0, 1)).image_embeds
            self.embeddings[indices] = embeddings.unflatten(0, (-1, FRAMES)).cpu().numpy()


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
        self._frozen = [text_encoder.eval().requires_grad_(False), vae.eval().requires_grad_(False)]

    def batch(self, rng: np.random.Generator, progress: float) -> Batch:
        """Frames of different stories with captions of their own making."""
        stories = rng.integers(self.corpus.stories, size=self.frames)
        frames = rng.integers(FRAMES, size=self.frames)
        dropped = rng.random(self.frames)
        texts = []
        for story, frame, drop in zip(stories, frames, dropped, strict=True):
            tale = self.corpus.tales[story]
            names = sample_names(rng, len(tale.cast))
            said = sample_said(rng, len(tale.cast), SAID_SHARE, any(names))
            text = caption(rng, tale.cast, tale.scenes[frame], names, said)
            texts.append("" if drop < 0.1 else text)
        latents = np.stack([self.corpus.latents[s, f] for s, f in zip(stories, frames, strict=True)])
        return {
            "latents": torch.from_numpy(latents).float(),
            "ids": self._ids(texts),
            "timesteps": torch.from_numpy(self._timesteps(rng)),
            **self._references(rng, stories, frames, dropped),
        }

    def _ids(self, texts: list[str]) -> Tensor:
        return self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=TOKEN_LIMIT, return_tensors="pt"
        )["input_ids"]

    def _timesteps(self, rng: np.random.Generator) -> np.ndarray:
        """Uniform, and a share once more in 450..999, where layout and colours are decided."""
        timesteps = rng.integers(0, 1000, self.frames)
        return np.where(
            rng.random(self.frames) < self.high_noise, rng.integers(450, 1000, self.frames), timesteps
        )

    def _references(
        self, rng: np.random.Generator, stories: np.ndarray, frames: np.ndarray, dropped: np.ndarray
    ) -> Batch:
        return {}

    def _conditions(self, batch: Batch) -> dict[str, object]:
        return {}

    def text_states(self, ids: Tensor) -> Tensor:
        """Frozen caption states (B, 40, 128)."""
        with torch.no_grad():
            return self._frozen[0].to(ids.device)(ids).last_hidden_state

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
        vae = self._frozen[1].to(device)
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
        """Write UNet and scheduler."""
        self.unet.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")


class AdapterObjective(UnetObjective):
    """References beside the text, the UNet trained on with them.

    The adapter has the standard layout and the standard place in the computation; unlike a plug-in adapter it does not
    meet a frozen UNet, because every fifth batch has text alone (weight 0), which keeps round 0 as it was.
    References are other frames of the story, some from the autoencoder as in a run. In half of the larger sets a
    minority are strangers of the same species: the adapter must learn to follow the majority.
    """

    name = "adapter"
    learning_rate = 8e-4
    high_noise = 0.5

    def __init__(self, unet: Network, image_encoder: Network, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.unet = unet.to(memory_format=torch.channels_last)
        self.unet._load_ip_adapter_weights([_fresh_adapter(unet)])
        self.unet.requires_grad_(True)
        self._frozen.append(image_encoder.eval().requires_grad_(False))
        self.alike = _frames_by_species(self.corpus)

    def _references(
        self, rng: np.random.Generator, stories: np.ndarray, frames: np.ndarray, dropped: np.ndarray
    ) -> Batch:
        """Embeddings (B, 6, 128), zeros where references are dropped, and the batch's weight: near 0 is text alone.

        Not 0 itself: stock processors skip the adapter there, and its parameters would miss their gradients.
        """
        rows = [self._reference_row(rng, int(s), int(f)) for s, f in zip(stories, frames, strict=True)]
        embeddings = np.stack(rows).astype(np.float32)
        # Half of the frames without references are also without caption: guidance's empty half sees both missing.
        embeddings[(dropped > 0.04) & (dropped < 0.16)] = 0
        weight = 1e-6 if rng.random() < 0.2 else rng.uniform(0.6, 1.1)
        return {
            "references": torch.from_numpy(embeddings),
            "weight": torch.tensor(weight, dtype=torch.float32),
        }

    def _reference_row(self, rng: np.random.Generator, story: int, frame: int) -> np.ndarray:
        count = int(rng.choice((1, 2, 3, 6, 6)))
        chosen = rng.permutation([other for other in range(FRAMES) if other != frame])[:count]
        places = [(story, int(other)) for other in chosen]
        if count >= 3 and rng.random() < 0.5:
            for position in range(1 if count == 3 else int(rng.integers(1, 3))):
                places[position] = self._stranger(rng, *places[position])
        return np.tile(
            np.stack([self.corpus.embeddings[place] for place in places]), (REFERENCES // count, 1)
        )

    def _stranger(self, rng: np.random.Generator, story: int, frame: int) -> tuple[int, int]:
        """A frame of another story with the same species, and only them; the frame itself where there is hardly any."""
        pool = self.alike[_species_of(self.corpus.tales[story], frame)]
        found = (pool[rng.integers(len(pool))] for _ in range(8))
        return next((place for place in found if place[0] != story), (story, frame))

    def _conditions(self, batch: Batch) -> dict[str, object]:
        self._set_weight(batch["weight"].item())
        return {"added_cond_kwargs": {"image_embeds": [batch["references"]]}}

    def _set_weight(self, weight: float) -> None:
        """The weight of references in every cross-attention, in units of the trained one."""
        for processor in adapter_processors(self.unet):
            processor.scale = [weight]

    def _guided_references(
        self, references: Tensor | None, rows: int, scale: float, device: torch.device
    ) -> dict:
        if references is None:
            references, scale = torch.zeros(rows, 1, WIDTH), 0.0
        self._set_weight(scale / TRAINED_SCALE)
        both = torch.cat([torch.zeros_like(references), references]).to(device)
        return {"added_cond_kwargs": {"image_embeds": [both]}}

    def sample(self, folder: Path) -> None:
        """Stories drawn in three rounds with the frames of the round before as references, adapter.png."""
        rng = np.random.default_rng(4)
        rows: list[np.ndarray] = []
        for index in range(4):
            tale = sample_training_tale(stream("sample", 2, 0, index), FRAMES)
            texts = [caption(rng, tale.cast, scene) for scene in tale.scenes]
            pictures = self.denoise(texts, seed=index)
            rows.append(np.concatenate(list(pictures), 1))
            for scale in (0.4, 0.5):
                embeddings = (
                    self._frozen[2]
                    .to(self.unet.device)(pixel_values(pictures).to(self.unet.device))
                    .image_embeds
                )
                others = [torch.cat([embeddings[:i], embeddings[i + 1 :]]) for i in range(FRAMES)]
                pictures = self.denoise(texts, index, torch.stack(others).cpu(), scale)
            rows.append(np.concatenate(list(pictures), 1))
        Image.fromarray(np.concatenate(rows)).save(folder / "adapter.png")

    def finish(self, folder: Path) -> None:
        """Write the UNet without the adapter, and the adapter with its weight folded into to_v_ip."""
        adapter = {
            f"{part}.{k}": v for part, tensors in self._adapter_state().items() for k, v in tensors.items()
        }
        for key in adapter:
            # to_v_ip has no bias, so a factor on it is a factor on the weight of the references.
            adapter[key] = (
                (adapter[key] / (TRAINED_SCALE if "to_v_ip" in key else 1)).detach().cpu().contiguous()
            )
        (folder / "ip_adapter").mkdir(parents=True, exist_ok=True)
        save_file(adapter, folder / "ip_adapter" / "ip_adapter.safetensors")
        plain = UNet2DConditionModel.from_config({**self.unet.config, "encoder_hid_dim_type": None})
        plain.load_state_dict({k: v for k, v in self.unet.state_dict().items() if not _of_adapter(k)})
        plain.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")

    def _adapter_state(self) -> dict[str, dict[str, Tensor]]:
        layer = self.unet.encoder_hid_proj.image_projection_layers[0]
        projection = {"proj.weight": layer.image_embeds.weight, "proj.bias": layer.image_embeds.bias}
        projection |= {"norm.weight": layer.norm.weight, "norm.bias": layer.norm.bias}
        attention: dict[str, Tensor] = {}
        for number, processor in enumerate(adapter_processors(self.unet)):
            attention[f"{2 * number + 1}.to_k_ip.weight"] = processor.to_k_ip[0].weight
            attention[f"{2 * number + 1}.to_v_ip.weight"] = processor.to_v_ip[0].weight
        return {"image_proj": projection, "ip_adapter": attention}


def _of_adapter(key: str) -> bool:
    return "encoder_hid_proj" in key or "_ip." in key


def adapter_processors(unet: Network) -> Iterator[Network]:
    """The processors of the cross-attention layers, in the order of the adapter file's numbers."""
    return (processor for processor in unet.attn_processors.values() if hasattr(processor, "to_k_ip"))


def _fresh_adapter(unet: Network) -> dict[str, dict[str, Tensor]]:
    """The start: text's own K and V projections, V made small so that the references begin as a whisper."""
    weights = unet.state_dict()
    attention: dict[str, Tensor] = {}
    layers = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for number, layer in enumerate(layers):
        attention[f"{2 * number + 1}.to_k_ip.weight"] = weights[f"{layer}.to_k.weight"].clone()
        attention[f"{2 * number + 1}.to_v_ip.weight"] = weights[f"{layer}.to_v.weight"].clone() * 0.1
    projection = {
        "proj.weight": torch.randn(REFERENCE_TOKENS * WIDTH, WIDTH) * WIDTH**-0.5,
        "proj.bias": torch.zeros(REFERENCE_TOKENS * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": attention}


def _species_of(tale: Tale, frame: int) -> frozenset[str]:
    return frozenset(tale.cast[role.member].species for role in tale.scenes[frame].roles)


def _frames_by_species(corpus: Corpus) -> dict[frozenset[str], list[tuple[int, int]]]:
    """All (story, frame) by the set of species that the frame shows."""
    found: dict[frozenset[str], list[tuple[int, int]]] = {}
    for story, tale in enumerate(corpus.tales):
        for frame in range(FRAMES):
            found.setdefault(_species_of(tale, frame), []).append((story, frame))
    return found


def load_adapter(unet: Network, file: Path) -> None:
    """Put a trained IP-Adapter file into a UNet that carries one, undoing the factor that its file folds in."""
    tensors = load_file(file)
    layer = unet.encoder_hid_proj.image_projection_layers[0]
    with torch.no_grad():
        layer.image_embeds.weight.copy_(tensors["image_proj.proj.weight"])
        layer.image_embeds.bias.copy_(tensors["image_proj.proj.bias"])
        layer.norm.weight.copy_(tensors["image_proj.norm.weight"])
        layer.norm.bias.copy_(tensors["image_proj.norm.bias"])
        for number, processor in enumerate(adapter_processors(unet)):
            processor.to_k_ip[0].weight.copy_(tensors[f"ip_adapter.{2 * number + 1}.to_k_ip.weight"])
            processor.to_v_ip[0].weight.copy_(
                tensors[f"ip_adapter.{2 * number + 1}.to_v_ip.weight"] * TRAINED_SCALE
            )
