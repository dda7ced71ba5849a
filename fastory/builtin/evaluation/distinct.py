"""Whether two characters of a story look like themselves and not like each other.

Agreement is the share of pairs of pictures that show the same value of an attribute: pairs of one character's appearances
within, one of either character across. Characters of one look have as much across as within; independent characters with
looks of their own have one over the number of values across (colour 1/6, hat and scarf 1/4). No story is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastory.builtin.world.drawing import COLOURS, HATS, SCARVES

if TYPE_CHECKING:
    from fastory.builtin.evaluation.iterative import Judged

FREE = {"colour": COLOURS, "hat": HATS, "scarf": SCARVES}
CHANCE = {name: 1 / len(options) for name, options in FREE.items()}
"""The share of independent characters that have the same colour, hat or scarf."""


def modal_share(values: np.ndarray) -> float:
    """The share of the most frequent value."""
    return float(np.bincount(values).max() / len(values))


def pairwise_share(values: np.ndarray) -> float:
    """The share of pairs that are equal; chance is one over the number of values when they are equally likely."""
    pairs = [(a, b) for i, a in enumerate(values) for b in values[:i]]
    return float(np.mean([a == b for a, b in pairs])) if pairs else 1.0


def same_mode(first: np.ndarray, second: np.ndarray) -> float:
    """The probability that two characters have one most frequent value, where each draws its own among equals."""
    modes = [np.flatnonzero(np.bincount(values) == np.bincount(values).max()) for values in (first, second)]
    return len(np.intersect1d(modes[0], modes[1])) / (len(modes[0]) * len(modes[1]))


def distinct_scores(judged: Judged) -> dict[str, float]:
    """Of one story's and round's pictures; nothing for a story with one character.

    `colour within`, `colour across`: agreements; `one colour`: whether both have the same most frequent value; so for
    hat and scarf. `distinct`: within less across, mean over the three attributes, 0 for two characters of one look.

    Raises ValueError for a character that no frame shows: across is not defined then, and no story may be left out.
    """
    if len(judged.story.tale.cast) != 2:
        return {}
    found: dict[str, float] = {}
    differences = []
    for name in FREE:
        first, second = shown = judged.shown(name)
        if not all(len(values) for values in shown):
            raise ValueError(f"a character of the story with seed {judged.story.seed} is in no frame")
        within = float(np.mean([pairwise_share(values) for values in shown]))
        across = float(np.mean(first[:, None] == second))
        found |= {f"{name} within": within, f"{name} across": across, f"one {name}": same_mode(first, second)}
        differences.append(within - across)
    return {"distinct": float(np.mean(differences)), **found}


def distinct_of_own_looks() -> float:
    """`distinct` of independent characters that never change: what a perfect model has over many stories, 0.778."""
    return float(np.mean([1 - chance for chance in CHANCE.values()]))


def shares_of_one_look(rows: Sequence[dict[str, float]]) -> str:
    """A line on how many stories end with both characters alike, beside independent characters."""
    stories = [row for row in rows if "distinct" in row]
    if not stories:
        return "no story of two characters"
    ends = [f"{n} {np.mean([row[f'one {n}'] for row in stories]):.3f} ({CHANCE[n]:.3f})" for n in FREE]
    distinct = np.mean([row["distinct"] for row in stories])
    return (
        f"{len(stories)} stories of two characters; both end with one (independent characters): {', '.join(ends)}; "
        f"distinct {distinct:.3f} ({distinct_of_own_looks():.3f})"
    )
