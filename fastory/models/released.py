"""What stands where a part of a model was that `release` let go."""

from __future__ import annotations

from typing import Any

from fastory.errors import InputError


class Released:
    """Says so whenever it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, part: str) -> Any:
        raise InputError(f"the model {self._name} was released; wanted one that StoryModel opened since")
