"""From the names users give to local paths: what exists here is taken, else the hub is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
from huggingface_hub import hf_hub_download, snapshot_download

from fastory.checkpoints.loading import loading
from fastory.errors import InputError
from fastory.model_names import local_encoder, local_model, local_weights

TOKENIZER = [
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
]
CONFIGS = ["*.json", "*.txt", "**/*.json", "**/*.txt"]


def model_path(model: str | Path, *, offline: bool) -> Path:
    """A model's folder or file: a path that exists, else `owner/name`, downloaded or from the hub's cache."""
    if path := local_model(model):
        return path
    with loading(_absent(f"Model {model}", offline)):
        return Path(DiffusionPipeline.download(str(model), use_safetensors=True, local_files_only=offline))


def weight_path(name: str | Path, *, what: str, offline: bool) -> Path:
    """A weight file: a path that exists, else `owner/name/path/in/it.safetensors` of the hub."""
    found = local_weights(name, what)
    if isinstance(found, Path):
        return found
    with loading(_absent(f"{what} {name}", offline)):
        return Path(hf_hub_download(*found, local_files_only=offline))


def encoder_path(name: str | Path, *, offline: bool) -> Path:
    """An image encoder's folder: a path that exists, else `owner/name` or `owner/name/folder` of the hub."""
    found = local_encoder(name)
    if isinstance(found, Path):
        return found
    repository, folder = found
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


def require_parts(
    name: str, model: str, ip_adapter: str | Path, image_encoder: str | Path | None, *, offline: bool
) -> None:
    """Download what the model `name` is made of. Raises InputError, which names all that is missing, where that cannot be."""
    wanted: dict[str, Callable[[bool], Path]] = {
        model: lambda local: model_path(model, offline=local),
        str(ip_adapter): lambda local: weight_path(ip_adapter, what="IP-Adapter", offline=local),
    }
    if image_encoder is not None:
        wanted[str(image_encoder)] = lambda local: encoder_path(image_encoder, offline=local) / "config.json"
    missing = [part for part, path in wanted.items() if not _is_cached(path)]
    said = (
        f"Model {name} wants {', '.join(wanted)}; not here and not in the hub's cache: {', '.join(missing)}"
    )
    if missing and offline:
        raise InputError(f"{said}. --offline forbids downloading: run once without it")
    try:
        for part in missing:
            wanted[part](False)
    except InputError as error:
        raise InputError(f"{said}. {error}") from error


def _is_cached(path: Callable[[bool], Path]) -> bool:
    try:
        return path(True).exists()
    except InputError:
        return False


def _absent(what: str, offline: bool) -> str:
    if offline:
        return f"{what} is not here and not in the hub's cache, and --offline forbids downloading"
    return f"{what} is not here and could not be had from the hub"
