"""Stories: what one says, in which files, and what is wrong with a file that cannot be used."""

from fastory.story.bulk import read_stories
from fastory.story.files import MAX_BYTES, STORY_FILES
from fastory.story.frame import Character, Frame
from fastory.story.schema import MAX_FRAMES, MAX_NAME, STYLES
from fastory.story.story import Story, are_captions

__all__ = [
    "MAX_BYTES",
    "MAX_FRAMES",
    "MAX_NAME",
    "STORY_FILES",
    "STYLES",
    "Character",
    "Frame",
    "Story",
    "are_captions",
    "read_stories",
]
