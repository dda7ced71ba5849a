"""What can be told of a command before PyTorch is imported: its words, names of files, stories, a folder in use.

Importing PyTorch and diffusers takes seconds; a wrong word is refused before that. What a model is asked for is checked once
more, and in full, where it is opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastory import files, packages, settings
from fastory.errors import InputError
from fastory.model_names import PICKLE_SUFFIXES, local_encoder, local_model, local_weights, user_path
from fastory.pictures import Picture, open_picture, pictures_or_noise
from fastory.runs.identity import run_paths
from fastory.story import MAX_FRAMES, Story
from fastory.wording import shown

EXPORT_MANIFEST = "fastory.json"


def check_flags(flags: Mapping[str, Any], preset: str | None) -> None:
    """InputError, by the flag's name, for a value that its setting does not take."""
    settings.check_preset(preset)
    for name, value in flags.items():
        if value is not None:
            settings.check(name, value, "--" + name.replace("_", "-"))


def check_placement(
    device: str,
    dtype: str = "auto",
    graphs: str = "auto",
    batch_size: int | None = None,
    compile: str = "auto",
    attention: str = "auto",
) -> None:
    """InputError for words that --device, --dtype, --graphs, --batch-size, --compile and --attention do not take."""
    settings.check_placement(device, dtype, graphs)
    settings.check_choice("compile", compile, "--compile")
    settings.check_choice("attention", attention, "--attention")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size: wanted 1 or more, got {batch_size}")


def check_stories(stories: Sequence[Story], style: str | None) -> None:
    """InputError, by file and line, for a story's settings; and for a style that is none."""
    for story in stories:
        for name, value in story.settings.items():
            settings.check(name, value, story.where(f"settings.{name}") or "story")
        story.prompt(0, style)


def check_model(
    model: str,
    *,
    config: Path | None = None,
    ip_adapter: str | None = None,
    image_encoder: str | None = None,
    adapter: str | None = None,
    loras: Sequence[str] = (),
    distilled: str = "auto",
) -> None:
    """InputError for a name that is neither of something here nor of something on a hub. loras: paths alone."""
    settings.check_choice("distilled", distilled, "--distilled")
    if model != "builtin":
        local_model(model)
    if config is not None and not user_path(config, "--config").is_dir():
        raise InputError(
            f"--config {config} is not a folder; wanted a diffusers folder of the same architecture."
        )
    for what, name in (("IP-Adapter", ip_adapter), ("Adapter", adapter), *(("LoRA", lora) for lora in loras)):
        if name:
            local_weights(name, what)
    if image_encoder:
        local_encoder(image_encoder)


def check_engine(folder: Path) -> None:
    """InputError for a folder that is no finished export."""
    path = user_path(folder, "--engine")
    if not (path / EXPORT_MANIFEST).is_file():
        raise InputError(
            f"{folder} holds no {EXPORT_MANIFEST}; wanted a folder that `fastory export` finished"
        )
    if not any(path.glob("*.engine")):
        packages.require(f"{folder} has no engines, so drawing", "onnx", "onnxruntime")


def check_first_frame(path: Path) -> None:
    """InputError for what is no picture."""
    user_path(path, "--first-frame")
    try:
        open_picture(path)
    except InputError as error:
        raise InputError(f"--first-frame: {error}") from error


def initial_pictures(path: Path) -> list[Picture]:
    """A picture, those of a folder, or `noise`, one of noise for all frames. InputError for anything else."""
    user_path(path, "--initial-pictures")
    try:
        return pictures_or_noise(path)
    except InputError as error:
        raise InputError(f"--initial-pictures: {error}") from error


def check_paths(paths: Mapping[str, Path | None]) -> None:
    """InputError, by the option's name, for what can be no path."""
    for what, path in paths.items():
        if path is not None:
            user_path(path, what)


def check_output(output: Path | None, stories: Sequence[Story]) -> None:
    """InputError for run folders that cannot be; FastoryError where another process draws into one."""
    if output is None:
        return
    user_path(output, "--output")
    for path in run_paths(stories, output):
        assert path is not None
        files.check_names_fit([path])
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; wanted a new or empty folder for --output")
        files.check_unlocked(path, "draws into", "choose another --output")


def check_export(
    output: Path | None, dtype: str, binding: str, groups: int, characters: int, boxes: bool
) -> None:
    """InputError for values that no export takes; FastoryError where another process exports into `output`."""
    from fastory.export.choices import Groups, check_binding, check_is_no_file

    settings.check_placement("cpu", dtype, "off")
    check_binding(binding, Groups(groups, characters, boxes))
    if output is not None:
        path = user_path(output, "--output")
        check_is_no_file(path)
        files.check_nobody_makes(path, "exports into", "choose another --output")


def check_tuning(stories: Path, output: Path, tuning: Any, sizes: Any) -> None:
    """InputError for values that no tuning takes; FastoryError where another process tunes there.

    tuning, sizes: fastory.tuning.sizes.Tuning and HistorySizes.
    """
    from fastory.tuning.sizes import tuning_folder
    from fastory.tuning.stories import check_is_folder

    tuning.check()
    sizes.check()
    check_is_folder(user_path(stories, "STORIES"))
    folder = tuning_folder(user_path(output, "--output"))
    if os.environ.get("RANK", "0") == "0":  # the others of torchrun would meet the lock of the first
        files.check_unlocked(folder, "tunes in", "choose another --output")


def check_new_file(path: Path | None, what: str) -> None:
    """InputError for a file that is there already, or whose folder is not: nothing of a user's is replaced."""
    if path is None:
        return
    if user_path(path, what).exists():
        raise InputError(f"{what} {path} exists; wanted a name that is free")
    if not path.parent.is_dir():
        raise InputError(f"{what} {path}: wanted a file in a folder that exists, and {path.parent} does not")


def check_pickle(path: Path) -> None:
    """InputError for what `fastory convert` cannot convert, by its name."""
    user_path(path, "The checkpoint")
    if path.suffix.lower() not in PICKLE_SUFFIXES or not path.is_file():
        raise InputError(f"{path} cannot be converted: wanted a file ending in {', '.join(PICKLE_SUFFIXES)}.")


def check_conversion(output: Path | None) -> None:
    """FastoryError where another process writes `output` just now."""
    if output is not None:
        files.check_nobody_makes(user_path(output, "OUT"), "is writing", "give another output")


def parse_frames(text: str | None) -> list[int] | slice | None:
    """Frame numbers of 3,7-9, or a slice for 5-. Raises InputError, before any is counted up, for one no story has."""
    if text is None:
        return None
    if text.endswith("-") and text[:-1].strip().isdecimal():
        return slice(_frame(text[:-1], text), None)
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise _not_frames(text)
        low, high = _frame(first, text), _frame(last or first, text)
        if high < low:
            raise _not_frames(text)
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def _frame(digits: str, text: str) -> int:
    digits = digits.strip()
    if len(digits) > len(str(MAX_FRAMES)) or int(digits) >= MAX_FRAMES:
        raise InputError(
            f"--frames: wanted frames from 0 to {MAX_FRAMES - 1}, as many as a story may have, got {shown(text)}"
        )
    return int(digits)


def _not_frames(text: str) -> InputError:
    return InputError(
        f"--frames: wanted numbers and ranges such as 3,7-9, or 5- for all from 5 on, got {shown(text)}"
    )
