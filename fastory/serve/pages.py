"""What a browser is given: the page, its files, the API's documentation, and the settings as tables."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fastapi import APIRouter
from fastapi.responses import FileResponse

from fastory.documents import read_json
from fastory.model_names import user_path
from fastory.presets import FAST, PRESETS, in_steps
from fastory.serve.shelf import NoSuchStory
from fastory.settings import MODES, SCHEDULERS, Settings, choices, foreign, own_steps, resolve
from fastory.story import MAX_FRAMES, STYLES

STATIC = Path(__file__).with_name("static")
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
FILES = {path.name: path for path in sorted(STATIC.iterdir()) if path.suffix[1:] in TYPES}
MAIN = ("iterations", "steps", "guidance_scale", "references", "scheduler")  # the others stand under "more"
ELSEWHERE = ("mode", "seed", "style", "negative_prompt")  # the page has fields of their own for them
DEFAULTS_FILE = "fastory_defaults.json"


def pages(model: str) -> APIRouter:
    """Routes of the page. model: as StoryModel.open takes it, whose defaults are shown."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def page() -> FileResponse:
        return asset("index.html")

    @routes.get("/docs")
    def documentation() -> FileResponse:
        return asset("docs.html")

    @routes.get("/static/{name}")
    def static(name: str) -> FileResponse:
        return asset(name)

    @routes.get("/choices")
    def tables() -> dict[str, Any]:
        return settings_tables(model)

    return routes


def asset(name: str) -> FileResponse:
    """A file of the page. Raises NoSuchStory for what is none."""
    if name not in FILES:
        raise NoSuchStory("there is no such page")
    return FileResponse(
        FILES[name], media_type=TYPES[FILES[name].suffix[1:]], headers={"cache-control": "no-cache"}
    )


def settings_tables(model: str) -> dict[str, Any]:
    """What the page offers: modes with their settings, each with its kind, its words and its default with this model."""
    modes = {mode: mode_table(mode, defaults_of(model)) for mode in MODES}
    with_first_frame = [mode for mode, traits in MODES.items() if traits.first_frame]
    return {
        "modes": modes,
        "presets": presets_for(model),
        "styles": list(STYLES),
        "first_frame": with_first_frame,
        "most_frames": MAX_FRAMES,
        "model": model,
    }


def presets_for(model: str) -> dict[str, dict[str, Any]]:
    """Presets by their settings, `fast` once for each kind of checkpoint. The built-in model is not distilled."""
    steps = own_steps(defaults_of(model))
    whole = {name: dict(in_steps(name, steps)) for name in PRESETS if name != "fast"}
    if model == "builtin":
        return {name: v for name, v in whole.items() if not SCHEDULERS[v["scheduler"]].distilled}
    return {**whole, **{f"fast ({kind})": {**PRESETS["fast"], **values} for kind, values in FAST.items()}}


def mode_table(mode: str, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings that a mode reads, main ones first."""
    settings, _ = resolve({"mode": mode}, {}, None, defaults)
    others = foreign(mode)
    names = [field.name for field in fields(Settings) if field.name not in (*others, *ELSEWHERE)]
    shown = {name: getattr(settings, name) for name in names}
    if "bank" in shown:
        shown["bank"] = settings.bank_size
    table = [_row(name, value) for name, value in shown.items()]
    return sorted(table, key=lambda row: MAIN.index(row["name"]) if row["main"] else len(MAIN))


def _row(name: str, value: Any) -> dict[str, Any]:
    kinds = [kind for kind in get_args(get_type_hints(Settings)[name]) if kind is not type(None)]
    kind = get_type_hints(Settings)[name] if not kinds or isinstance(value, tuple) else kinds[0]
    try:
        words = list(choices(name))
    except KeyError:
        words = []
    shown = (
        "choice"
        if words
        else "pair"
        if isinstance(value, tuple)
        else "text"
        if name == "window"
        else "number"
    )
    step = "any" if kind is float else 1
    default = list(value) if isinstance(value, tuple) else value
    return {
        "name": name,
        "kind": shown,
        "words": words,
        "default": default,
        "step": step,
        "main": name in MAIN,
    }


def defaults_of(model: str) -> dict[str, Any]:
    """What the model's folder sets, where it is one here; a hub's is known once it is opened."""
    from fastory.builtin import WEIGHTS

    folder = WEIGHTS if model == "builtin" else Path(model)
    file = folder / DEFAULTS_FILE
    if model != "builtin" and not (user_path(folder, "--model").is_dir() and file.is_file()):
        return {}
    said = read_json(file, what="a model folder's defaults")
    known = {field.name for field in fields(Settings)} | set(MODES)
    return {name: value for name, value in said.items() if name in known}
