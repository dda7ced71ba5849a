"""Finding the CLIP image encoder that belongs to an adapter, and the preparation of pictures for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from fastory.checkpoints.configs import MOST, check_files
from fastory.checkpoints.folder import load_part
from fastory.checkpoints.ip_adapter import AdapterHeader
from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import is_there, read_json
from fastory.errors import InputError

# The published adapters' encoders, by the width an adapter sees: the projection for base, the hidden states
# for Plus.
ENCODERS = {
    "base": {768: "CLIP ViT-L/14", 1024: "CLIP ViT-H/14", 1280: "CLIP ViT-bigG/14"},
    "plus": {1024: "CLIP ViT-L/14", 1280: "CLIP ViT-H/14", 1664: "CLIP ViT-bigG/14"},
}


def find_image_encoder(
    requested: Path | None, model_folder: Path | None, adapter: AdapterHeader | None
) -> Path | None:
    """The folder of the image encoder: the given one, else the model's, else the one beside the adapter.

    Beside means image_encoder in the adapter's folder or its parent's, or models/image_encoder of the
    layout of h94/IP-Adapter, where sdxl_models/*_vit-h adapters use the encoder of models/. Of those the
    first whose width fits is taken. None only if there is no adapter and no encoder. Raises InputError if
    none fits.
    """
    if requested is not None:
        _check_encoder_folder(requested)
    folders = [requested] if requested is not None else list(_folders(model_folder, adapter))
    found = [folder for folder in folders if is_there(folder / "config.json")]
    if adapter is None:
        return found[0] if found else None
    widths = {folder: _width(folder, adapter) for folder in found}
    for folder, width in widths.items():
        if width == adapter.image_width:
            return folder
    wanted = f"{adapter.path} wants an image encoder of {_named(adapter, adapter.image_width)}"
    if not found:
        raise InputError(
            f"{wanted}, and none was found. Looked in: {', '.join(str(folder) for folder in folders)}. "
            "Give its folder with --image-encoder."
        )
    came = ", ".join(f"{folder} is of {_named(adapter, width)}" for folder, width in widths.items())
    raise InputError(f"{wanted}; {came}. Give the folder of the right one with --image-encoder.")


def _folders(model_folder: Path | None, adapter: AdapterHeader | None) -> Iterable[Path]:
    if model_folder is not None:
        yield model_folder / "image_encoder"
    if adapter is not None:
        folder = adapter.path.parent
        yield folder / "image_encoder"
        yield folder.parent / "image_encoder"
        yield folder.parent / "models" / "image_encoder"


def _check_encoder_folder(folder: Path) -> None:
    if not is_there(folder / "config.json"):
        raise InputError(
            f"Image encoder {folder} is not a folder with a config.json; wanted one as save_pretrained "
            "writes it, for example models/image_encoder of h94/IP-Adapter."
        )


def _width(folder: Path, adapter: AdapterHeader) -> int:
    check_files(folder)
    read_json(folder / "config.json")
    with loading(f"{folder / 'config.json'} is not of a CLIP image encoder"):
        config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
        return int(config.projection_dim if adapter.kind == "base" else config.hidden_size)


def _named(adapter: AdapterHeader, width: int) -> str:
    what = "projection width" if adapter.kind == "base" else "hidden width"
    known = ENCODERS[adapter.kind].get(width)
    return f"{what} {width}" + (f" ({known})" if known else "")


def load_image_encoder(
    folder: Path, dtype: torch.dtype
) -> tuple[CLIPVisionModelWithProjection, tuple[Path, ...]]:
    """The image encoder in eval mode without gradients, and its weight files."""
    encoder, files = load_part(CLIPVisionModelWithProjection, folder, dtype)
    assert isinstance(encoder, CLIPVisionModelWithProjection)
    return encoder, files


def image_processor(
    of_model: CLIPImageProcessorPil | None, encoder: CLIPVisionModelWithProjection | None
) -> CLIPImageProcessorPil:
    """The model folder's preparation where it makes pictures of the encoder's size, else CLIP's at that size.

    A model's feature_extractor may be there for its safety checker, and an encoder from elsewhere need not
    share its size.
    """
    if encoder is None:
        return of_model or CLIPImageProcessorPil()
    side = _side(encoder)
    if of_model is not None and (of_model.crop_size["height"], of_model.crop_size["width"]) == (side, side):
        return of_model
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _side(encoder: CLIPVisionModelWithProjection) -> int:
    side = encoder.config.image_size
    if not isinstance(side, int) or not 1 <= side <= MOST:
        raise InputError(
            f"The image encoder takes pictures of {str(side)[:60]}; wanted one side, as CLIP's are square."
        )
    return side
