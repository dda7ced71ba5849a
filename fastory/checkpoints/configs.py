"""The configurations of a model folder, looked at before a library builds anything of them.

The libraries build what a config asks for before they look at its weights: 10^8 layers one by one, a table of 10^9
positions. So the sizes are first compared with the tensors that are there, by the headers of the weight files alone.
"""

from __future__ import annotations

import inspect
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from transformers import AutoTokenizer

from fastory.checkpoints.loading import loading
from fastory.checkpoints.weights import is_there, read_json
from fastory.documents import validated
from fastory.errors import InputError
from fastory.wording import shown

Shapes = Mapping[str, tuple[int, ...]]

MOST = 10_000  # pixels of a side, and steps of a schedule
MOST_IN_PART = (
    100_000  # of any number in a part's config that no tensor has as a side: a vocabulary has 49408 tokens
)
# Each of these counts modules that are built one by one, and every module has a tensor.
COUNTS = (
    "num_hidden_layers",
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "block_out_channels",
)
# What makes the libraries read, fetch or run something beside the weights. None of it is part of SD1.5 or SDXL.
ELSEWHERE = ("auto_map", "quantization_config", "compression_config", "custom_pipeline", "use_kernels")
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# Schedulers over SD's schedule of betas. One that no --scheduler names only lends its configuration.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
TOKENIZERS = (
    "BertTokenizer",
    "BertTokenizerFast",
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)
PLAIN: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,)}
TODO = "take the file anew from its source"

