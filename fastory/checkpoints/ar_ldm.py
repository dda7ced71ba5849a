"""An AR-LDM or Causal-Story training checkpoint (Lightning) into a model folder that causal mode opens.

unet.*                        UNet2DConditionModel, today's names
vae.*                         AutoencoderKL, the attention's names those of old: query, key, value, proj_attn
text_encoder.*                CLIPTextModel, with or without text_model.
mm_encoder.visual_encoder.*   BLIP's ViT, history/ vision.*
mm_encoder.text_encoder.*     BLIP's BERT with cross-attention, history/ text.*
modal_type_embeddings.weight  (2, C_x), history/ type_embeddings.weight
time_embeddings.weight        (frames, C_x), history/ time_embeddings.weight

Such a checkpoint has neither local causal attention nor adapter. What is left over, or lacking, ends the conversion.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from fastory import files
from fastory.checkpoints.ar_ldm_configs import MULTIMODAL, VISION, Configs, Shapes, read_configs
from fastory.checkpoints.ar_ldm_tokenizers import caption_tokenizer, history_tokenizer
from fastory.checkpoints.checkpoint import DEFAULTS_FILE, DEFAULTS_SCHEMA
from fastory.checkpoints.history_encoder import HistoryEncoder
from fastory.checkpoints.loading import loading
from fastory.checkpoints.writing import (
    DOING,
    HINT,
    KEPT,
    RECORD,
    digest_of_configs,
    holds_conversion,
    names_below,
    refuse_other_files,
    write_record,
)
from fastory.errors import InputError
from fastory.settings import PRESETS

MARKS = ("mm_encoder.", "modal_type_embeddings.", "time_embeddings.")
# Known, and not needed: the network of the FID score, buffers that count positions, and the unconditional inputs (an empty
# caption's ids, a black picture), which causal mode makes itself.
DROPPED = re.compile(
    r"inception\..+|(text_encoder|mm_encoder\.text_encoder)\.(.+\.)?position_ids|[^.]*null[^.]*"
)
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# transformers' names of BLIP's picture encoder, and BLIP's own.
OLD_VISION = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "post_layernorm": "norm",
}
LISTED = 5


def is_ar_ldm(names: Iterable[str]) -> bool:
    """Whether a checkpoint has the parts of a history beside a UNet's."""
    return any(name.startswith(MARKS) for name in names)


def convert_ar_ldm(
    path: Path,
    tensors: Mapping[str, Tensor],
    output: Path,
    *,
    config: Path | None = None,
    overwrite: bool = False,
    offline: bool = False,
) -> Path:
    """Writes the model of a checkpoint's tensors as a folder and returns its path; it appears whole or not at all.

    config: a folder that may hold tokenizer/ and blip_tokenizer/ (or history/tokenizer/), and configs of a diffusers
    folder to use instead of those that the shapes tell. Without tokenizers the hub is asked. Raises InputError for keys
    that are missing or unknown, tokenizers of another size, and an output that is there already, unless it is what the
    same checkpoint gave. Only a folder that an earlier conversion wrote is ever replaced.
    """
    if output.suffix == ".safetensors":
        raise InputError(f"{path} becomes a folder, not a file; give another name than {output}")
    files.finish_interrupted(output, DOING, HINT)
    hashes = files.sha256_of(path), digest_of_configs(config)
    if not overwrite and holds_conversion(output, *hashes):
        return output
    _check_output(path, output, config, overwrite)
    kept = {name: tensor for name, tensor in tensors.items() if not DROPPED.fullmatch(name)}
    configs = read_configs(Shapes(kept, path), config)
    with loading(f"{path}: its sizes are not those of the classes; other configs can be given by --config"):
        parts = _empty_parts(configs)
    for part, weights in _accounted(path, parts, kept).items():
        with loading(f"{path}: {part} cannot be made of its tensors"):
            parts[part].load_state_dict(weights, assign=True)  # still on the disk, not copied
    text = configs.text_encoder
    words = caption_tokenizer(config, text["vocab_size"], text["max_position_embeddings"], offline=offline)
    history_words = history_tokenizer(config, configs.history.text["vocab_size"], offline=offline)
    with loading(f"{output} cannot be written"), _whole_folder(output, overwrite, *hashes) as folder:
        _write_history(parts["history"], history_words, folder)
        _write_pipeline(parts, words, configs, folder, path.stem)
    return output


def _check_output(path: Path, output: Path, config: Path | None, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise InputError(f"{output} exists; give another output, or --overwrite to replace it")
    for used in (path, *([config] if config is not None else [])):
        if used.resolve().is_relative_to(output.resolve()):
            raise InputError(f"{used} lies in {output}, which --overwrite would replace; give another output")
    refuse_other_files(output)


def _empty_parts(configs: Configs) -> dict[str, nn.Module]:
    """The modules without memory: their names and shapes are what the checkpoint must hold."""
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(dict(configs.unet)),
            "vae": AutoencoderKL.from_config(dict(configs.vae)),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(dict(configs.text_encoder))),
            "history": HistoryEncoder(configs.history),
        }


