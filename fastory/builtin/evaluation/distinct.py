"""Whether two characters of a story look like themselves and not like each other.

Agreement is the share of pairs of pictures that show the same value of an attribute: pairs of one character's appearances
within, one of either character across. Characters of one look have as much across as within; independent characters with
looks of their own have one over the number of values across (colour 1/6, hat and scarf 1/4) where all values are equally
likely; what a model draws more often is shared more often, without anybody's taking it over, and characters of different
stories tell how often. No story is left out.
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


def chance_of_modal_share(counts: Sequence[int], options: int) -> float:
    """The expected modal share of frames drawn independently and uniformly, mean over characters with these counts."""
    rng = np.random.default_rng(0)
    return float(np.mean([modal_share(rng.integers(0, options, n)) for n in counts for _ in range(400)]))


def pairwise_share(values: np.ndarray) -> float:
    """The share of pairs that are equal; chance is one over the number of values when they are equally likely."""
    pairs = [(a, b) for i, a in enumerate(values) for b in values[:i]]
    return float(np.mean([a == b for a, b in pairs])) if pairs else 1.0


def same_mode(first: np.ndarray, second: np.ndarray) -> float:
    """The probability that two characters have one most frequent value, where each draws its own among equals."""
    options = int(max(first.max(), second.max())) + 1
    return float(modes(first, options) @ modes(second, options))


def modes(values: np.ndarray, options: int) -> np.ndarray:
    """The probability of each of so many options to be drawn among the most frequent values, (options,)."""
    counts = np.bincount(values, minlength=options)
    return (counts == counts.max()) / (counts == counts.max()).sum()


def strangers_alike(stories: Sequence[Judged]) -> dict[str, float]:
    """The probability that two characters of different stories have one most frequent value, by attribute.

    What independent characters of this model share, however often it draws which look. stories: of at least two.
    """
    found: dict[str, float] = {}
    for name, options in FREE.items():
        looks = [[modes(values, len(options)) for values in story.shown(name)] for story in stories]
        sums = np.array([np.sum(story, 0) for story in looks])
        counts = np.array([len(story) for story in looks])
        alike = (sums.sum(0) ** 2).sum() - (sums**2).sum()
        found[name] = float(alike / (counts.sum() ** 2 - (counts**2).sum()))
    return found


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


def shares_of_one_look(rows: Sequence[dict[str, float]], stories: Sequence[Judged] = ()) -> str:
    """A line on how many stories end with both characters alike, beside independent characters.

    stories: those of the rows; from two on, their strangers_alike stands there, too.
    """
    of_two = [row for row in rows if "distinct" in row]
    strangers = strangers_alike(stories) if len(stories) > 1 else None
    if not of_two:
        return "no story of two characters"
    beside = {
        name: f"{chance:.3f}" + (f", {strangers[name]:.3f}" if strangers else "")
        for name, chance in CHANCE.items()
    }
    ends = [f"{n} {np.mean([row[f'one {n}'] for row in of_two]):.3f} ({beside[n]})" for n in FREE]
    other = ", characters of different stories" if strangers else ""
    distinct = np.mean([row["distinct"] for row in of_two])
    return (
        f"{len(of_two)} stories of two characters; both end with one (independent characters{other}): {', '.join(ends)}; "
        f"distinct {distinct:.3f} ({distinct_of_own_looks():.3f})"
    )
