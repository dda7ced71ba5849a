"""What the API takes and answers, as schemas: the OpenAPI document is made of them, and every body is checked by them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastory.story.schema import MAX_FRAMES, MAX_SEED, Fraction, Text

FrameNumber = Annotated[int, Field(ge=0, lt=MAX_FRAMES)]
PictureName = Annotated[str, Field(min_length=1, max_length=400)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
State = Literal["draft", "queued", "drawing", "paused", "finished"]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class NewStory(_Strict):
    """story: as a story file says it; a draft may still be unfinished. draw: put it into the queue at once."""

    story: dict[str, Any]
    draw: bool = False


class StoryText(_Strict):
    """story: as a story file says it."""

    story: dict[str, Any]


class Given(_Strict):
    """Pictures of a drawn story by their names, as an upload answered or the story says them.

    references: all of a character's; who is left out keeps what is there. first_frame: None keeps what is there.
    """

    references: dict[Text, Annotated[list[PictureName], Field(max_length=100)]] = {}
    first_frame: PictureName | None = None


class Changes(_Strict):
    """name: that the list shows, the story's title is part of the run. locked: frames that are never redrawn.

    pictures: what is drawn next goes by these; {} for those that the story has.
    """

    name: Text | None = None
    locked: Annotated[list[FrameNumber], Field(max_length=MAX_FRAMES)] | None = None
    pictures: Given | None = None


class Draw(_Strict):
    """give_up_redraw: a redraw that is not finished is forgotten, and the run is as it was."""

    give_up_redraw: bool = False


class FrameChange(_Strict):
    """What a frame is to say from now on; what is left out stays. boxes: of characters, in fractions of the picture."""

    frame: FrameNumber
    caption: Text | None = None
    seed: Seed | None = None
    boxes: dict[Text, Annotated[list[Fraction], Field(min_length=4, max_length=4)]] | None = None


class Redraw(_Strict):
    """frames: the only ones that change. seed: for the noise of all of them, another take."""

    frames: Annotated[list[FrameChange], Field(min_length=1, max_length=MAX_FRAMES)]
    seed: Seed | None = None


class Append(_Strict):
    """captions: of frames that come after the last one, drawn against the rest."""

    captions: Annotated[list[Text], Field(min_length=1, max_length=MAX_FRAMES)]


class TakeBack(_Strict):
    """number: of a redraw in the story's history, such as 001."""

    number: Annotated[str, Field(pattern=r"^[0-9]{3,6}$")]


class Failure(BaseModel):
    """What is wrong, in the words of the command line, and the code it would end with."""

    error: str
    exit_code: int


class Checked(BaseModel):
    """error: the first that makes a story file unusable. notices: what will not come out as it says; drawing is possible."""

    error: str | None
    notices: list[str]


class Created(BaseModel):
    """The id of a new story."""

    id: str


class Uploaded(BaseModel):
    """name: what `references:` or `first_frame:` of the story has to say."""

    name: str


class DrawnFrom(BaseModel):
    """What a picture was drawn from, as its PNG chunks say. values: prompt, seed and what its mode adds, such as the scale."""

    values: dict[str, Any]
    parameters: str


class Pace(BaseModel):
    """How far drawing is. seconds_left: None before the first step."""

    round: int
    rounds: int
    step: int
    steps: int
    finished: int
    total: int
    seconds_left: float | None


class NextPictures(BaseModel):
    """Pictures that what is drawn next goes by. frames: in which they count."""

    references: dict[str, list[str]]
    first_frame: str | None
    frames: list[int]


class Summary(BaseModel):
    """A story in the list. newest: [round, frame, first hex digits of its file's hash] of a picture to show, or None."""

    id: str
    name: str
    state: State
    frames: int
    disk_bytes: int
    newest: tuple[int, int, str] | None
    progress: Pace | None
    error: str | None


class Shown(Summary):
    """All that is known of a story.

    story: as its file says it. settings: as they are drawn with, of a run. pictures: a mapping a round, of frames to the first
    hex digits of their file's hash; redrawn: the same for pictures of a redraw that is not finished. history: frames of each
    redraw that replaced pictures, by its number; appended_by: frames that are there since it; undoable: redraws that can be
    taken back.
    redraw: what frames are to say after the redraw that is under way; appended: captions that it adds.
    takes: what can be taken along now, names for /take. reads: of `references`, `first_frame`, `boxes`, what the run does;
    next_pictures: given since; recast: frames of a finished story that were drawn with other pictures than it has now.
    """

    story: dict[str, Any]
    settings: dict[str, Any] | None
    pictures: list[dict[str, str]]
    redrawn: dict[str, dict[str, str]]
    history: dict[str, list[str]]
    appended_by: dict[str, list[int]]
    undoable: list[str]
    locked: list[int]
    redraw: dict[str, Any] | None
    appended: list[str]
    takes: list[str]
    reads: list[str]
    next_pictures: NextPictures | None
    recast: list[int]
    width: int | None
    height: int | None
