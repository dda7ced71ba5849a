"""The rows of one script: each is appended to OUT/NAME.jsonl as soon as its cell has ended, so that nothing is lost.

A row is {"cell", "device", "gpu", "found" | "error" | "skipped"}. A cell that fails is an error in its row, and the next
one goes on; a cell for which the minutes do not suffice is a row that says so. What a CPU gave is a rehearsal: "gpu" is
false.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import torch


def arguments(description: str | None, minutes: float) -> argparse.ArgumentParser:
    """A parser with what every script takes. minutes: after which no further cell is begun."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="the folder of the rows")
    parser.add_argument("--minutes", type=float, default=minutes, help="no cell is begun after them")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    return parser


class Report:
    """Runs cells and writes their rows."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        """name: of the script. options: of a parser that `arguments` made."""
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit(f"{name}: --device cuda, but PyTorch sees no CUDA device; give --device cpu")
        self.file: Path = options.out / f"{name}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.minutes, self.began = options.minutes, time.monotonic()
        self.failed = self.skipped = 0
        self._append({"environment": results.environment(self.device), "minutes": self.minutes})

    @property
    def gpu(self) -> bool:
        """Whether rows are figures of a GPU; otherwise they are a rehearsal."""
        return self.device == "cuda"

    def cell(self, cell: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """One row: what `measure` found, or why it found nothing."""
        row: dict[str, Any] = {"cell": cell, "device": self.device, "gpu": self.gpu}
        if time.monotonic() - self.began >= 60 * self.minutes:
            self.skipped += 1
            self._append(row | {"skipped": f"{self.minutes:g} minutes had passed"})
            return
        began = time.monotonic()
        try:
            row["found"] = measure()
        except Exception as error:  # a cell that fails must not lose those after it
            self.failed += 1
            row["error"] = f"{type(error).__name__}: {str(error).strip()[:500]}"
            row["where"] = traceback.format_exception(error)[-2].strip()[:300]
        row["took_s"] = round(time.monotonic() - began, 2)
        self._append(row)
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def close(self) -> int:
        """Says how many cells were skipped or failed; the exit code is 1 where one failed."""
        kind = "figures of a GPU" if self.gpu else "a rehearsal on a CPU, no figure of a GPU"
        print(f"{self.file}: {kind}; {self.failed} failed, {self.skipped} skipped", flush=True)
        return 1 if self.failed else 0

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
