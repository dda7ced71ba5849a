"""Pictures that others made: files of six formats, of bounded size, from regular files alone; and such in memory."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageEnhance, UnidentifiedImageError

from fastory.errors import InputError

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's EPS reader would start Ghostscript
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
WANTED = f"wanted a picture ({', '.join(PICTURE_FORMATS)})"


@dataclass(frozen=True)
class MemoryPicture:
    """A picture that a program gave in memory. data: the file that a run folder keeps of it.

    That is a BMP in 8-bit RGB: its bytes, and so the hash of a story with it, are the same whatever Pillow wrote it.
    """

    data: bytes = field(repr=False)

    @classmethod
    def of(cls, image: Image.Image) -> MemoryPicture:
        """The picture as it is now; an alpha channel is left off."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "BMP")
        return cls(buffer.getvalue())

    @cached_property
    def sha256(self) -> str:
        """Of the file, in hex."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def name(self) -> str:
        """Where it lies in a run folder."""
        return f"inputs/{self.sha256[:16]}.bmp"


Picture = Path | MemoryPicture


def noise_picture() -> MemoryPicture:
    """Uniform noise of a fixed seed, 256 x 256: a reference that shows nothing."""
    import numpy as np  # heavy: commands are refused before it is needed

    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    return MemoryPicture.of(Image.fromarray(pixels))


def as_picture(picture: object) -> Picture:
    """A path, made absolute, or what is in memory. Raises InputError for anything else."""
    if isinstance(picture, MemoryPicture):
        return picture
    if isinstance(picture, Image.Image):
        return MemoryPicture.of(picture)
    if isinstance(picture, str | Path):
        return Path(picture).absolute()
    raise InputError(f"a picture: wanted a path or a PIL picture, got a {type(picture).__name__}")


def as_pictures(pictures: object) -> tuple[Picture, ...]:
    """A picture, or some. Raises InputError for what is neither."""
    if isinstance(pictures, str | Path | MemoryPicture | Image.Image):
        return (as_picture(pictures),)
    if not isinstance(pictures, Iterable):
        raise InputError(f"pictures: wanted paths or PIL pictures, got a {type(pictures).__name__}")
    return tuple(as_picture(picture) for picture in pictures)


def pictures_at(path: Path) -> list[Path]:
    """A picture, or those of a folder in the order of their names. Raises InputError, naming what is none of them."""
    listed = [path]
    if path.is_dir():
        listed = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not listed:
            raise InputError(f"{path}: {WANTED} or a folder of some, got a folder without any")
    for file in listed:
        check_picture(file)
    return listed


def pictures_or_noise(path: Path) -> list[Picture]:
    """Those at a path; one of noise alone for the word `noise`, where no file is called so. Raises as pictures_at."""
    return [noise_picture()] if str(path) == "noise" and not path.exists() else [*pictures_at(path)]


def open_picture(picture: str | Picture) -> Image.Image:
    """A picture as 8-bit RGB. Raises InputError, in one line that names the file, where it is none."""
    if isinstance(picture, MemoryPicture):
        with Image.open(io.BytesIO(picture.data), formats=("BMP",)) as image:
            return image.convert("RGB")
    with _whole(picture), _decoder(picture) as image:
        return image.convert("RGB")


def check_picture(path: str | Path, shown: str | None = None) -> None:
    """InputError where `open_picture` would raise it, or a checksum inside the file is wrong. shown: the file's name."""
    with _whole(path if shown is None else shown):
        with _decoder(path) as image:
            image.verify()
        with _decoder(path) as image:  # verify leaves the image unusable
            image.load()


@contextmanager
def _decoder(path: str | Path) -> Iterator[Image.Image]:
    with _regular_file(path) as file:
        head = file.read(4)
        if head[:1] == b"\x80" or head == b"PK\x03\x04":  # pickle protocol 2 and later; torch.save's zip
            raise _Unusable("a pickle or an archive, which is never opened: save the picture as PNG")
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=PICTURE_FORMATS) as image:
                yield image


def _regular_file(path: str | Path) -> BinaryIO:
    """An open file. A pipe is refused rather than waited for, also where it takes the file's place just now."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise _Unusable("a folder" if stat.S_ISDIR(mode) else "a pipe or a device")


class _Unusable(Exception):
    """Why a file is no picture, in words that follow "got"."""


@contextmanager
def _whole(path: str | Path) -> Iterator[None]:
    shown = str(path) if len(str(path)) <= 300 else f"{str(path)[:60]}..."
    try:
        yield
    except _Unusable as error:
        raise InputError(f"{shown}: {WANTED}, got {error}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(
            f"{shown}: {WANTED}, got one of more than {Image.MAX_IMAGE_PIXELS} pixels: make it smaller"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{shown}: {WANTED}, got something that cannot be read as one") from error
    except FileNotFoundError as error:
        raise InputError(f"{shown}: {WANTED}, got no such file: check the path") from error
    except MemoryError:
        raise
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
    except Exception as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        one_line = " ".join(str(said).split())[:200]
        raise InputError(f"{shown}: {WANTED}, got one that cannot be read ({one_line})") from error


def saturated(image: Image.Image, factor: float) -> Image.Image:
    """An 8-bit RGB picture with its colours `factor` times as far from gray of the same luma; 1 is the picture itself."""
    return image if factor == 1 else ImageEnhance.Color(image).enhance(factor)
