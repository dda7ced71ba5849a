"""batch.json: which stories a folder is of, how they are drawn, and which are done, failed or left.

What is drawn stands in the run folders. This file saves opening those that are finished, and says what failed and why; it is
written at most once a second, so that the state of a story may be older than its run folder, never newer.

With a store (batch/store.py) the folder is a working one: the store has batch.json and the finished run folders, and what it
has is not kept here.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastory import files
from fastory.batch.store import Store
from fastory.batch.stories import BatchStory
from fastory.documents import read_json, validated
from fastory.errors import FastoryError, InputError
from fastory.runs import manifest
from fastory.wording import last_words, shown

SCHEMA = 1
NAME = "batch.json"
WHAT = "what `fastory batch` says of its stories"
TODO = "choose another --output"
MOST_BYTES = 2**30  # about 250 bytes a story
BETWEEN_WRITES = 1.0  # seconds
PATIENCE = 10.0  # seconds for the workers of a command that was killed to end, which they do when it is gone


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    source: str
    state: Literal["left", "done", "failed"] = "left"
    reason: str | None = None
    manifest: str | None = None  # sha256 of the finished run's
    seconds: Annotated[float, Field(ge=0)] | None = None
    device: str | None = None


class _Batch(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    schema_: Annotated[int, Field(alias="schema", ge=1)]
    options: dict[str, Any]
    models: dict[str, str] = {}
    stories: dict[str, _Record]


class BatchFolder:
    """The folder of a batch, locked. options: what decides the pictures, as the command line has it, plain values."""

    def __init__(
        self,
        path: Path,
        stories: Sequence[BatchStory],
        options: Mapping[str, Any],
        store: Store | None = None,
    ) -> None:
        """Lock the folder, made if needed, and take the stories up. store: gets what is finished, and says what is.

        Raises InputError for a folder that holds anything but a batch, one of other options, and where nothing can be
        written; FastoryError where another process draws into it.
        """
        self.path, self._store = path, store
        self._delivered: dict[str, str] | None = None  # the manifests in the store, by story
        self._unsaid: list[str] = []  # delivered, and the store's batch.json does not say so yet
        self._drop: list[str] = []  # delivered, and not yet removed here
        self.names = [story.name for story in stories]
        self._written = 0.0
        self._anew = False  # whether the store knows nothing of this batch, whatever is here
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; wanted a new or empty folder for --output")
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        files.folder_for(path, TODO)
        try:
            self._refuse_strangers()
            self._lock = files.lock_folder(path, "draws a batch into", TODO)
        except BaseException:
            for folder in made:
                files.remove_empty(folder)
            raise
        try:
            if store is not None:
                self._take_from(store)
            self._read(options)
            self.models: dict[str, str] = self._batch["models"]
            for story in stories:
                self._batch["stories"].setdefault(story.name, {"source": story.source, "state": "left"})
                self._forget_failure(story.name)
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Write the file. InputError where a store takes nothing."""
        try:
            self.save(at_once=True)
        except FastoryError as error:
            if self._store is None:
                raise
            raise InputError(
                f"{self._store.url} cannot be written ({last_words(error.__cause__ or error)}); {TODO}"
            ) from error

    def _take_from(self, store: Store) -> None:
        """The file as the store has it, whatever is here. InputError where the store's folder is no batch's."""
        data = store.read(NAME)
        if data is not None:
            files.atomic_write(self.path / NAME, data)
            return
        self._anew = True
        if strange := store.first_name():
            raise InputError(
                f"{store.url} is not the folder of a batch: it holds {strange!r} and no {NAME} of ours; wanted a new or empty "
                "folder for --output"
            )

    def _refuse_strangers(self) -> None:
        if (self.path / NAME).exists():
            return
        own = (files.LOCK, files.partial_of(self.path / NAME).name)
        strange = sorted(entry.name for entry in self.path.iterdir() if entry.name not in own)
        if strange:
            raise InputError(
                f"{self.path} is not the folder of a batch: it holds {strange[0]!r} and no {NAME} of ours; wanted a new or "
                "empty folder for --output"
            )

    def _read(self, options: Mapping[str, Any]) -> None:
        plain = json.loads(json.dumps(options, default=str))
        file = self.path / NAME
        if self._anew or not file.exists():
            self._batch: dict[str, Any] = {"schema": SCHEMA, "options": plain, "models": {}, "stories": {}}
            return
        data = read_json(file, what=WHAT, most=MOST_BYTES, todo=TODO)
        schema = data.get("schema") if isinstance(data, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise InputError(
                f"{file} has schema {schema}; this version reads up to {SCHEMA}: use a newer fastory, or another --output"
            )
        validated(_Batch, data, file, what=WHAT, todo=TODO)
        there = data["options"]
        differ = [
            f"--{name.replace('_', '-')}: {shown(there.get(name))} there, {shown(plain.get(name))} here"
            for name in sorted({*there, *plain})
            if there.get(name) != plain.get(name)
        ]
        if differ:
            raise InputError(
                f"{self.path} holds a batch of other options. What differs: {'; '.join(differ)}. {TODO.capitalize()}."
            )
        self._batch = {"models": {}, **data}

    def _forget_failure(self, name: str) -> None:
        record = self._batch["stories"][name]
        if record["state"] == "failed":
            self._batch["stories"][name] = {"source": record["source"], "state": "left"}

    def wait_for_others(self) -> None:
        """Until no process draws into a story that is left. Raises FastoryError where one goes on doing so."""
        until = time.monotonic() + PATIENCE
        for name in self.left():
            while True:
                try:
                    files.check_unlocked(self.run(name), "draws into", "choose another --output")
                    break
                except FastoryError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.05)

    def run(self, name: str) -> Path:
        """The run folder of a story."""
        return self.path / name

    def shown(self, name: str = "") -> Path | str:
        """Where the user finds a story's run folder; without a name, all of them."""
        if self._store is None:
            return self.run(name)
        return self._store.named(name) if name else self._store.url

    def left(self) -> list[str]:
        """Stories of this command that are not done, in its order. A run folder that changed since is looked at again."""
        if self._store is not None and self._delivered is None:
            done = [name for name in self.names if self._batch["stories"][name]["state"] == "done"]
            self._delivered = self._store.manifests(done)
        return [name for name in self.names if not self._is_done(name)]

    def _is_done(self, name: str) -> bool:
        record, file = self._batch["stories"][name], self.run(name) / manifest.NAME
        if record["state"] != "done":
            return False
        if self._delivered is not None:
            return self._delivered.get(name) == record["manifest"]
        return file.is_file() and files.sha256_of(file) == record["manifest"]

    def settle(self, name: str, **said: Any) -> None:
        """Write down how a story ended: state, and reason or seconds and device. What is done is delivered first."""
        record = {"source": self._batch["stories"][name]["source"], **said}
        if record["state"] == "done":
            record["manifest"] = files.sha256_of(self.run(name) / manifest.NAME)
            if self._store is not None and self._delivered is not None:
                self._store.deliver(self.run(name), name)
                self._delivered[name] = record["manifest"]
                self._unsaid.append(name)
        self._batch["stories"][name] = record
        self.save()

    def begin_with(self, models: Mapping[str, str]) -> None:
        """Note the weights that draw. Raises InputError where the batch began with others."""
        if self.models and self.models != models:
            raise InputError(
                f"{self.path} was begun with other weights of the model, its adapter or its LoRAs; wanted the same for all "
                f"its stories, or {TODO}"
            )
        self.models.update(models)

    def save(self, *, at_once: bool = False) -> None:
        """Write batch.json, now or where the last time is a second ago."""
        if at_once or time.monotonic() - self._written >= BETWEEN_WRITES:
            self._written = time.monotonic()
            data = json.dumps(self._batch, ensure_ascii=False, indent=1, sort_keys=True).encode()
            files.atomic_write(self.path / NAME, data)
            if self._store is not None:
                self._store.write({NAME: data}, self.path)
                self._drop, self._unsaid = [*self._drop, *self._unsaid], []
                self._drop = [name for name in self._drop if not self._dropped(name)]

    def _dropped(self, name: str) -> bool:
        """Remove a run folder that the store has. False where the worker that drew it still holds it."""
        path = self.run(name)
        with contextlib.suppress(FastoryError, OSError):
            with files.locked_folder(path, "draws into", TODO):
                listed = manifest.listed_files(manifest.read_manifest(path / manifest.NAME))
                for file in (*listed, manifest.NAME, files.LOCK):
                    files.remove(path / file)
            for folder in sorted((f for f in path.rglob("*") if f.is_dir()), key=lambda f: -len(f.parts)):
                files.remove_empty(folder)
            files.remove_empty(path)
            return True
        return False

    def close(self) -> None:
        """Release the lock."""
        self._drop = [name for name in self._drop if not self._dropped(name)]
        self._lock.release()
