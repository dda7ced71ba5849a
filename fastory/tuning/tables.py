"""What stays the same during tuning, computed once: latents of pictures, states of captions, inputs of the history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastory import files
from fastory.checkpoints.history import ENC
from fastory.errors import FastoryError, InputError
from fastory.models.torch_model import StoryModel
from fastory.pictures import open_picture
from fastory.tuning.stories import Example

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tables:
    """The frames of all stories, one after another. starts: the first frame of each story, and the number of frames.

    arrays, in memory-mapped files: latents (F, c, h, w) as the UNet takes them; captions (F, Lt, C_x), unseen (F, Lt)
    True for padding; ids, mask (F, S) and squares (F, 3, s, s) uint8 for the history encoder; references (F, T, C_x),
    where an IP-Adapter is imitated. nothing: the same of an empty caption and a black picture, a single row.
    """

    arrays: Arrays
    nothing: Arrays
    starts: tuple[int, ...]

    def length(self, story: int) -> int:
        """Frames of a story."""
        return self.starts[story + 1] - self.starts[story]

    def take(self, name: str, frames: np.ndarray) -> Tensor:
        """Rows of a table as a tensor, (len(frames), ..)."""
        return torch.from_numpy(self.arrays[name][frames])


def encode_examples(
    model: StoryModel,
    examples: Sequence[Example],
    size: tuple[int, int],
    folder: Path,
    references: bool = False,
) -> Iterator[tuple[int, int]]:
    """Fill `folder` with the tables of `examples`; yields (frames done, frames). A kill leaves no half-filled folder.

    size: (width, height) in pixels; a larger picture is cropped to that shape and reduced, as the first picture of a
    continuation is. references: also each picture's tokens for the base's IP-Adapter.
    """
    if folder.exists():
        return
    partial = files.partial_of(folder)
    files.remove(partial)
    files.make_folder(partial)
    frames = [
        (p, file) for example in examples for p, file in zip(example.prompts, example.pictures, strict=True)
    ]
    tables: Arrays = {}
    for number, (prompt, path) in enumerate(frames):
        for name, row in encode(model, prompt, _open(path, size), references).items():
            if number == 0:
                tables[name] = _new_table(partial / f"{name}.npy", row, len(frames))
            tables[name][number] = row
        yield number + 1, len(frames)
    for table in tables.values():
        table.flush()  # type: ignore[attr-defined]  # a memmap
    files.sync_tree(partial)
    files.replace(partial, folder)


def _new_table(path: Path, row: np.ndarray, count: int) -> np.ndarray:
    """A memory-mapped file for `count` rows like `row`. Raises OSError where the disk has no room for it."""
    shape = (count, *row.shape)
    files.write(path, lambda path: np.lib.format.open_memmap(path, "w+", row.dtype, shape))
    files.reserve(path)
    return np.lib.format.open_memmap(path, "r+")


def open_tables(
    model: StoryModel, examples: Sequence[Example], size: tuple[int, int], folder: Path
) -> Tables:
    """The tables that `encode_examples` left in `folder`."""
    arrays: Arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
    starts = np.cumsum([0, *(len(example.prompts) for example in examples)])
    return Tables(arrays, encode(model, "", Image.new("RGB", size)), tuple(int(n) for n in starts))


def encode(model: StoryModel, prompt: str, image: Image.Image, references: bool = False) -> Arrays:
    """One frame's row of every table."""
    text = model.encode_caption(prompt).tokens[0]
    ids, mask = history_ids(model, prompt)
    processor = model.require_history().image_processor
    square = processor(image, return_tensors="np", do_rescale=False, do_normalize=False).pixel_values[0]
    row = {
        "latents": encode_picture(model, image)[0].float().cpu().numpy(),
        "captions": text.float().cpu().numpy(),
        "unseen": model.caption_padding(prompt)[0].cpu().numpy(),
        "ids": ids,
        "mask": mask,
        "squares": square.astype(np.uint8),
    }
    if references:
        row["references"] = model.encode_reference(image)[0].float().cpu().numpy()
    return row


def history_ids(model: StoryModel, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask (S,) of a caption as StoryModel.encode_frame has them."""
    history = model.require_history()
    size = history.encoder.config.frame_tokens
    text = history.tokenizer(
        prompt, padding="max_length", truncation=True, max_length=size, return_tensors="np"
    )
    ids = text.input_ids[0].astype(np.int64)
    if ENC in history.tokenizer.get_vocab():
        ids[0] = history.tokenizer.convert_tokens_to_ids(ENC)
    return ids, text.attention_mask[0].astype(np.int64)


def history_pixels(processor: Any, squares: np.ndarray) -> Tensor:
    """squares (n, 3, s, s) uint8 -> what the vision encoder takes, (n, 3, s, s): scaling and normalisation alone."""
    options = {"do_resize": False, "input_data_format": "channels_first", "return_tensors": "pt"}
    pixels: Tensor = processor(list(squares), **options).pixel_values
    return pixels


@torch.inference_mode()
def encode_picture(model: StoryModel, image: Image.Image) -> Tensor:
    """The mean latents (1, c, h, w) of an 8-bit picture, scaled for the UNet."""
    pixels = model.pipeline.image_processor.preprocess(image).to(model.device, model.vae.dtype)
    latents: Tensor = model.vae.encode(pixels).latent_dist.mean
    return latents * model.vae.config.scaling_factor


def _open(path: Path, size: tuple[int, int]) -> Image.Image:
    try:
        return ImageOps.fit(open_picture(path), size, Image.Resampling.LANCZOS)
    except FastoryError as error:
        raise InputError(str(error)) from error
