"""What of a model a tuning trains: the history encoder and low-rank updates of the UNet, made ready and written."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from fastory.checkpoints.history import History, image_processor
from fastory.checkpoints.history_encoder import HistoryEncoder
from fastory.errors import InputError
from fastory.models.torch_model import StoryModel
from fastory.tuning.sizes import HistorySizes
from fastory.tuning.training_module import TrainingModule

RANK = 8
# The parts of an encoder that the base brings which learn; of a new encoder, and of an adapter's own, everything does.
LEARNS = ("type_embeddings.", "time_embeddings.", "local_attention.", "adapter.")
LEARNS_WITHIN = (".crossattention.self.", ".crossattention.output.dense.")


def prepare(
    model: StoryModel,
    sizes: HistorySizes,
    rank: int | None,
    longest: int,
    seed: int,
    self_attention: bool = False,
    freeze_encoder: bool = False,
) -> set[str]:
    """Give `model` the history encoder and the low-rank updates that will be trained, and freeze all else.

    longest: frames of the longest window. Returns the encoder's weights that the base brings: an adapter need not have
    them. Raises InputError where sizes, rank and what the model brings do not fit.
    """
    model.family.require_causal(model.name)
    history, tensors = start(model, sizes)
    if freeze_encoder and history is None:
        raise InputError(
            "--freeze-encoder: the history encoder would be new and stay as it is; wanted --adapter, or a base that has one"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = history.encoder if history else None
        grown = new_encoder(model, sizes, longest) if encoder is None else extended(encoder, sizes)
        of_base = brought(history, tensors)
        teach(grown, whole=not of_base and not freeze_encoder, within=not freeze_encoder)
        rank = rank_of(tensors, rank)
        model.unet.requires_grad_(False)
        if rank:
            add_updates(model.unet, rank, tensors, self_attention)
    tokenizer = history.tokenizer if history else model.pipeline.tokenizer
    attached = History(grown.to(model.device), tokenizer, image_processor(grown.config), {}, ())
    model.checkpoint = replace(model.checkpoint, history=attached)
    return of_base


def start(model: StoryModel, sizes: HistorySizes) -> tuple[History | None, dict[str, Tensor]]:
    """The history to begin with, None for a new one, and the tensors of the adapter it was opened with, if any."""
    history = model.checkpoint.history
    tensors: dict[str, Tensor] = {}
    for source in history.sources if history else ():
        tensors |= {k: v for k, v in load_file(source).items() if k.startswith(("history.", "unet."))}
    if not sizes.size:
        return history, tensors
    if brought(history, tensors):
        raise InputError(
            f"--history-size: {model.name} has a history encoder of its own, which an adapter cannot replace"
        )
    return None, {}


def brought(history: History | None, tensors: Mapping[str, Tensor]) -> set[str]:
    """Weights of the encoder that the base itself has and the adapter does not."""
    own = set(history.encoder.state_dict()) if history else set()
    return own - {name.removeprefix("history.") for name in tensors}


def new_encoder(model: StoryModel, sizes: HistorySizes, longest: int) -> HistoryEncoder:
    """A history encoder of the base's text width, with the base's own tokenizer.

    Its type and time embeddings begin near zero, so that the frozen UNet meets its captions as it knows them.
    """
    tokenizer = model.pipeline.tokenizer
    width = model.cross_attention_dim
    config = sizes.new(width, len(tokenizer), int(tokenizer.model_max_length), longest)
    encoder = HistoryEncoder(config)
    nn.init.zeros_(encoder.type_embeddings.weight)
    nn.init.normal_(encoder.time_embeddings.weight, std=0.02)
    return encoder.eval()


def extended(encoder: HistoryEncoder, sizes: HistorySizes) -> HistoryEncoder:
    """The given encoder, or one with its weights and the parts that it lacks."""
    config = sizes.over(encoder.config)
    if config == encoder.config:
        return encoder
    grown = HistoryEncoder(config)
    grown.load_state_dict(encoder.state_dict(), strict=False)
    return grown.eval()


def teach(encoder: HistoryEncoder, whole: bool, within: bool = True) -> None:
    """Mark what learns: all of a new encoder or an adapter's own (`whole`); of the base's, what LEARNS names.

    within: what LEARNS_WITHIN names as well.
    """
    for name, parameter in encoder.named_parameters():
        part = name.startswith(LEARNS) or (within and any(inner in name for inner in LEARNS_WITHIN))
        parameter.requires_grad_(part or whole)


def rank_of(tensors: Mapping[str, Tensor], rank: int | None) -> int:
    """The rank of the updates. Raises InputError where it is not that of the adapter the tuning starts from."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A")}
    if not ranks:
        return RANK if rank is None else rank
    if len(ranks) > 1 or rank not in (None, *ranks):
        had = ", ".join(map(str, sorted(ranks)))
        raise InputError(f"--rank: the adapter to start from has low-rank updates of rank {had}, got {rank}")
    return ranks.pop()


def add_updates(unet: Any, rank: int, tensors: Mapping[str, Tensor], self_attention: bool = False) -> None:
    """Low-rank updates (peft) of every cross-attention's four matrices, beginning with the given ones, else at zero.

    self_attention: of the self-attentions' as well; always where the given ones have some.
    """
    # alpha = rank: peft's scaling is 1, and B A is what is added to the weight.
    both = self_attention or any(".attn1." in name for name in tensors)
    pattern = r"\.(to_q|to_k|to_v|to_out\.0)"
    layers = r".*\.attn[12]" if both else r".*\.attn2"
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers + pattern))
    updates = {n.removeprefix("unet."): tensor for n, tensor in tensors.items() if n.startswith("unet.")}
    set_peft_model_state_dict(unet, {f"{name}.weight": tensor for name, tensor in updates.items()})


def adapter_file(
    module: TrainingModule, of_base: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file that --adapter opens (fastory/checkpoints/history.py).

    What learned, and of the encoder also what did not but is not in `of_base`, the base's own.
    A second key of metadata would stand before or behind the first by chance, and equal weights must be equal bytes.
    """
    tensors = {
        f"history.{name}": parameter
        for name, parameter in module.encoder.named_parameters()
        if parameter.requires_grad or name not in of_base
    }
    if hasattr(module.unet, "peft_config"):  # rank 0 has no updates
        updates = get_peft_model_state_dict(module.unet, save_embedding_layers=False)
        tensors |= {f"unet.{name.removesuffix('.weight')}": tensor for name, tensor in updates.items()}
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return copies, {"history": json.dumps(module.encoder.config.as_dict())}
