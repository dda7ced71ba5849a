"""A hub cache as the hub's client lays it out."""

from __future__ import annotations

from pathlib import Path

COMMIT = "0" * 40


def cached(cache: Path, repository: str) -> Path:
    """The folder of a repository's only snapshot, in the hub client's layout."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT, "utf-8")
    (root / "snapshots").mkdir()
    return root / "snapshots" / COMMIT
