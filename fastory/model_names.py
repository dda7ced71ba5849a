"""What users name models and weights by: a path that exists, else a name of PUBLISHED or an id of the hub. No PyTorch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastory.errors import InputError
from fastory.wording import shown

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
# owner/name, and for a file or folder in a repository owner/name/path
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_PATH = re.compile(rf"({HUB_ID.pattern})/(.+)")

SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
ADAPTERS = "h94/IP-Adapter"


@dataclass(frozen=True)
class Published:
    """A base checkpoint of the hub, an IP-Adapter for it, and the image encoder that this adapter was trained with."""

    model: str
    ip_adapter: str
    image_encoder: str


# The files of an adapter and their encoders, from the model card of h94/IP-Adapter: ViT-H lies in models/, ViT-bigG in
# sdxl_models/, and of SDXL's adapters the first alone was trained with ViT-bigG.
PUBLISHED: Mapping[str, Published] = {
    name: Published(model, f"{ADAPTERS}/{adapter}.safetensors", f"{ADAPTERS}/{encoder}/image_encoder")
    for name, model, adapter, encoder in (
        ("sd15", SD15, "models/ip-adapter_sd15", "models"),
        ("sd15-plus", SD15, "models/ip-adapter-plus_sd15", "models"),
        ("sdxl", SDXL, "sdxl_models/ip-adapter_sdxl", "sdxl_models"),
        ("sdxl-plus", SDXL, "sdxl_models/ip-adapter-plus_sdxl_vit-h", "models"),
    )
}


def published(model: str | Path) -> Published | None:
    """What a name of PUBLISHED stands for; None for other names, and where a folder or file of that name is here."""
    return PUBLISHED.get(str(model)) if local_path(model, "Model") is None else None


def user_path(name: str | Path, what: str) -> Path:
    """`name` with ~ as a home folder. InputError, which begins with `what`, for what can be no path."""
    try:
        path = Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # too long a name; a NUL; a user who is not there
        said = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{what} {shown(str(name))}: wanted a path, got one that cannot be used ({said})"
        ) from error
    return path


def local_path(name: str | Path, what: str) -> Path | None:
    """The path that `name` is, where something is there; else None. InputError for what can be no path."""
    path = user_path(name, what)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a loop of links, a folder that may not be entered
        raise InputError(
            f"{what} {shown(str(name))}: wanted a path, got one that cannot be used ({error.strerror})"
        ) from error
    return path


def refuse_pickle(path: Path) -> None:
    """Raises InputError with the command that converts the file, if its name is that of a pickle."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(
            f"{path} is a pickle, and reading one can run any program; only .safetensors is read. "
            f"Convert it once: fastory convert {shlex.quote(str(path))}"
        )


def local_model(model: str | Path) -> Path | None:
    """The folder or file of a model, or None for a name of PUBLISHED or a hub id. Raises InputError for anything else."""
    path = local_path(model, "Model")
    if path is None and str(model) not in PUBLISHED and not HUB_ID.fullmatch(str(model)):
        raise InputError(
            f"Model {model} does not exist: no folder, no file, and no hub id (owner/name). Names of their own have builtin, "
            f"{', '.join(PUBLISHED)}."
        )
    return path


def local_weights(name: str | Path, what: str) -> Path | tuple[str, str]:
    """A weight file that is here, or (repository, path in it). Raises InputError where it is neither."""
    path = local_path(name, what)
    if path is not None:
        refuse_pickle(path)
        return path
    match = HUB_PATH.fullmatch(str(name))
    if not match or Path(name).suffix == "":
        raise InputError(f"{what} {name} does not exist: no file, and no file of the hub (owner/name/path).")
    return match[1], match[2]


def local_encoder(name: str | Path) -> Path | tuple[str, str]:
    """An image encoder's folder that is here, or (repository, folder in it). Raises InputError where it is neither."""
    path = local_path(name, "Image encoder")
    if path is not None:
        return path
    match = HUB_PATH.fullmatch(str(name))
    repository, folder = (match[1], match[2]) if match else (str(name), "")
    if not HUB_ID.fullmatch(repository):
        raise InputError(
            f"Image encoder {name} does not exist: no folder, and no hub id (owner/name/folder)."
        )
    return repository, folder
