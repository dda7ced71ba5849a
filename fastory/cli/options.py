"""Options that several commands have, each declared once, and what they name, opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from fastory.cli.reporting import quiet_libraries
from fastory.model_names import PUBLISHED
from fastory.settings import choices

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


def choice(panel: str, words: Iterable[str], **extra: Any) -> Any:
    """An option that takes one of `words`, the table that it is checked against.

    --help shows the words and the shell completes them. Another word is met at the door, with one line, and not while the
    command line is read: a plug-in's word may be known to its module alone.
    """
    return option(panel, metavar=f"[{'|'.join(words)}]", autocompletion=among(words), **extra)


def among(words: Iterable[str]) -> Callable[[str], list[str]]:
    """What a shell is told to complete an option with: those of `words` that begin as what was typed."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


NAMED_MODELS = ("builtin", *PUBLISHED)
ModelName = Annotated[
    str,
    option(
        MODEL,
        autocompletion=among(NAMED_MODELS),
        help=f"{', '.join(NAMED_MODELS)} (of the hub, with IP-Adapter), a diffusers folder, a hub id, or a .safetensors file "
        "(with --config).",
    ),
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
Distilled = Annotated[
    str | None,
    choice(
        MODEL,
        choices("distilled"),
        help="Whether the weights hold an LCM-LoRA, for --preset fast (default auto: what the files say).",
    ),
]
Offline = Annotated[bool, option(MODEL, "--offline", help="Never ask a hub.")]
Quiet = Annotated[bool, option(OUTPUT, "--quiet", help="Print where the result is and nothing else.")]
JsonLines = Annotated[bool, option(OUTPUT, "--json", help="Print events as JSON lines.")]
Device = Annotated[
    str,
    option(RUN, autocompletion=among(("auto", "cpu", "cuda", "cuda:0")), help="auto, cpu, cuda or cuda:N."),
]
Dtype = Annotated[
    str,
    choice(
        RUN, choices("dtype"), help="Of what is computed; auto is float16 on CUDA and float32 on the CPU."
    ),
]

Graphs = Annotated[
    str, choice(RUN, choices("graphs"), help="A CUDA graph around a UNet call (default auto: on CUDA).")
]
Compile = Annotated[
    str,
    choice(RUN, choices("compile"), help="torch.compile of UNet blocks (default auto: long runs on CUDA)."),
]
SelfAttention = Annotated[
    str,
    choice(
        RUN,
        choices("attention"),
        help="Self-attention by PyTorch's choice (auto, the default) or by what is quickest here.",
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """What names a model on the command line."""

    model: str = "builtin"
    config: Path | None = None
    ip_adapter: str | None = None
    image_encoder: str | None = None
    adapter: str | None = None
    lora: Sequence[str] | None = None
    distilled: str | None = None
    offline: bool = False

    @classmethod
    def among(cls, requested: Mapping[str, Any]) -> Self:
        """Those of a command's options that name its model."""
        return cls(**{field.name: requested[field.name] for field in fields(cls)})

    def named(self) -> list[str]:
        """The options that say more than the built-in model, with their dashes."""
        default, others = ModelOptions(), [field.name for field in fields(self) if field.name != "offline"]
        return [flag(name) for name in others if (getattr(self, name) or None) != getattr(default, name)]

    def check(self) -> None:
        """InputError for a name of nothing that is here or on a hub; PyTorch, which says it in full, is not imported."""
        from fastory import door

        named, loras = self._parts()
        door.check_model(
            self.model, **named, loras=[path for path, _ in loras], distilled=self.distilled or "auto"
        )

    def _parts(self) -> tuple[dict[str, Any], list[tuple[str, float]]]:
        named = {name: getattr(self, name) for name in ("config", "ip_adapter", "image_encoder", "adapter")}
        return named, [parse_lora(text) for text in self.lora or []]

    def open(
        self, device: str, dtype: str, graphs: str, compile: str = "auto", attention: str = "auto"
    ) -> Any:
        """The StoryModel. Names are checked before PyTorch is imported."""
        self.check()
        named, loras = self._parts()
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        quiet_libraries()
        from fastory.models.torch_model import StoryModel

        placed: dict[str, Any] = {"device": device, "dtype": dtype, "graphs": graphs, "compile": compile}
        said: dict[str, Any] = {"distilled": self.distilled or "auto", "offline": self.offline}
        said["attention"] = attention
        return StoryModel.open(self.model, loras=loras, **named, **placed, **said)


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


def flag(name: str) -> str:
    """The option of a parameter."""
    return "--" + name.replace("_", "-")
