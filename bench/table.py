"""Results as a table: `python bench/table.py bench/results/FILE.json [--short]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def _time(times: dict[str, float]) -> str:
    return f"{times['p50']:.4g} ({times['p20']:.4g}-{times['p80']:.4g})"


def _cells(row: dict[str, Any]) -> list[str]:
    times = row["times"].get("cold") or row["times"]["hot"]
    best, errors = row["best_peer"], row["errors"]
    layer = "" if "layer_ratio" not in row else f"{row['layer_ratio']:.2f}"
    floor = f"{100 * row['of_floor']:.0f} %" if "of_floor" in row else ""
    error = (
        f"{errors['fastory']:.1e} / {errors[best]:.1e}" if best in errors else f"{errors['fastory']:.1e} /"
    )
    return [
        row["cell"]["name"], _time(times["fastory"]), f"{best}: {_time(times[best])}", f"{row['ratio']:.2f}",
        layer, floor, error,
    ]  # fmt: skip


def render(results: dict[str, Any]) -> str:
    """A Markdown table of measured rows, the environment above it and the absent peers below."""
    head = [
        "cell",
        "fastory, us (p20-p80)",
        "best peer, us",
        "peer / fastory",
        "diffusers layer / fastory layer",
    ]
    head += ["of the floor", "largest error, ours / peer's"]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    lines += [" | ".join(_cells(row)) for row in results["rows"]]
    absent = {name: why for row in results["rows"] for name, why in row["absent"].items()}
    below = [f"* not measured here: {name}: {why}" for name, why in sorted(absent.items())]
    above = [
        f"{name}: {value}" for name, value in results.get("environment", {}).items() if value is not None
    ]
    above += [f"note: {results['note']}"] if "note" in results else []
    return "\n".join([", ".join(above), "", *(f"| {line} |" for line in lines), "", *below]).strip()


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text())))
