"""`fastory generate`: stories drawn into run folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastory.cli.options import (
    METHOD,
    MODEL,
    OUTPUT,
    PICTURE,
    RUN,
    SAMPLING,
    Adapter,
    Compile,
    Config,
    Device,
    Distilled,
    Dtype,
    Graphs,
    ImageEncoder,
    IpAdapter,
    JsonLines,
    Loras,
    ModelName,
    ModelOptions,
    Offline,
    Quiet,
    SelfAttention,
    among,
    choice,
    open_engine,
    option,
)
from fastory.cli.progress import show_drawing, show_json
from fastory.cli.references import (
    CastLimit,
    ReferenceFit,
    ReferenceInterval,
    ReferenceMomentum,
    ReferenceRamp,
    ReferenceRise,
    References,
    ReferenceSaturation,
    ReferenceScale,
    ReferencesFrom,
    ReferenceStart,
    ReferenceWeighting,
    Regions,
)
from fastory.cli.reporting import quiet_libraries, reported
from fastory.errors import InputError
from fastory.settings import choices

if TYPE_CHECKING:
    from fastory.events import Event
    from fastory.modes.executor import Executor

    ExecutorOf = Callable[[Any], Executor]


def styles(incomplete: str) -> list[str]:
    """Names that --style may be completed with."""
    from fastory.story import STYLES

    return among(STYLES)(incomplete)


Stories = Annotated[
    list[str] | None,
    typer.Argument(
        help="Story files (.txt, .yaml, .json), or names of bundled examples. None: the first example.",
        show_default=False,
    ),
]
Mode = Annotated[
    str | None, choice(METHOD, choices("mode"), help="How the story is drawn (default iterative).")
]
Preset = Annotated[
    str | None,
    choice(
        METHOD, choices("preset"), help="Settings of a published method; other options count before them."
    ),
]
Iterations = Annotated[int | None, option(METHOD, help="Rounds after round 0.")]
Restart = Annotated[
    float | None,
    option(
        SAMPLING,
        metavar="SHARE",
        help="Rounds from 2 on begin from the last round's pictures and take this share of the steps (default 1: all).",
    ),
]
Until = Annotated[
    str | None,
    choice(
        METHOD,
        choices("until"),
        help="A frame is finished after all iterations, or once it no longer changes (iterations are then the most).",
    ),
]
Tolerance = Annotated[
    float | None,
    option(
        METHOD, metavar="EPS", help="With --until converged: how far two rounds may move it (default 0.005)."
    ),
]
Window = Annotated[
    str | None,
    option(
        METHOD,
        metavar="L_M",
        autocompletion=among(["all"]),
        help="Causal: earlier frames that a frame sees, or all.",
    ),
]
Drafts = Annotated[
    int | None, option(METHOD, help="Causal: how often frame 0 is drawn before it is kept (default 0).")
]
Bank = Annotated[
    int | None,
    option(
        METHOD,
        metavar="K",
        help="Reference, consistent: first frames, which alone the others see (default 1, 4).",
    ),
]
SamplingRate = Annotated[
    float | None,
    option(METHOD, help="Consistent: share of the other frames' tokens that a frame sees (default 0.5)."),
]
FirstFrame = Annotated[
    Path | None, option(METHOD, help="Causal: the picture that the story goes on from, as its frame 0.")
]
InitialPictures = Annotated[
    Path | None,
    option(
        METHOD,
        help="Iterative: what stands in place of round 0, a picture, a folder with one a frame, or noise. Reference: the bank.",
    ),
]
Engine = Annotated[Path | None, option(MODEL, help="What `fastory export` wrote, in place of a model.")]
TrustCache = Annotated[
    bool,
    option(
        MODEL,
        "--trust-cache",
        help="With --engine: hash no file again that is as it was when it was hashed.",
    ),
]
Steps = Annotated[int | None, option(SAMPLING, help="Denoising steps.")]
InnerSteps = Annotated[
    int | None, option(SAMPLING, help="Steps of every round but the last (default 0: as many).")
]
GuidanceScale = Annotated[float | None, option(SAMPLING, help="Classifier-free guidance.")]
GuidanceInterval = Annotated[
    str | None,
    option(SAMPLING, metavar="START:END", help="Shares of the steps with guidance (default 0:1)."),
]
CacheInterval = Annotated[
    int | None, option(SAMPLING, metavar="N", help="Steps from one whole UNet call to the next (default 1).")
]
Scheduler = Annotated[str | None, choice(SAMPLING, choices("scheduler"), help="Sampler.")]
Seed = Annotated[int | None, option(SAMPLING, help="Seed of the initial noise.")]
Noise = Annotated[
    str | None,
    choice(
        SAMPLING,
        choices("noise"),
        help="Initial noise: one for all frames, one for each, or another for each in each round.",
    ),
]
Style = Annotated[
    str | None,
    option(PICTURE, autocompletion=styles, help="comic, film, realistic, none, or any text with {prompt}."),
]
Pronouns = Annotated[
    str | None,
    choice(
        PICTURE,
        choices("pronouns"),
        help="Whether `he` or `they` mean the story's named characters (default on).",
    ),
]
NegativePrompt = Annotated[str | None, option(PICTURE, help="What the pictures should not show.")]
Width = Annotated[int | None, option(PICTURE, help="Pixels.")]
Height = Annotated[int | None, option(PICTURE, help="Pixels.")]
BatchSize = Annotated[int | None, option(RUN, help="Frames at once (default: chosen from free memory).")]
Output = Annotated[
    Path | None, option(OUTPUT, "--output", "-o", help="Run folder (default: under ./stories).")
]
Overwrite = Annotated[bool, option(OUTPUT, "--overwrite", help="Draw anew what the run folder holds.")]
Frames = Annotated[
    str | None,
    option(
        OUTPUT,
        metavar="3,7-9",
        help="Redraw only these frames of a finished run; counted from 0. 5- is all from 5 on.",
    ),
]
RedrawSeed = Annotated[int | None, option(OUTPUT, help="Another seed for the frames of --frames.")]


def generate(
    stories: Stories = None,
    mode: Mode = None,
    preset: Preset = None,
    iterations: Iterations = None,
    reference_scale: ReferenceScale = None,
    reference_interval: ReferenceInterval = None,
    references: References = None,
    references_from: ReferencesFrom = None,
    reference_fit: ReferenceFit = None,
    reference_start: ReferenceStart = None,
    regions: Regions = None,
    cast_limit: CastLimit = None,
    until: Until = None,
    tolerance: Tolerance = None,
    restart: Restart = None,
    reference_rise: ReferenceRise = None,
    reference_momentum: ReferenceMomentum = None,
    reference_weighting: ReferenceWeighting = None,
    reference_ramp: ReferenceRamp = None,
    reference_saturation: ReferenceSaturation = None,
    window: Window = None,
    drafts: Drafts = None,
    bank: Bank = None,
    sampling_rate: SamplingRate = None,
    first_frame: FirstFrame = None,
    initial_pictures: InitialPictures = None,
    model: ModelName = "builtin",
    config: Config = None,
    ip_adapter: IpAdapter = None,
    image_encoder: ImageEncoder = None,
    adapter: Adapter = None,
    lora: Loras = None,
    distilled: Distilled = None,
    engine: Engine = None,
    trust_cache: TrustCache = False,
    offline: Offline = False,
    steps: Steps = None,
    inner_steps: InnerSteps = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    cache_interval: CacheInterval = None,
    scheduler: Scheduler = None,
    seed: Seed = None,
    noise: Noise = None,
    style: Style = None,
    pronouns: Pronouns = None,
    negative_prompt: NegativePrompt = None,
    width: Width = None,
    height: Height = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    graphs: Graphs = "auto",
    compile: Compile = "auto",
    attention: SelfAttention = "auto",
    batch_size: BatchSize = None,
    output: Output = None,
    overwrite: Overwrite = False,
    frames: Frames = None,
    redraw_seed: RedrawSeed = None,
    quiet: Quiet = False,
    json_lines: JsonLines = False,
) -> None:
    """Draw stories: every picture of every round, a contact sheet and a storybook page, in a run folder.

    The same command goes on where a run was interrupted.
    """
    requested = locals()
    with reported(resumable=True), executors(requested) as executor_of:
        events = drawn(requested, executor_of)
        show_json(events) if json_lines else show_drawing(events, quiet)


@contextmanager
def executors(requested: Mapping[str, Any]) -> Iterator[ExecutorOf]:
    """Says, once the model is open, which processes draw: this one, or all of torchrun's.

    Only rank 0 of torchrun comes back from here before all is drawn; the others draw for it.
    """
    from fastory.distributed.launch import launched

    launch = launched()
    if launch is None:
        yield in_this_process
        return
    if launch.rank:
        from fastory.distributed.follower import follow

        quiet_libraries()
        raise typer.Exit(follow(launch, requested["device"], partial(opened_as, requested)))
    from fastory.distributed.ranks import led

    with led(launch) as executor_of:
        launch.device(requested["device"])
        yield executor_of


def in_this_process(model: Any) -> Executor:
    """No other process draws."""
    from fastory.modes.executor import HERE

    return HERE


def opened_as(
    requested: Mapping[str, Any], device: str, dtype: str | None = None, graphs: bool | None = None
) -> Any:
    """The model on a device, in the type and with the graphs of a run that began so; None for what the options say."""
    began = {} if dtype is None else {"dtype": dtype, "graphs": "auto" if graphs else "off"}
    return opened({**requested, "device": device, **began})


def drawn(requested: Mapping[str, Any], executor_of: ExecutorOf) -> Iterator[Event]:
    """The events of the stories that these options name. Raises InputError, before PyTorch is imported where that can be."""
    from fastory import door
    from fastory.settings import Settings

    if requested["redraw_seed"] is not None and requested["frames"] is None:
        raise InputError("--redraw-seed wants --frames: which frames are to be redrawn?")
    frames = door.parse_frames(requested["frames"])
    settings = {field.name: requested[field.name] for field in fields(Settings)}
    door.check_flags(settings, requested["preset"])
    door.check_placement(
        requested["device"],
        requested["dtype"],
        requested["graphs"],
        requested["batch_size"],
        requested["compile"],
        requested["attention"],
    )
    stories = read_stories(requested["stories"] or [])
    door.check_stories(stories, requested["style"])
    if requested["first_frame"] is not None:
        door.check_first_frame(requested["first_frame"])
    initial = requested["initial_pictures"]
    initial = () if initial is None else door.initial_pictures(initial)
    door.check_output(requested["output"], stories)
    model = opened(requested)
    from fastory.runs.generate import generate as draw

    unchanged = ("preset", "output", "overwrite", "redraw_seed", "batch_size", "first_frame")
    chosen = {name: requested[name] for name in unchanged} | {"initial_pictures": initial}
    where: dict[str, Any] = {"under": Path("stories"), "executor": executor_of(model)}
    return draw(stories, model=model, frames=frames, **where, **chosen, **settings)


def check_named(requested: Mapping[str, Any]) -> None:
    """InputError for options that name no model and no export; PyTorch is not imported for it."""
    from fastory import door

    engine, options = requested["engine"], ModelOptions.among(requested)
    if engine is not None:
        if named := options.named():
            raise InputError(f"--engine holds the whole model; {named[0]} is given when it is exported")
        door.check_engine(engine)
    elif requested["trust_cache"]:
        raise InputError("--trust-cache is for --engine; a model's hashes are always remembered")
    else:
        options.check()


def opened(requested: Mapping[str, Any]) -> Any:
    """The model, or the export, that these options name."""
    check_named(requested)
    if requested["engine"] is not None:
        for name, word in (("compile", "on"), ("attention", "measured")):
            if requested[name] == word:
                raise InputError(
                    f"--{name} is for a model of PyTorch; what an export runs was decided when it was made"
                )
        chosen = (requested[name] for name in ("engine", "device", "dtype", "trust_cache"))
        return open_engine(*chosen)
    options = ModelOptions.among(requested)
    placed = ("device", "dtype", "graphs", "compile", "attention")
    return options.open(*(requested[name] for name in placed))


def read_stories(names: list[str]) -> list[Any]:
    """Story files, and bundled examples by name."""
    from fastory.builtin import DEFAULT_EXAMPLE, EXAMPLES
    from fastory.files import check_names_fit
    from fastory.story import Story

    check_names_fit([Path(name) for name in names])
    names = names or [DEFAULT_EXAMPLE]
    return [
        Story.read(EXAMPLES[name] if name in EXAMPLES and not Path(name).exists() else Path(name))
        for name in names
    ]
