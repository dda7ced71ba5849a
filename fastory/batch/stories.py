"""Which stories a batch is of: files, folders and JSONL read, each with a name, and all that cannot be used listed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastory.errors import InputError
from fastory.files import check_names_fit
from fastory.story import Story
from fastory.story.bulk import each_story
from fastory.story.self_contained import with_pictures_inside
from fastory.wording import counted


@dataclass(frozen=True)
class BatchStory:
    """A story of a batch. name: of its run folder; source: as the user knows it, a file or a line of one."""

    name: str
    story: Story
    source: str


def read_stories(
    names: Sequence[str], examples: Mapping[str, Path], check: Callable[[Story], object]
) -> list[BatchStory]:
    """The stories of files, folders and JSONL, in this order. examples: bundled stories by name.

    check: raises InputError for a story whose settings cannot be used. Raises InputError that names every story which cannot
    be used, a line each.
    """
    check_names_fit([Path(name) for name in names])
    found: dict[str, BatchStory] = {}
    wrong: list[str] = []
    for source, read in _sources(names, examples):
        try:
            if isinstance(read, InputError):
                raise read
            story = with_pictures_inside(read)
            check(story)
            name = _name_of(story)
            if name in found:
                raise InputError(f"{source} is the same story as {found[name].source}: give it once.")
            found[name] = BatchStory(name, story, source)
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError(_listed(wrong, len(wrong) + len(found)))
    if not found:
        raise InputError("no story was given; wanted story files, folders of them, or .jsonl files")
    return list(found.values())


def refused(wrong: Mapping[str, str], stories: Mapping[str, BatchStory]) -> InputError:
    """The error for stories that the model cannot draw. wrong: what is the matter, by name."""
    return InputError(
        _listed([f"{stories[name].source}: {said}" for name, said in wrong.items()], len(stories))
    )


def _listed(wrong: Sequence[str], count: int) -> str:
    if count == 1:
        return wrong[0]
    return "\n  ".join(
        [f"{len(wrong)} of {counted(count, 'story')} cannot be drawn, and nothing was:", *wrong]
    )


def _sources(names: Sequence[str], examples: Mapping[str, Path]) -> Iterator[tuple[str, Story | InputError]]:
    """Each story by its source, or what is wrong with it."""
    for name in names:
        is_example = name in examples and not Path(name).exists()
        yield from each_story(examples[name] if is_example else Path(name))


def _name_of(story: Story) -> str:
    """The slug and what tells the story from others of its title: the same whatever else the batch has."""
    said = [story.digest(), dict(story.settings)]
    return f"{story.slug}-{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]}"
