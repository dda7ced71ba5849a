"""A story that is being written, checked as the command line checks it; and what the built-in model does not know."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastory import door
from fastory.errors import InputError
from fastory.story import MAX_BYTES, Story

NAME = "story.json"


def check_story(data: Mapping[str, Any], draft: Path | None = None) -> Story:
    """The story. Raises InputError as for a story file; draft: the folder of its pictures, which are not looked at without."""
    said = dict(data)
    if draft is None:
        said = _without_pictures(said)
    text = json.dumps(said, ensure_ascii=False, indent=1)
    if len(text.encode()) > MAX_BYTES:
        raise InputError(f"the story: wanted at most {MAX_BYTES // 1024} KiB, got more: split it")
    if draft is not None:
        return _checked(draft / NAME)
    with tempfile.TemporaryDirectory(prefix="fastory-check-") as folder:
        file = Path(folder) / NAME
        file.write_text(text, encoding="utf-8")
        try:
            return _checked(file)
        except InputError as error:
            raise InputError(str(error).replace(str(file), "story")) from None


def _checked(file: Path) -> Story:
    story = Story.read(file)
    door.check_stories([story], None)
    return story


def _without_pictures(said: dict[str, Any]) -> dict[str, Any]:
    """The same without the names of pictures, which are checked where the draft is drawn."""
    said.pop("first_frame", None)
    said.pop("initial_pictures", None)
    if isinstance(said.get("frames"), list):
        said["frames"] = [
            {key: value for key, value in frame.items() if key != "masks"}
            if isinstance(frame, dict)
            else frame
            for frame in said["frames"]
        ]
    characters = said.get("characters")
    if isinstance(characters, dict):
        said["characters"] = {
            name: {key: value for key, value in entry.items() if key != "references"}
            if isinstance(entry, dict)
            else entry
            for name, entry in characters.items()
        }
    return said


@cache
def _shipped_tokenizer() -> Any:
    """The built-in model's, of `tokenizers` alone: no PyTorch is imported for it."""
    from tokenizers import Tokenizer

    from fastory.builtin import WEIGHTS

    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class _Words:
    """What fastory.builtin.words asks of a tokenizer."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        tokens: list[str] = _shipped_tokenizer().encode(text, add_special_tokens=False).tokens
        return tokens


def notices_of(story: Story, model: str) -> list[str]:
    """Words that the built-in model does not know, and captions that it cuts off; nothing of another model's."""
    if model != "builtin":
        return []
    from fastory.builtin.words import look_notice, notice_of, unknown_words

    prompts = [story.prompt(i) for i in range(len(story.frames))]
    names = {character.name: "" for character in story.characters}
    tokenizer: Any = _Words()
    found = []
    if unknown := unknown_words(" ".join(prompts), names, tokenizer=tokenizer):
        found.append(notice_of(unknown))
    if undrawn := look_notice(" ".join(prompts), names, tokenizer=tokenizer):
        found.append(undrawn)
    limit = _longest()
    for i, prompt in enumerate(prompts):
        count = len(_shipped_tokenizer().encode(prompt).tokens)
        if count > limit:
            found.append(
                f"frame {i}: the text encoder reads {limit} tokens, and this caption has {count}; the end is not drawn"
            )
    return found


@cache
def _longest() -> int:
    """Tokens that the built-in model's text encoder reads, both ends counted."""
    from fastory.builtin import WEIGHTS

    read = json.loads((WEIGHTS / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    return int(read["model_max_length"])