Size = Annotated[int, Field(ge=1, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class UNetConfig(BaseModel):
    """What fastory itself reads of unet/config.json; the rest is the library's."""

    model_config = ConfigDict(extra="ignore")

    sample_size: Annotated[Size, Field(le=MOST)] | tuple[Size, Size] | None = None
    in_channels: Size = 4
    out_channels: Size = 4
    block_out_channels: Annotated[list[Size], Field(min_length=1)] = [320, 640, 1280, 1280]
    cross_attention_dim: Size = 1280
    norm_num_groups: Size | None = 32
    time_cond_proj_dim: Size | None = None
    class_embed_type: None = None
    num_class_embeds: None = None


class VaeConfig(BaseModel):
    """What fastory itself reads of vae/config.json."""

    model_config = ConfigDict(extra="ignore")

    block_out_channels: Annotated[list[Size], Field(min_length=1)] = [64]
    latent_channels: Size = 4
    norm_num_groups: Size = 32
    scaling_factor: Annotated[Number, Field(gt=0)] = 0.18215
    latents_mean: list[Number] | None = None
    latents_std: list[Annotated[Number, Field(gt=0)]] | None = None


class SchedulerConfig(BaseModel):
    """The noise schedule of scheduler/scheduler_config.json."""

    model_config = ConfigDict(extra="ignore")

    num_train_timesteps: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 1000
    beta_start: Annotated[Number, Field(ge=0, lt=1)] = 0.0001
    beta_end: Annotated[Number, Field(ge=0, lt=1)] = 0.02
    beta_schedule: str = "linear"
    trained_betas: Annotated[list[Annotated[Number, Field(ge=0, lt=1)]], Field(max_length=MOST)] | None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    steps_offset: Annotated[int, Field(ge=0, le=MOST, strict=True)] = 0
    clip_sample: StrictBool = False
    set_alpha_to_one: StrictBool = True
    rescale_betas_zero_snr: StrictBool = False
    thresholding: StrictBool = False


def check_part(folder: Path, shapes: Shapes) -> dict[str, Any]:
    """The config.json of a part, whose weights have `shapes`. Raises InputError for sizes that these cannot have."""
    check_files(folder)
    path = folder / "config.json"
    config = read_json(path)
    check_sizes(config, shapes, path)
    _check_nothing_elsewhere(config, path)
    if is_there(folder / "adapter_config.json"):
        raise InputError(
            f"{folder / 'adapter_config.json'} would have other weights loaded in place of these; give the adapter by "
            "--lora, and remove that file"
        )
    return config


def check_sizes(config: Mapping[str, Any], shapes: Shapes, path: Path) -> None:
    """InputError for a number in `config` that is larger than any side of a tensor, or for more layers than tensors."""
    side = max([MOST_IN_PART, *(side for shape in shapes.values() for side in shape)])
    for name, value in _numbers(config):
        if isinstance(value, int) and abs(value) > side:
            raise InputError(
                f"{path}: {name} is {shown(value)}; wanted {side} or less, as the weights have it; {TODO}"
            )
    for holder in _objects(config):
        layers = 1
        for name in COUNTS:
            layers *= max(1, _count(name, holder.get(name)))
            if layers > max(1, len(shapes)):
                raise InputError(
                    f"{path}: {name} asks for {shown(layers)} layers or more, and there are {len(shapes)} tensors; {TODO}"
                )


def _count(name: str, value: Any) -> int:
    """How many modules a field asks for: a list of widths its length, a list of counts its largest or its length."""
    if isinstance(value, list):
        inner = [0] if name == "block_out_channels" else [_count(name, item) for item in value]
        return max([len(value), *inner])
    return value if isinstance(value, int) else 0


def check_values(config: Mapping[str, Any], path: Path) -> None:
    """InputError for a number beyond what a picture's preparation or a schedule can have; no weights tell more."""
    for name, value in _numbers(config):
        if isinstance(value, int) and abs(value) > MOST:
            raise InputError(f"{path}: {name} is {shown(value)}; wanted {MOST} or less; {TODO}")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield from _numbers(inner, f"{name}.{key}" if name else str(key))


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


def _check_nothing_elsewhere(config: Mapping[str, Any], path: Path) -> None:
    for name in ELSEWHERE:
        if config.get(name):
            raise InputError(
                f"{path}: {name}: wanted plain weights, got {shown(config[name])}; take the model without it"
            )
    for name in ATTENTION:
        if config.get(name) not in (None, False, "eager", "sdpa"):
            raise InputError(
                f"{path}: {name}: wanted eager or sdpa, got {shown(config[name])}; remove it, fastory has its own"
            )


def check_unet(config: Mapping[str, Any], path: Path) -> UNetConfig:
    """Raises InputError for values that could not be drawn with."""
    _check_arguments(UNet2DConditionModel, config, path)
    return validated(UNetConfig, config, path, what="the configuration of a UNet", todo=TODO)


def check_vae(config: Mapping[str, Any], path: Path) -> VaeConfig:
    """Raises InputError for values that could not be decoded with."""
    _check_arguments(AutoencoderKL, config, path)
    vae = validated(VaeConfig, config, path, what="the configuration of an AutoencoderKL", todo=TODO)
    for name, values in (("latents_mean", vae.latents_mean), ("latents_std", vae.latents_std)):
        if values is not None and len(values) != vae.latent_channels:
            raise InputError(
                f"{path}: {name}: wanted {vae.latent_channels} numbers, one a channel, got {len(values)}; {TODO}"
            )
    return vae


def _check_arguments(kind: Any, config: Mapping[str, Any], path: Path) -> None:
    """InputError for a value of another type than an argument of the class: diffusers only meets it while drawing.

    Flags are left alone: every value is one, and SDXL's own configuration has null for false.
    """
    found: dict[str, Any] = {}
    for name, argument in inspect.signature(kind.__init__).parameters.items():
        found[name] = config.get(name, argument.default)
        wanted = PLAIN.get(str(argument.annotation).removeprefix("<class '").removesuffix("'>"))
        if wanted and (not isinstance(found[name], wanted) or isinstance(found[name], bool)):
            raise InputError(f"{path}: {name}: wanted {wanted[0].__name__}, got {shown(found[name])}; {TODO}")
    levels = len(found["block_out_channels"]) if isinstance(found["block_out_channels"], list | tuple) else 0
    for name in ("down_block_types", "up_block_types"):
        blocks = found[name]
        names = isinstance(blocks, list | tuple) and all(isinstance(block, str) for block in blocks)
        if not names or len(blocks) != levels:
            raise InputError(
                f"{path}: {name}: wanted a name for each of {levels} block_out_channels, got {shown(blocks)}; {TODO}"
            )


def open_scheduler(folder: Path, class_name: str | None = None) -> Any:
    """The scheduler of a folder with a scheduler_config.json, of a class of our table.

    class_name: what the folder's index calls it; None where the config alone says. Raises InputError for a class that
    is not in the table, and for a schedule that cannot be computed.
    """
    check_files(folder)
    path = folder / "scheduler_config.json"
    values = read_json(path)
    named = values.get("_class_name")
    for name in (class_name or named, named or class_name):
        if name not in SCHEDULERS:
            raise InputError(f"{path}: the scheduler is {shown(name)}; wanted one of {', '.join(SCHEDULERS)}")
    check_values({k: v for k, v in values.items() if k != "trained_betas"}, path)
    validated(SchedulerConfig, values, path, what="the configuration of a scheduler", todo=TODO)
    kind = getattr(diffusers, str(class_name or named))
    with loading(f"{path} is not of a {kind.__name__}"):
        scheduler = kind.from_config(values)
        kind.from_config(scheduler.config).set_timesteps(2)
    return scheduler


def open_tokenizer(folder: Path, kind: Any = AutoTokenizer) -> Any:
    """The tokenizer of a folder. kind: its class, where that is known. Raises InputError where it cannot be opened."""
    check_files(folder)
    for file in sorted(folder.glob("*.json")):
        values = read_json(file)
        if values.get("auto_map"):
            raise InputError(
                f"{file}: auto_map names code of its own, which is never run; take a tokenizer without it"
            )
    config = folder / "tokenizer_config.json"
    named = read_json(config).get("tokenizer_class") if is_there(config) else None
    if named is not None and named not in TOKENIZERS:
        raise InputError(
            f"{config}: tokenizer_class is {shown(named)}; wanted one of {', '.join(TOKENIZERS)}"
        )
    with loading(f"{folder} cannot be opened as a tokenizer"):
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_tokenizer(tokenizer: Any, folder: Path, vocabulary: int | None, positions: int) -> None:
    """InputError for a tokenizer whose ids or length a text encoder does not take.

    vocabulary, positions: rows of the encoder's tables of tokens (None where they are not known) and of positions.
    """
    with loading(f"{folder} does not make tokens of a caption"):
        length, largest = int(tokenizer.model_max_length), max(tokenizer.get_vocab().values())
        ids = tokenizer(
            "a fox", padding="max_length", max_length=min(length, positions), truncation=True
        ).input_ids
    if not 3 <= length <= positions:
        raise InputError(
            f"{folder}: model_max_length: wanted 3 to {positions}, what the text encoder takes, got {shown(length)}; {TODO}"
        )
    if len(ids) != length or (
        vocabulary is not None and not 0 <= min(ids) <= max(largest, *ids) < vocabulary
    ):
        raise InputError(
            f"{folder} has tokens up to {max(largest, *ids)}, and the text encoder takes {vocabulary}; it is the tokenizer "
            "of another model"
        )


def open_processor(folder: Path, kind: Any, side: int | None = None) -> Any:
    """The preparation of pictures in a folder with a preprocessor_config.json, once tried on a small picture.

    side: of the squares that it must make, where that is known.
    """
    check_files(folder)
    path = folder / "preprocessor_config.json"
    check_values(read_json(path), path)
    with loading(f"{folder} cannot be opened as the preparation of pictures"):
        processor = kind.from_pretrained(folder, local_files_only=True)
        made = processor(Image.new("RGB", (40, 30)), return_tensors="pt").pixel_values
    wanted = (1, 3, side or made.shape[-1], side or made.shape[-1])
    if tuple(made.shape) != wanted or not bool(made.isfinite().all()):
        raise InputError(f"{path}: wanted pictures of {wanted[1:]}, it makes {tuple(made.shape[1:])}; {TODO}")
    return processor


def check_files(folder: Path) -> None:
    """InputError where something in a folder is neither a file nor a folder: a pipe would be waited for."""
    try:
        for entry in sorted(folder.iterdir()):
            mode = entry.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise InputError(f"{entry} is a pipe or a device; wanted a file, {TODO}")
    except OSError as error:
        where = error.filename or folder
        raise InputError(f"{where} cannot be read ({error.strerror or error}); {TODO}") from error
