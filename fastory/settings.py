"""What decides a story's pictures beside the story itself: frozen settings, presets, and the order of their sources."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

from fastory import plugins
from fastory.errors import InputError
from fastory.presets import FAST, PRESETS, in_steps
from fastory.values import LEAST, MOST, WITHIN, as_float, interval, refuse_broken_text, scale, window
from fastory.wording import shown


@dataclass(frozen=True)
class Scheduler:
    """One of diffusers' schedulers by its class. config: what stands in place of the model folder's own values.

    distilled: whether it wants a UNet that was distilled for it, as LCM does. solves: whether a step solves for its
    coefficients with small tensors on the sample's device, as UniPC does; they are computed on the host then.
    begins_within: whether its steps may begin within a schedule; PNDM's first ones are others.
    """

    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    distilled: bool = False
    solves: bool = False
    begins_within: bool = True


SCHEDULERS: dict[str, Scheduler] = {
    "ddim": Scheduler("DDIMScheduler"),
    # What the official code of Story-Adapter draws with, whatever the model folder's scheduler says.
    "ddim-leading": Scheduler(
        "DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    ),
    "lcm": Scheduler("LCMScheduler", distilled=True),
    "euler": Scheduler("EulerDiscreteScheduler"),
    "euler-ancestral": Scheduler("EulerAncestralDiscreteScheduler"),
    "dpm++": Scheduler("DPMSolverMultistepScheduler"),
    "unipc": Scheduler("UniPCMultistepScheduler", solves=True),
    "pndm": Scheduler("PNDMScheduler", begins_within=False),
}
REFERENCES = ("all", "others", "cast")
REFERENCES_FROM = ("last", "latest")
# Frames in a micro-batch that sees the pictures of those before it, unless another size is asked for: fewer see more that is
# fresh, more are drawn faster each.
LATEST_AT_ONCE = 4
REFERENCE_FITS = ("pad", "squash", "crop")
REGIONS = ("auto", "on", "off")
UNTIL = ("iterations", "converged")
WEIGHTINGS = ("equal", "majority")
PRONOUNS = ("on", "off")
NOISES = ("shared", "per-frame", "per-round")
DTYPES = ("float32", "float16", "bfloat16")
GRAPHS = ("auto", "off")
COMPILE = ("auto", "on", "off")
ATTENTION = ("auto", "measured")
DISTILLED = ("auto", "lcm-lora", "none")


@dataclass(frozen=True)
class ModeTraits:
    """What settings must know of a mode. own: the settings that it reads and not every mode does.

    A mode with `iterations` among them draws every frame in round 0 and in each of these, any other once. first_frame:
    whether the story may give frame 0 as a picture. character_pictures, boxes: whether it reads those of characters, boxes
    without regions. bank: of a mode whose first frames alone are seen by others, how many where the user does not say.
    """

    own: tuple[str, ...]
    first_frame: bool = False
    character_pictures: bool = False
    boxes: bool = False
    bank: int = 0


MODES: dict[str, ModeTraits] = {
    "iterative": ModeTraits(
        (
            *("iterations", "inner_steps", "reference_scale"),
            *("references", "references_from", "reference_fit", "reference_start"),
            *("reference_interval", "regions", "cast_limit", "until", "tolerance"),
            *("restart", "reference_rise", "reference_momentum"),
            *("reference_weighting", "reference_ramp", "reference_saturation"),
        ),
        character_pictures=True,
    ),
    "causal": ModeTraits(("window", "drafts", "regions"), first_frame=True, boxes=True),
    "plain": ModeTraits(()),
    "reference": ModeTraits(("bank", "reference_scale", "reference_fit", "reference_interval"), bank=1),
    "consistent": ModeTraits(("bank", "sampling_rate"), bank=4),
}


@dataclass(frozen=True)
class Settings:
    """Every value that changes a picture. The defaults are the paper's (Story-Adapter, arXiv 2410.06244).

    width, height: pixels; None is the model's own size. inner_steps: of every round but the last, 0 for `steps`: pictures of
    inner rounds are read by the image encoder alone. reference_scale: l_1 and l_K of the linear weighting. references_from:
    the round whose pictures are references: `last` is the paper's, `latest` has those of this round in place of the last one's
    as soon as they are drawn, micro-batch after micro-batch in the order of the frames, so that round 0 sees its first ones.
    reference_start: the first round in which pictures given for a character are references. regions: whether characters
    have references of their own, in causal mode words and history, each where it stands: those that a story names, or the
    animals of the built-in model's plain stories; `on` under the references `all` too, see modes/regions.py.
    cast_limit: the appearances of a character that are its references then, those that stand for all best; 0 for all. noise:
    one for all pictures, one for each frame, or `per-round` another for each frame in each round. pronouns: whether `he` or
    `they` in a caption without a name mean named characters of the story, see story/pronouns.py. window: L_M of causal mode,
    the frames before it that a frame sees, or "all" (AR-LDM). drafts: how often frame 0 of causal mode is drawn before it is
    kept, each time from the one before; see modes/causal.py. bank: how many first frames alone are
    seen by the others, None for as many as the mode has without being told. sampling_rate: of the
    tokens of other frames, how many consistent mode joins to a frame's own. guidance_interval, reference_interval: the
    shares of the steps, from a start to before an end, in which there is classifier-free guidance, and in which references
    are read; outside, the unconditional rows, or the references, are not computed ("Applying Guidance in a Limited Interval
    Improves Sample and Distribution Quality in Diffusion Models", arXiv 2404.07724, for guidance).
    cache_interval: of so many steps one calls the whole UNet, 1 for every step; the others take the deep features of the last
    whole call (DeepCache, arXiv 2312.00858).
    until: when a frame is finished, after all iterations, or once it has `converged`: its reference
    tokens lie within `tolerance`, a cosine distance, of those of both rounds before; see modes/converged.py.
    restart: the share of the steps that rounds from 2 on take, the last ones, beginning from the last round's picture with
    that much noise (SDEdit, arXiv 2108.01073); 1 begins from noise alone. reference_rise: the round in which the weight has
    risen to l_K, 0 for the last. reference_momentum: M of r_k = M r_(k-1) + (1 - M) e_k, what a frame is as a reference after
    round k, where its picture has the reference tokens e_k; r_0 = e_0.
    reference_weighting: whether a frame that differs from the story's `majority` counts less as a reference, see
    modes/weighting.py. reference_ramp: factors of the weight at the first and the last step of a round, linear in between.
    reference_saturation: how colourful a drawn picture is as a reference, 1 for as it is, 0 for gray; pictures that are given
    for a character are seen as they are.
    """

    mode: str = "iterative"
    iterations: int = 10
    reference_scale: tuple[float, float] = (0.3, 0.5)
    references: str = "all"
    references_from: str = "last"
    reference_fit: str = "pad"
    reference_start: int = 1
    regions: str = "auto"
    cast_limit: int = 0
    scheduler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 7.5
    noise: str = "shared"
    seed: int = 0
    style: str | None = None
    pronouns: str = "on"
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    window: int | str = "all"
    drafts: int = 0
    inner_steps: int = 0
    bank: int | None = None
    sampling_rate: float = 0.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    reference_interval: tuple[float, float] = (0.0, 1.0)
    cache_interval: int = 1
    until: str = "iterations"
    tolerance: float = 0.005
    restart: float = 1.0
    reference_rise: int = 0
    reference_momentum: float = 0.0
    reference_weighting: str = "equal"
    reference_ramp: tuple[float, float] = (1.0, 1.0)
    reference_saturation: float = 1.0

    @property
    def rounds(self) -> int:
        """How often every frame is drawn: in iterative mode in round 0 and the iterations, in causal mode once."""
        return self.iterations + 1 if "iterations" in MODES[self.mode].own else 1

    def said(self) -> dict[str, Any]:
        """What this object says of a run of its mode: a size, a style or a negative prompt that it has not is left open."""
        check("mode", self.mode, "settings")
        others = foreign(self.mode)
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in others and value not in (None, "")
        }

    def identity(self) -> dict[str, Any]:
        """The values that this mode reads, as a manifest holds them."""
        others = {
            *foreign(self.mode),
            *(name for name, none in _LATER.items() if getattr(self, name) == none),
            *(name for name, (of, value) in _BESIDE.items() if getattr(self, of) != value),
        }
        return {name: value for name, value in asdict(self).items() if name not in others}

    @property
    def bank_size(self) -> int:
        """How many first frames alone are seen by others; 0 in a mode in which every frame may be."""
        bank = MODES[self.mode].bank
        return (self.bank or bank) if bank else 0

    def with_own_alone(self) -> Settings:
        """The same, and what this mode does not read as if it were not given."""
        unread: dict[str, Any] = {
            field.name: field.default for field in fields(self) if field.name in foreign(self.mode)
        }
        return replace(self, **unread)

    def scheduled_steps(self, round: int) -> int:
        """Steps of the schedule of a picture of this round, from noise alone on."""
        return self.inner_steps if self.inner_steps and round < self.rounds - 1 else self.steps

    def restarts(self, round: int) -> bool:
        """Whether pictures of this round begin from those of the last one."""
        return self.restart < 1 and 2 <= round < self.rounds

    def steps_of(self, round: int) -> int:
        """Denoising steps that a picture of this round takes, at least one."""
        steps = self.scheduled_steps(round)
        return max(1, math.floor(steps * self.restart + 0.5)) if self.restarts(round) else steps

    @property
    def first_referring(self) -> int:
        """The first round in which frames see other frames."""
        return 0 if self.references_from == "latest" else 1

    def reference_scale_of(self, round: int) -> float:
        """l_k: linear from l_1 to l_K; K = 1 uses l_1 (Story-Adapter, section 3.3). 0 where nothing drawn is seen yet.

        With reference_rise l_K is reached in that round, in round 1 at once. Round 0 of fresh references is weighted as
        round 1 is.
        """
        first, last = self.reference_scale
        if round < self.first_referring:
            return 0.0
        risen = self.reference_rise or self.iterations
        if 0 < self.reference_rise <= round:
            return last
        if risen <= 1 or round == 0:
            return first
        return first + (round - 1) / (risen - 1) * (last - first)


# What takes one word of a table: settings, and options of the command line.
_CHOICES: Mapping[str, Collection[str]] = {
    "mode": MODES,
    "references": REFERENCES,
    "references_from": REFERENCES_FROM,
    "reference_fit": REFERENCE_FITS,
    "regions": REGIONS,
    "until": UNTIL,
    "reference_weighting": WEIGHTINGS,
    "pronouns": PRONOUNS,
    "scheduler": SCHEDULERS,
    "noise": NOISES,
    "preset": PRESETS,
    "dtype": ("auto", *DTYPES),
    "graphs": GRAPHS,
    "compile": COMPILE,
    "attention": ATTENTION,
    "distilled": DISTILLED,
}
# Settings that came later, with the value under which a run is what it was before there were any.
_LATER = {
    "references_from": "last",
    "inner_steps": 0,
    "guidance_interval": (0.0, 1.0),
    "reference_interval": (0.0, 1.0),
    "cache_interval": 1,
    "regions": "off",
    "cast_limit": 0,
    "until": "iterations",
    "pronouns": "on",  # who is meant counts in the frames
    "restart": 1.0,
    "reference_rise": 0,
    "reference_momentum": 0.0,
    "reference_weighting": "equal",
    "reference_ramp": (1.0, 1.0),
    "reference_saturation": 1.0,
}
# Settings that are read where another one has this value.
_BESIDE = {"tolerance": ("until", "converged")}


def is_within(interval: tuple[float, float], step: int, steps: int) -> bool:
    """Whether a step, counted from 0, lies in an interval of shares of all `steps`."""
    return interval[0] * steps <= step < interval[1] * steps


def resolve(
    flags: Mapping[str, Any],
    story: Mapping[str, Any],
    preset: str | None,
    folder_defaults: Mapping[str, Any],
    whole: Mapping[str, Any] | None = None,
    distilled: str | None = None,
) -> tuple[Settings, dict[str, str]]:
    """The settings and where each came from: flag > story file > preset > the model folder's defaults > paper.

    whole: the values of a Settings object, which come before the story file's. distilled: as of Model. A value of None in
    `flags` or `story` means "not given". The folder's defaults may hold others under the name of a mode, which count in that
    mode alone. Raises InputError for an unknown preset, name or value.
    """
    check_preset(preset)
    general = {name: value for name, value in folder_defaults.items() if name not in MODES}
    origins: list[tuple[str, Mapping[str, Any]]] = [
        ("model", general),
        (f"preset {preset}", preset_values(preset, distilled, own_steps(general)) if preset else {}),
        ("story", story),
        ("settings", whole or {}),
        ("flag", flags),
    ]
    modes = (chosen.get("mode") for _, chosen in reversed(origins))
    mode = next((value for value in modes if value is not None), Settings.mode)
    origins.insert(1, ("model", _of_mode(folder_defaults, mode)))
    values: dict[str, Any] = {}
    sources = {field.name: "paper" for field in fields(Settings)}
    for origin, chosen in origins:
        for name, value in chosen.items():
            if value is not None:
                # The command line has checked its flags by their names before; what is left comes from Python.
                values[name] = check(name, value, "argument" if origin == "flag" else origin)
                sources[name] = origin
    settings = replace(Settings(), **values)
    if settings.bank is None and settings.bank_size:
        settings = replace(settings, bank=settings.bank_size)
    if settings.inner_steps > settings.steps and sources["inner_steps"] in ("model", f"preset {preset}"):
        # Asked for were fewer steps, not more of them in the rounds before.
        settings = replace(settings, inner_steps=0)
    return settings, sources


def foreign(mode: str) -> dict[str, str]:
    """The settings that `mode` does not read, each with the mode that does."""
    own, readers = MODES[mode].own, reversed(MODES.items())  # of several the first one is named
    return {name: other for other, traits in readers for name in traits.own if name not in own}


def unused(settings: Settings, sources: Mapping[str, str], reasons: Mapping[str, str]) -> list[str]:
    """A line for each value that the user gave, in the call or in the story file, and that decides nothing.

    reasons: why, for settings of this story's mode.
    """
    why = {
        name: f"it belongs to {other} mode, and this story is drawn in {settings.mode} mode"
        for name, other in foreign(settings.mode).items()
    }
    where = {"flag": "", "story": " of the story file"}
    return [
        f"`{name}`{where[sources[name]]} is not used: {reason}"
        for name, reason in {**why, **reasons}.items()
        if sources[name] in where
    ]


def _of_mode(folder_defaults: Mapping[str, Any], mode: Any) -> Mapping[str, Any]:
    """What a model folder sets for one mode; `mode` may be anything, it is checked with the others."""
    own = folder_defaults.get(mode, {}) if isinstance(mode, str) else {}
    if not isinstance(own, Mapping):
        raise InputError(f"{mode} (model): wanted settings by name, got {shown(own)}")
    return own


def choices(name: str) -> tuple[str, ...]:
    """The words that `name`, a setting or an option, takes: its table's, and those that plug-ins say they bring.

    No plug-in is imported for it: see fastory.plugins.
    """
    return tuple(dict.fromkeys((*_CHOICES[name], *plugins.names(name))))


def check_choice(name: str, value: str, what: str) -> None:
    """InputError, which begins with `what`, for a word that `name` does not take. Plug-ins are asked for one not of ours."""
    if value not in _CHOICES[name] and name in plugins.KINDS:
        plugins.load()
    if value not in _CHOICES[name]:
        raise InputError(f"{what}: wanted one of {', '.join(_CHOICES[name])}, got {shown(value)}")


def own_steps(folder_defaults: Mapping[str, Any]) -> int:
    """Steps in which a model is drawn where nothing else is said. Raises InputError for what can be no number of steps."""
    return int(check("steps", folder_defaults.get("steps", Settings.steps), "model"))


def preset_values(preset: str, distilled: str | None, steps: int) -> Mapping[str, Any]:
    """What a preset stands for; InputError for `fast` where the checkpoint was not distilled for few steps.

    distilled: as of Model. steps: in which the model is drawn where nothing else is said.
    """
    if preset != "fast":
        return in_steps(preset, steps)
    if distilled is None or distilled not in FAST:
        raise InputError(
            "preset fast wants a checkpoint that was distilled for few steps: an LCM UNet (time_cond_proj_dim), a turbo model "
            "(its own scheduler is Euler's with trailing timesteps), an LCM-LoRA by --lora (its file, folder, hub name or "
            "header says lcm), or one merged into it (its own scheduler is LCM's). This one says none of it, and 4 steps of a "
            "model that was not distilled are noise: give another preset or, where the weights do hold an LCM-LoRA, "
            "--distilled lcm-lora"
        )
    return {**PRESETS[preset], **FAST[distilled]}


def check_preset(preset: str | None) -> None:
    """InputError for a name that is no preset's."""
    if preset is not None and preset not in PRESETS:
        raise InputError(f"unknown preset {shown(preset)}; wanted one of {', '.join(PRESETS)}")


def check(name: str, value: Any, origin: str) -> Any:
    """`value` in the type of the setting `name`; InputError with name, wanted and got where it does not fit.

    origin: where it was given: "argument", file:line, or the flag with its dashes, which then stands for the name.
    """
    hints = get_type_hints(Settings)
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(hints)}"
        raise InputError(f"unknown setting {shown(name)} ({origin}){hint}")
    what = origin if origin.startswith("--") else f"{name} ({origin})"
    if name in ("reference_scale", "reference_ramp"):
        return scale(value, what)
    if name in ("guidance_interval", "reference_interval"):
        return interval(value, what)
    if name == "window":
        return window(value, what)
    kinds = tuple(kind for kind in (get_args(hints[name]) or (hints[name],)) if kind is not type(None))
    if kinds == (float,) and type(value) is int:
        value = as_float(value)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise InputError(f"{what}: wanted {kinds[0].__name__}, got {shown(value)}")
    if name in _CHOICES:
        check_choice(name, value, what)
    if name in LEAST and not LEAST[name] <= value <= MOST[name]:
        raise InputError(f"{what}: wanted {LEAST[name]} to {MOST[name]}, got {shown(value)}")
    if name in WITHIN and not WITHIN[name][0] <= value <= WITHIN[name][1]:
        raise InputError(f"{what}: wanted {WITHIN[name][0]} to {WITHIN[name][1]}, got {shown(value)}")
    if isinstance(value, str):
        refuse_broken_text(value, what)
    return value


def check_placement(device: str, dtype: str, graphs: str) -> None:
    """InputError for words that --device, --dtype and --graphs do not take; whether a device is there, PyTorch knows."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", device):
        raise InputError(f"--device: wanted auto, cpu, cuda or cuda:N, got {shown(device)}")
    check_choice("dtype", dtype, "--dtype")
    check_choice("graphs", graphs, "--graphs")
