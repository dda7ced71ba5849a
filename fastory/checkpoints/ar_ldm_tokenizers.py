"""The two tokenizers of an AR-LDM model, which its checkpoints lack: given in a folder, or the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BertTokenizer, CLIPTokenizer

from fastory.checkpoints.history import ENC
from fastory.checkpoints.hub import tokenizer_folder
from fastory.checkpoints.loading import loading
from fastory.errors import InputError

DEC = "[DEC]"  # BLIP adds it before [ENC] to BERT's vocabulary
PUBLISHED_CLIP, PUBLISHED_BERT = "openai/clip-vit-large-patch14", "google-bert/bert-base-uncased"


def caption_tokenizer(folder: Path | None, vocabulary: int, length: int, *, offline: bool) -> CLIPTokenizer:
    """CLIP's tokenizer with the names that training added: `folder`/tokenizer, else the published one.

    vocabulary, length: rows of the checkpoint's token and position embeddings. Raises InputError where the tokenizer
    cannot be had or is of another size.
    """
    found = _first(folder, "tokenizer")
    where = found or _published(PUBLISHED_CLIP, "tokenizer/", offline)
    with loading(f"{where} cannot be opened as CLIP's tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(where, local_files_only=True)
    _check_size(tokenizer, vocabulary, found or PUBLISHED_CLIP, "tokenizer/")
    tokenizer.model_max_length = length
    return tokenizer


def history_tokenizer(folder: Path | None, vocabulary: int, *, offline: bool) -> Any:
    """BERT's tokenizer with [DEC], [ENC] and the names: `folder`/history/tokenizer or /blip_tokenizer, else published.

    Raises InputError where it cannot be had, is of another size, or lacks [ENC].
    """
    found = _first(folder, "history/tokenizer", "blip_tokenizer")
    where = found or _published(PUBLISHED_BERT, "blip_tokenizer/", offline)
    with loading(f"{where} cannot be opened as BLIP's tokenizer"):
        kind = AutoTokenizer if found else BertTokenizer
        tokenizer = kind.from_pretrained(where, local_files_only=True)
    if not found:
        tokenizer.add_special_tokens({"bos_token": DEC})
        tokenizer.add_special_tokens({"additional_special_tokens": [ENC]})
    _check_size(tokenizer, vocabulary, found or PUBLISHED_BERT, "blip_tokenizer/")
    if ENC not in tokenizer.get_vocab():
        raise InputError(
            f"{where} has no token {ENC}, which BLIP begins a caption with; wanted BERT's tokenizer with {DEC} and {ENC} "
            "added, as BLIP has them"
        )
    return tokenizer


def _first(folder: Path | None, *names: str) -> Path | None:
    if folder is not None and not folder.is_dir():
        raise InputError(f"--config {folder} is not a folder; wanted one with tokenizer/ and blip_tokenizer/")
    places = [folder / name for name in names] if folder is not None else []
    return next((folder for folder in places if folder.is_dir()), None)


def _published(repository: str, name: str, offline: bool) -> Path:
    try:
        return tokenizer_folder(repository, offline=offline)
    except InputError as error:
        raise InputError(
            f"The checkpoint holds no tokenizers; give a folder with {name} by --config. {error}"
        ) from error


def _check_size(tokenizer: Any, vocabulary: int, where: object, name: str) -> None:
    if len(tokenizer) != vocabulary:
        raise InputError(
            f"The tokenizer {where} has {len(tokenizer)} tokens, and the checkpoint's embedding {vocabulary}; wanted the "
            f"one that it was trained with, the added names among them: a folder with {name} by --config"
        )