def _accounted(
    path: Path, parts: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of every part under its own names. Raises InputError unless they are all that is wanted, and no more."""
    found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    used: dict[str, int] = {}
    missing, other = [], []
    for part, module in parts.items():
        for name, wanted in module.state_dict().items():
            names = original_names(part, name)
            original = next((known for known in names if known in tensors), None)
            if original is None:
                missing.append(names[0])
                continue
            tensor = _alone(_as_linear(tensors[original], wanted), used)
            if tensor.shape != wanted.shape:
                other.append(f"{original} {tuple(tensor.shape)} for {tuple(wanted.shape)}")
            used[original] = tensor.untyped_storage().data_ptr()
            found[part][name] = tensor
    kinds = {"missing": missing, "unknown": sorted(tensors.keys() - used.keys()), "of another shape": other}
    if any(kinds.values()):
        raise InputError(
            f"{path} is not the model that its sizes tell, nothing is written: {_listed(kinds)}. It is incomplete, of "
            "another model, or needs configs by --config"
        )
    return found


def _listed(kinds: Mapping[str, list[str]]) -> str:
    return "; ".join(
        f"{len(names)} {'key is' if len(names) == 1 else 'keys are'} {kind} ({', '.join(names[:LISTED])}"
        f"{', ...' if len(names) > LISTED else ''})"
        for kind, names in kinds.items()
        if names
    )


def original_names(part: str, name: str) -> tuple[str, ...]:
    """What a weight may be called in a checkpoint, by its name in our module; the usual one first."""
    if part == "vae":
        return f"vae.{_replaced(name, OLD_ATTENTION)}", f"vae.{name}"
    if part == "text_encoder":
        bare = name.removeprefix("text_model.")
        return f"text_encoder.text_model.{bare}", f"text_encoder.{bare}"
    if part == "unet":
        return (f"unet.{name}",)
    kind, _, rest = name.partition(".")
    if kind == "vision":
        return (VISION + _replaced(rest, OLD_VISION),)
    return ({"text": MULTIMODAL, "type_embeddings": "modal_type_embeddings."}.get(kind, f"{kind}.") + rest,)


def _replaced(name: str, table: Mapping[str, str]) -> str:
    for new, old in table.items():
        name = name.replace(new, old)
    return name


def _as_linear(tensor: Tensor, wanted: Tensor) -> Tensor:
    """The weight of a 1x1 convolution (c, c, 1, 1) where a linear layer's (c, c) is wanted."""
    if wanted.ndim == 2 and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor


def _alone(tensor: Tensor, used: Mapping[str, int]) -> Tensor:
    """In memory of its own, as safetensors wants it; copied only where it shares the memory of one before it."""
    shared = tensor.untyped_storage().data_ptr() in used.values()
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()


def _write_history(encoder: nn.Module, tokenizer: Any, folder: Path) -> None:
    history = folder / "history"
    files.make_folder(history)
    assert isinstance(encoder, HistoryEncoder)
    _write_json(history / "config.json", encoder.config.as_dict())
    weights = dict(encoder.state_dict())
    files.write(history / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
    files.write_into(history / "tokenizer", tokenizer.save_pretrained)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    files.write(path, (json.dumps(values, indent=2) + "\n").encode())


def _write_pipeline(parts: Mapping[str, Any], words: Any, configs: Configs, folder: Path, name: str) -> None:
    """The stock pipeline's folder and our defaults. The pipeline writes model_index.json last: without it nothing opens."""
    _write_json(folder / DEFAULTS_FILE, {"schema": DEFAULTS_SCHEMA, **PRESETS["ar-ldm"]})
    ids = {f"{kind}_token_id": getattr(words, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    parts["text_encoder"].config.update(ids)
    pipeline: Any = StableDiffusionPipeline(  # mypy does not see what decorators add to it
        **{part: parts[part] for part in ("unet", "vae", "text_encoder")},
        tokenizer=words,
        scheduler=DDIMScheduler.from_config(dict(configs.scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.register_to_config(_name_or_path=name)
    files.write_into(folder, pipeline.save_pretrained)


@contextmanager
def _whole_folder(output: Path, overwrite: bool, source: str, config: str | None) -> Iterator[Path]:
    """A folder beside `output` that takes its place when all is written; an old one goes only then."""
    with files.disk_errors(output, KEPT), files.unfinished(output, DOING, HINT) as working:
        if output.exists() and not overwrite:  # another process was faster
            raise InputError(f"{output} exists; give another output, or --overwrite to replace it")
        folder = working / files.NEW
        files.make_folder(folder)
        yield folder
        write_record(folder, source, config)
        mode = (folder / RECORD).stat().st_mode
        for name in names_below(folder):
            (folder / name).chmod(stat.S_IMODE(mode))
        files.sync_tree(folder)
        if output.exists():
            refuse_other_files(output)
        files.replace_folder(folder, output, working / files.OLD)
