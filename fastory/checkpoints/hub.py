"""From the names users give to local paths: what exists here is taken, else the hub is asked."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
from huggingface_hub import hf_hub_download, snapshot_download

from fastory.checkpoints.loading import loading
from fastory.errors import InputError

# owner/name, and for a file or folder in a repository owner/name/path
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_PATH = re.compile(rf"({HUB_ID.pattern})/(.+)")
TOKENIZER = [
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
]
CONFIGS = ["*.json", "*.txt", "**/*.json", "**/*.txt"]


def local_path(name: str | Path, what: str) -> Path | None:
    """The path that `name` is, where something is there; else None. InputError for what can be no path."""
    try:
        path = Path(name).expanduser()
        path.stat()
        return path
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RuntimeError) as error:  # too long a name; a NUL; a user who is not there
        said = error.strerror if isinstance(error, OSError) else error
        shown = str(name) if len(str(name)) <= 60 else f"{str(name)[:60]}..."
        raise InputError(f"{what} {shown!r}: wanted a path, got one that cannot be used ({said})") from error


def model_path(model: str | Path, *, offline: bool) -> Path:
    """A model's folder or file: a path that exists, else `owner/name`, downloaded or from the hub's cache."""
    path, model = local_path(model, "Model"), str(model)
    if path is not None:
        return path
    if not HUB_ID.fullmatch(model):
        raise InputError(f"Model {model} does not exist: no folder, no file, and no hub id (owner/name).")
    with loading(_absent(f"Model {model}", offline)):
        return Path(DiffusionPipeline.download(model, use_safetensors=True, local_files_only=offline))


def weight_path(name: str | Path, *, what: str, offline: bool) -> Path:
    """A weight file: a path that exists, else `owner/name/path/in/it.safetensors` of the hub."""
    path, name = local_path(name, what), str(name)
    if path is not None:
        return path
    match = HUB_PATH.fullmatch(name)
    if not match or Path(name).suffix == "":
        raise InputError(f"{what} {name} does not exist: no file, and no file of the hub (owner/name/path).")
    with loading(_absent(f"{what} {name}", offline)):
        return Path(hf_hub_download(match[1], match[2], local_files_only=offline))


def encoder_path(name: str | Path, *, offline: bool) -> Path:
    """An image encoder's folder: a path that exists, else `owner/name` or `owner/name/folder` of the hub."""
    path, name = local_path(name, "Image encoder"), str(name)
    if path is not None:
        return path
    match = HUB_PATH.fullmatch(name)
    repository, folder = (match[1], match[2]) if match else (name, "")
    if not HUB_ID.fullmatch(repository):
        raise InputError(
            f"Image encoder {name} does not exist: no folder, and no hub id (owner/name/folder)."
        )
    files = [f"{folder}/{name}".lstrip("/") for name in ("*.json", "*.safetensors")]
    with loading(_absent(f"Image encoder {name}", offline)):
        return Path(snapshot_download(repository, allow_patterns=files, local_files_only=offline)) / folder


def config_folder(model_type: str, *, offline: bool) -> Path:
    """The configs (no weights) of the published model that single files of `model_type` are made from."""
    repository = DIFFUSERS_DEFAULT_PIPELINE_PATHS[model_type]["pretrained_model_name_or_path"]
    with loading(_absent(f"The configs of {repository}", offline)):
        return Path(snapshot_download(repository, allow_patterns=CONFIGS, local_files_only=offline))


def tokenizer_folder(repository: str, *, offline: bool) -> Path:
    """A published tokenizer, without the weights it lies beside."""
    with loading(_absent(f"The tokenizer of {repository}", offline)):
        return Path(snapshot_download(repository, allow_patterns=TOKENIZER, local_files_only=offline))


def _absent(what: str, offline: bool) -> str:
    if offline:
        return f"{what} is not here and not in the hub's cache, and --offline forbids downloading"
    return f"{what} is not here and could not be had from the hub"
