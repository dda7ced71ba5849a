"""A weight that lands in the wrong place, or a size misread, shows in the numbers: against the equations in float64,
written out from the checkpoint's own key names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from original_causal_layout import (
    LAYERS,
    PATCH,
    SIDE,
    VISION,
    bert_tokenizer,
    weights,
    write_checkpoint,
    write_config,
)
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, gelu, group_norm, layer_norm

from fastory import StoryModel
from fastory.checkpoints import convert_checkpoint

Weights = Mapping[str, Tensor]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CAPTIONS = ["a fox swims in the sea", "pororo and loopy sleeps", ""]


@pytest.fixture(scope="module", params=[False, True], ids=["linear", "1x1"])
def original(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return weights(convolutions=request.param)


@pytest.fixture(scope="module")
def model(original: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> StoryModel:
    folder = tmp_path_factory.mktemp("ar-ldm")
    checkpoint = write_checkpoint(folder / "story.ckpt", original)
    return StoryModel.open(
        str(convert_checkpoint(checkpoint, folder / "model", config=write_config(folder / "config")))
    )


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, keys: Tensor | None = None) -> Tensor:
    """softmax(Q K' / sqrt d) V over heads; keys (B, n): the places that may be looked at."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if keys is not None:
        scores = scores.masked_fill(~keys[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def picture_tokens(w: Weights, pixels: Tensor) -> Tensor:
    """BLIP's ViT: (B, 3, h, w) -> (B, 1 + patches, 192)."""
    p = "mm_encoder.visual_encoder"
    patches = conv2d(pixels, w[f"{p}.patch_embed.proj.weight"], w[f"{p}.patch_embed.proj.bias"], stride=PATCH)
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{p}.cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{p}.pos_embed"]
    for n in range(LAYERS):
        b = f"{p}.blocks.{n}"
        q, k, v = linear(w, f"{b}.attn.qkv", norm(w, f"{b}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(w, f"{b}.attn.proj", attention(q, k, v, VISION // 64))
        x = x + linear(w, f"{b}.mlp.fc2", gelu(linear(w, f"{b}.mlp.fc1", norm(w, f"{b}.norm2", x, 1e-6))))
    return norm(w, f"{p}.norm", x, 1e-6)


def multimodal(w: Weights, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
    """m_n: BERT's layers over the caption, each looking at the picture between attention and MLP; norms come after."""
    p, picture = "mm_encoder.text_encoder", picture_tokens(w, pixels)
    e = f"{p}.embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.position_embeddings.weight"][: ids.shape[1]]
    x = norm(w, f"{e}.LayerNorm", x, 1e-12)
    for n in range(LAYERS):
        layer = f"{p}.encoder.layer.{n}"
        for kind, seen, keys in (("attention", None, mask == 1), ("crossattention", picture, None)):
            a = f"{layer}.{kind}"
            source = x if seen is None else seen
            q = linear(w, f"{a}.self.query", x)
            k, v = (linear(w, f"{a}.self.{name}", source) for name in ("key", "value"))
            out = linear(w, f"{a}.output.dense", attention(q, k, v, x.shape[-1] // 64, keys))
            x = norm(w, f"{a}.output.LayerNorm", x + out, 1e-12)
        out = linear(w, f"{layer}.output.dense", gelu(linear(w, f"{layer}.intermediate.dense", x)))
        x = norm(w, f"{layer}.output.LayerNorm", x + out, 1e-12)
    return x


def doubled(w: Weights) -> dict[str, Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in w.items()}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Three captions of a batch as BLIP takes them, padded to 85 tokens, [ENC] first; and three pictures."""
    words = bert_tokenizer()
    text = words(CAPTIONS, padding="max_length", max_length=85, return_tensors="pt")
    ids = text.input_ids
    ids[:, 0] = words.convert_tokens_to_ids("[ENC]")
    torch.manual_seed(1)
    return ids, text.attention_mask, torch.randn(len(CAPTIONS), 3, SIDE, SIDE)


@torch.no_grad()
def test_masked_and_padded_captions_with_pictures(original: Weights, model: StoryModel) -> None:
    ids, mask, pixels = inputs()
    encoder = model.require_history().encoder
    exact = multimodal(doubled(original), ids, mask, pixels.double())
    # Another order of operations in float32 is as far from float64 as our own float32 is, up to a small factor.
    tolerance = 4 * (multimodal(original, ids, mask, pixels) - exact).abs().max()
    assert tolerance < 1e-4
    assert (encoder.multimodal(ids, mask, pixels) - exact).abs().max() <= tolerance
    # In float64 a wrong epsilon (1e-5 for 1e-6) shows too: it moves values by about 1e-6.
    ours = encoder.double().multimodal(ids, mask, pixels.double())
    encoder.float()
    assert (ours - exact).abs().max() <= 1000 * torch.finfo(torch.float64).eps * exact.abs().max()
    everything = multimodal(doubled(original), ids, torch.ones_like(mask), pixels.double())
    assert (everything - exact).abs().max() > 100 * tolerance  # the check can fail: the mask matters


@torch.no_grad()
def test_a_frame_as_causal_mode_encodes_it(original: Weights, model: StoryModel) -> None:
    """Caption and picture through our own preparation: [ENC], padding, BLIP's normalisation."""
    torch.manual_seed(2)
    shades = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8)
    pixels = (shades.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    ids, mask, _ = inputs()
    exact = multimodal(doubled(original), ids[1:2], mask[1:2], pixels.permute(2, 0, 1)[None])
    seen = model.encode_frame(CAPTIONS[1], Image.fromarray(shades.numpy()))
    assert torch.equal(seen.padding, mask[1:2] == 0)
    assert (seen.tokens - exact).abs().max() < 1e-4
    assert (
        seen.tokens - multimodal(original, ids[:1], mask[:1], pixels.float().permute(2, 0, 1)[None])
    ).abs().max() > 0.1


def test_embeddings_of_type_and_time(original: Weights, model: StoryModel) -> None:
    encoder = model.require_history().encoder
    kind, place = original["modal_type_embeddings.weight"], original["time_embeddings.weight"]
    assert torch.equal(encoder.positions(), kind[1] + place)
    assert torch.equal(encoder.type_embeddings.weight, kind)
    assert encoder.local_attention is None and encoder.adapter is None


@torch.no_grad()
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_attention_of_the_autoencoder(original: Weights, model: StoryModel, half: str) -> None:
    w, name = doubled(original), f"vae.{half}.mid_block.attentions.0"
    torch.manual_seed(4)
    x = torch.randn(2, 64, 6, 6).double()
    flat = group_norm(x, 32, w[f"{name}.group_norm.weight"], w[f"{name}.group_norm.bias"], 1e-6)
    flat = flat.flatten(2).transpose(1, 2)
    q, k, v = (linear(w, f"{name}.{part}", flat) for part in ("query", "key", "value"))
    exact = x + linear(w, f"{name}.proj_attn", attention(q, k, v, 1)).transpose(1, 2).unflatten(2, (6, 6))
    layer = getattr(model.vae, half).mid_block.attentions[0]
    assert (layer(x.float()) - exact).abs().max() < 1e-5


def test_every_other_weight_is_the_checkpoints_own(original: Weights, model: StoryModel) -> None:
    for part, prefix in (("unet", "unet."), ("text_encoder", "text_encoder.text_model.")):
        ours = getattr(model.pipeline, part).state_dict()
        given = {k.removeprefix(prefix): v for k, v in original.items() if k.startswith(prefix)}
        given.pop("embeddings.position_ids", None)
        assert ours.keys() == given.keys()
        assert all(torch.equal(ours[name], given[name]) for name in given)


def test_sharing_and_half_precision_arrive(tmp_path: Path) -> None:
    """Tensors that share memory, lie across it, or are in float16 are the same numbers afterwards."""
    given = {k: v.half() if v.is_floating_point() else v for k, v in weights().items()}
    first = "unet.mid_block.resnets.0.norm1.weight"
    given["unet.mid_block.resnets.1.norm1.weight"] = given[first]
    turned = "unet.time_embedding.linear_2.weight"
    given[turned] = given[turned].T
    checkpoint = write_checkpoint(tmp_path / "story.ckpt", given)
    folder = convert_checkpoint(checkpoint, tmp_path / "model", config=write_config(tmp_path / "config"))
    opened = StoryModel.open(str(folder), dtype="float32").unet.state_dict()
    for name in (first, "unet.mid_block.resnets.1.norm1.weight", turned):
        assert torch.equal(opened[name.removeprefix("unet.")], given[name].float())
