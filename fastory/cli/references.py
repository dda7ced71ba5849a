"""Options that say what iterative mode's references are: which pictures, whose, how fitted, how colourful and how heavy."""

from __future__ import annotations

from typing import Annotated

from fastory.cli.options import METHOD, choice, option
from fastory.settings import choices

ReferenceScale = Annotated[
    str | None,
    option(METHOD, metavar="FIRST:LAST", help="Weight of the references, first to last round."),
]
ReferenceInterval = Annotated[
    str | None,
    option(METHOD, metavar="START:END", help="Shares of the steps that read references (default 0:1)."),
]
References = Annotated[
    str | None,
    choice(METHOD, choices("references"), help="Frames of the last round that a frame sees."),
]
ReferencesFrom = Annotated[
    str | None,
    choice(
        METHOD,
        choices("references_from"),
        help="References are the last round's pictures, or this round's as soon as they are drawn.",
    ),
]
ReferenceFit = Annotated[
    str | None,
    choice(METHOD, choices("reference_fit"), help="How a reference that is not square is fitted."),
]
ReferenceStart = Annotated[
    int | None, option(METHOD, help="First round that sees the pictures of characters (default 1).")
]
Regions = Annotated[
    str | None,
    choice(
        METHOD,
        choices("regions"),
        help="Own references for characters, where they stand; under the references `all` with `on` alone.",
    ),
]
CastLimit = Annotated[
    int | None,
    option(
        METHOD, metavar="K", help="References of a character at most, those that stand for all (default all)."
    ),
]
ReferenceRise = Annotated[
    int | None,
    option(METHOD, metavar="ROUND", help="Round that has the last weight of references (default the last)."),
]
ReferenceMomentum = Annotated[
    float | None,
    option(
        METHOD, metavar="M", help="Share of the rounds before in what a frame is as a reference (default 0)."
    ),
]
ReferenceWeighting = Annotated[
    str | None,
    choice(
        METHOD,
        choices("reference_weighting"),
        help="All references count alike (default), or those that differ from most others less.",
    ),
]
ReferenceRamp = Annotated[
    str | None,
    option(
        METHOD,
        metavar="FIRST:LAST",
        help="Factors of the references' weight, first to last step of a round (default 1:1).",
    ),
]
ReferenceSaturation = Annotated[
    float | None,
    option(
        METHOD,
        metavar="FACTOR",
        help="Colour saturation of the drawn pictures that are references (default 1: as they are).",
    ),
]
