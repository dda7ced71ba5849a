"""--output as the URL of a store of objects (s3, gs, ..): run folders are drawn here and delivered whole, through fsspec.

Every file is an object of its own, which a store shows whole or not at all, and a story's manifest.json is the last of them:
what has no manifest there is no run. What is not delivered yet lies in a folder of this machine's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastory import packages
from fastory.errors import FastoryError, InputError
from fastory.files import cache_folder
from fastory.runs import manifest
from fastory.wording import last_words

SENT_AT_ONCE = 2**26  # bytes of pictures that are held in memory
LOCAL = ("file", "local")
EXTRAS = {"s3": ("s3", "s3fs"), "s3a": ("s3", "s3fs"), "gs": ("gs", "gcsfs"), "gcs": ("gs", "gcsfs")}


def path_or_url(output: str) -> Path | str:
    """What --output means: a folder of this machine, or the URL of a store."""
    protocol, colon, rest = output.partition("://")
    if not colon:
        return Path(output)
    if protocol in LOCAL:
        if not rest.startswith("/"):
            raise InputError(f"--output {output}: wanted {protocol}:///, a whole path behind it")
        return Path(rest)
    return f"{protocol}://{rest.rstrip('/')}"


class Store:
    """The folder of a batch in a store."""

    def __init__(self, url: str) -> None:
        """Raises InputError for a protocol that nothing here speaks, and for a URL that names no folder."""
        self.url = url
        protocol = url.partition("://")[0]
        if protocol in EXTRAS:
            packages.require(f"--output {protocol}://", *EXTRAS[protocol])
        import fsspec

        try:
            self._files, self._root = fsspec.url_to_fs(url)
        except (
            Exception
        ) as error:  # ValueError for the protocol, ImportError for its package, or what the package raises
            raise InputError(
                f"--output {url}: wanted a folder, or a URL that fsspec opens, such as s3:// or gs:// ({last_words(error)})"
            ) from error
        if not self._root.strip("/"):
            raise InputError(f"--output {url}: wanted a folder behind {protocol}://")

    def working_folder(self, options: Mapping[str, Any]) -> Path:
        """Where a batch of these options is drawn, before it is delivered."""
        said = json.dumps([self.url, options], sort_keys=True, default=str)
        return cache_folder() / "batches" / hashlib.sha256(said.encode()).hexdigest()[:16]

    def named(self, name: str) -> str:
        """The URL of a file or run folder."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes | None:
        """A file; None where there is none. Raises InputError where the store cannot be read."""
        with self._asked(name):
            try:
                return bytes(self._files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def first_name(self) -> str | None:
        """A name in the folder; None where it holds nothing. Raises InputError where the store cannot be read."""
        with self._asked(""):
            try:
                names = sorted(str(name) for name in self._files.ls(self._root, detail=False))
            except FileNotFoundError:
                return None
            inside = [
                name.rstrip("/").rpartition("/")[2]
                for name in names
                if name.strip("/") != self._root.strip("/")
            ]
            return inside[0] if inside else None

    def manifests(self, stories: Sequence[str]) -> dict[str, str]:
        """sha256 of the manifest of every story that is there. Raises InputError where the store cannot be read."""
        paths = {self._path(f"{name}/{manifest.NAME}"): name for name in stories}
        if not paths:
            return {}
        with self._asked(""):
            found = self._files.cat(list(paths), on_error="return")
            if not isinstance(found, dict):  # of a single path
                found = dict.fromkeys(paths, found)
            for data in found.values():
                if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                    raise data
        return {
            name: hashlib.sha256(found[path]).hexdigest()
            for path, name in paths.items()
            if isinstance(found.get(path), bytes)
        }

    def write(self, files: Mapping[str, bytes], kept: Path) -> None:
        """Write files. Raises FastoryError where that fails. kept: where they are on this machine."""
        try:
            self._files.pipe({self._path(name): data for name, data in files.items()})
        except Exception as error:  # whatever its package raises: OSError, botocore's, gcsfs's, aiohttp's
            raise FastoryError(
                f"{self.url} could not be written ({last_words(error)}). What is not there yet is kept in {kept}; the same "
                "command goes on."
            ) from error

    def deliver(self, run: Path, name: str) -> None:
        """Write a finished run folder, its manifest last. Raises FastoryError where that fails."""
        held: dict[str, bytes] = {}
        for file in manifest.listed_files(manifest.read_manifest(run / manifest.NAME)):
            if (run / file).is_file():
                held[f"{name}/{file}"] = (run / file).read_bytes()
            if sum(map(len, held.values())) >= SENT_AT_ONCE:
                self.write(held, run)
                held = {}
        self.write(held, run)
        self.write({f"{name}/{manifest.NAME}": (run / manifest.NAME).read_bytes()}, run)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextlib.contextmanager
    def _asked(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as in write()
            raise InputError(f"--output: {self.named(name)} cannot be read ({last_words(error)})") from error
