"""The vae stage: an f8 autoencoder of drawn pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastory.builtin.training.loop import Batch, Objective
from fastory.builtin.training.networks import SMALL, Sizes, build_vae
from fastory.builtin.world.corpus import sample_training_tale
from fastory.builtin.world.drawing import SIZE, draw

CROP = 64


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 pictures (B, H, W, 3) as floats (B, 3, H, W) in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(tensor: Tensor) -> np.ndarray:
    """Floats (B, 3, H, W) in -1..1 as uint8 pictures (B, H, W, 3), rounded as diffusers' image processor does."""
    scaled = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.byte().permute(0, 2, 3, 1).cpu().numpy()


def drawn_pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    """uint8 (count, 128, 128, 3): frames of training stories, four of each story."""
    pictures: list[np.ndarray] = []
    while len(pictures) < count:
        tale = sample_training_tale(rng, 4)
        pictures += [np.asarray(draw(tale.cast, scene, rng)) for scene in tale.scenes]
    return np.stack(pictures[:count])


def psnr(vae: nn.Module, pictures: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of the pictures (B, 128, 128, 3) after encoding and decoding."""
    device = next(vae.parameters()).device
    with torch.no_grad():
        restored = [vae(part.to(device)).sample for part in to_tensor(pictures).split(16)]
    difference = to_pictures(torch.cat(restored)).astype(np.float64) - pictures
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


class VaeObjective(Objective):
    """Reconstruction of the picture and of its edges, with a little latent noise instead of a full posterior.

    A KL term with posterior noise from the first step on made small autoencoders collapse; a fixed noise of 0.05 and
    a light pull towards small latents keep them smooth enough for diffusion. Crops come first because they are
    cheap, whole pictures last because group normalisation sees the whole picture.
    """

    name = "vae"
    learning_rate = 2.5e-3
    ema_decay = 0.995

    def __init__(self, sizes: Sizes = SMALL, pictures: int = 4) -> None:
        super().__init__()
        self.vae = build_vae(sizes).to(memory_format=torch.channels_last)
        self.pictures = pictures

    def batch(self, rng: np.random.Generator, progress: float) -> Batch:
        """Crops in the first 20 %, whole pictures afterwards: the same number of pixels."""
        if progress >= 0.2:
            return {"pictures": to_tensor(drawn_pictures(rng, self.pictures))}
        whole = drawn_pictures(rng, 4 * self.pictures)
        corners = rng.integers(0, SIZE - CROP + 1, (len(whole), 2))
        crops = [p[y : y + CROP, x : x + CROP] for p, (y, x) in zip(whole, corners, strict=True)]
        return {"pictures": to_tensor(np.stack(crops))}

    def forward(self, batch: Batch) -> Tensor:
        pictures = batch["pictures"].contiguous(memory_format=torch.channels_last)
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(pictures)).chunk(2, 1)
        latents = mean + 0.05 * torch.randn_like(mean)
        difference = self.vae.decoder(self.vae.post_quant_conv(latents)).float() - pictures
        edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        # The variance is not used; the pull keeps the posterior of AutoencoderKL nearly deterministic.
        penalty = 5e-4 * mean.float().square().mean() + 1e-4 * (log_variance.float() + 6).square().mean()
        return 2 * difference.square().mean() + difference.abs().mean() + 0.5 * edges + penalty

    def sample(self, folder: Path) -> None:
        """vae.png: drawn pictures over their reconstructions; prints their PSNR."""
        pictures = drawn_pictures(np.random.default_rng(7), 16)
        device = next(self.vae.parameters()).device
        restored = to_pictures(self.vae(to_tensor(pictures).to(device)).sample)
        rows = [np.concatenate(list(row), 1) for part in (pictures, restored) for row in (part[:8], part[8:])]
        Image.fromarray(np.concatenate([rows[0], rows[2], rows[1], rows[3]])).save(folder / "vae.png")
        print(f"vae: {psnr(self.vae, pictures):.2f} dB on 16 pictures", flush=True)

    def finish(self, folder: Path) -> None:
        """Set the scaling factor to one over the latents' standard deviation and write the folder."""
        device = next(self.vae.parameters()).device
        pictures = to_tensor(drawn_pictures(np.random.default_rng(8), 256))
        with torch.no_grad():
            latents = torch.cat([self.vae.encode(p.to(device)).latent_dist.mean for p in pictures.split(16)])
        self.vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 6))
        self.vae.save_pretrained(folder / "vae")
