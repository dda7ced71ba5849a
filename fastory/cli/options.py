"""Options that several commands have, each declared once, and what they name, opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fastory.cli.reporting import quiet_libraries

STORY, MODEL, METHOD, SAMPLING, PICTURE, TENSORRT, RUN, OUTPUT = (
    "Story",
    "Model",
    "Method",
    "Sampling",
    "Picture",
    "TensorRT",
    "Running",
    "Output",
)


def option(panel: str, *names: str, **extra: Any) -> Any:
    """A Typer option in a help panel."""
    return typer.Option(*names, rich_help_panel=panel, show_default=False, **extra)


ModelName = Annotated[
    str, option(MODEL, help="builtin, a diffusers folder, a .safetensors file (with --config), or a hub id.")
]
Config = Annotated[
    Path | None, option(MODEL, help="Folder with the configuration of a single .safetensors file.")
]
IpAdapter = Annotated[str | None, option(MODEL, help="IP-Adapter weights (.safetensors).")]
ImageEncoder = Annotated[str | None, option(MODEL, help="Folder of the CLIP image encoder.")]
Adapter = Annotated[str | None, option(MODEL, help="Causal: what `fastory tune` wrote (.safetensors).")]
Loras = Annotated[
    list[str] | None, option(MODEL, "--lora", metavar="PATH[:WEIGHT]", help="LoRA file; repeatable.")
]
Offline = Annotated[bool, option(MODEL, "--offline", help="Never ask a hub.")]
Device = Annotated[str, option(RUN, help="auto, cpu, cuda or cuda:N.")]


def open_model(
    model: str,
    config: Path | None,
    ip_adapter: str | None,
    image_encoder: str | None,
    adapter: str | None,
    loras: list[str],
    device: str,
    dtype: str,
    graphs: str,
    offline: bool,
) -> Any:
    """The StoryModel that the options name."""
    from fastory import door

    parsed = [parse_lora(text) for text in loras]
    door.check_model(
        model,
        config=config,
        ip_adapter=ip_adapter,
        image_encoder=image_encoder,
        adapter=adapter,
        loras=[path for path, _ in parsed],
    )
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    quiet_libraries()
    from fastory.models.torch_model import StoryModel

    return StoryModel.open(
        model,
        config=config,
        ip_adapter=ip_adapter,
        image_encoder=image_encoder,
        adapter=adapter,
        loras=parsed,
        device=device,
        dtype=dtype,
        graphs=graphs,
        offline=offline,
    )


def open_engine(folder: Path, device: str, dtype: str, trust_cache: bool) -> Any:
    """The EngineModel of an export folder."""
    quiet_libraries()
    from fastory.models.engine_model import EngineModel

    return EngineModel.open_engine(folder, device, dtype, trust_cache)


def parse_lora(text: str) -> tuple[str, float]:
    """PATH[:WEIGHT]; a colon that no number follows belongs to the path."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0
