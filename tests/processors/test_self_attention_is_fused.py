"""Risk: one product in place of three draws another picture, hides a LoRA, or reaches into a pipeline that is not ours."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from random_models import random_model
from torch import Tensor, nn

from fastory.models.copies import causal_copy, unet_copy
from fastory.processors.fused import fuse_self_attention, is_fused
from fastory.processors.projected import SelfAttention
from fastory.runtime import Placement

CPU, META = torch.device("cpu"), torch.device("meta")


def layer(dtype: torch.dtype, width: int = 64, heads: int = 2) -> Attention:
    torch.manual_seed(0)
    return Attention(width, heads=heads, dim_head=width // heads, processor=SelfAttention()).to(dtype).eval()


def fused(attn: Attention) -> Attention:
    made = copy.deepcopy(attn)
    fuse_self_attention(made)
    assert is_fused(made)
    return made


def allowed(attn: Attention, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Of each element of the output, a priori, against float64; every term by its source.

    u: the type's rounding, s: that of float32, in which a product of n terms is summed: gamma = n s, whatever the order.
    Q, K and V err by (u + gamma) of the sum of their terms' sizes. A logit q k' / sqrt d then errs by twice as much of
    |q| |k|', and by its own sum; softmax turns an error e of logits into a factor of at most exp(2 e). The sum over values
    rounds P, itself and V; to_out once more. All sums are of sizes, so they bound whatever cancels.
    """
    u, s = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    x, exact = hidden.double().abs(), copy.deepcopy(attn).double()
    weights = [part.weight.abs() for part in (exact.to_q, exact.to_k, exact.to_v, exact.to_out[0])]
    q, k, v = (functional_heads(x @ w.T, attn.heads) for w in weights[:3])
    width, tokens = hidden.shape[-1], hidden.shape[1]
    project = u + width * s
    logit = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).amax() * (2 * project + q.shape[-1] * s + u)
    factor = torch.expm1(2 * logit) + 3 * u + project + tokens * s
    size = v.amax(2, keepdim=True).expand(-1, -1, tokens, -1)  # weights sum up to 1
    out = size.transpose(1, 2).flatten(2) @ weights[3].T
    bias = exact.to_out[0].bias.abs()
    return out * (factor + u + width * s) + (out + bias) * u


def functional_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_one_product_equals_three(dtype: torch.dtype) -> None:
    """Both within what rounding allows of the layer in float64."""
    attn, hidden = layer(dtype), torch.randn(2, 37, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = copy.deepcopy(attn).double()(hidden.double())
    for made in (attn, fused(attn)):
        error = (made(hidden).double() - exact).abs()
        assert (error <= allowed(attn, hidden, dtype)).all(), (error / allowed(attn, hidden, dtype)).max()


@torch.inference_mode()
def test_the_parts_are_views_and_a_unet_that_shared_them_keeps_its_own() -> None:
    shared = layer(torch.float32)
    made = unet_copy(nn.ModuleList([shared]))
    before = shared.to_k.weight
    fuse_self_attention(made)
    attn = made[0]
    assert is_fused(attn) and not is_fused(shared) and shared.to_k.weight is before
    assert torch.equal(attn.to_k.weight, before)
    assert attn.to_k.weight.untyped_storage().data_ptr() == attn.to_qkv.weight.untyped_storage().data_ptr()
    assert not any(weight.requires_grad for weight in (attn.to_qkv.weight, attn.to_k.weight))


@torch.inference_mode()
def test_what_stands_in_a_projections_place_is_called() -> None:
    """As a LoRA that is being trained does."""
    attn, hidden = fused(layer(torch.float32)), torch.randn(1, 5, 64)
    whole = attn(hidden)
    attn.to_v = nn.Sequential(attn.to_v)
    assert not is_fused(attn)
    torch.testing.assert_close(attn(hidden), whole)
    nn.init.zeros_(attn.to_v[0].weight)
    assert not torch.equal(attn(hidden), whole)


def test_layers_with_more_than_projections_stay() -> None:
    for change in (
        {"bias": True},
        {"cross_attention_dim": 32},
        {"residual_connection": True},
        {"rescale_output_factor": 2.0},
        {"kv_heads": 1},
        {"qk_norm": "layer_norm"},
        {"norm_num_groups": 8},
        {"spatial_norm_dim": 8},
    ):
        attn = Attention(64, heads=2, dim_head=32, processor=SelfAttention(), **change)
        fuse_self_attention(attn)
        assert not is_fused(attn)


def test_a_cpu_keeps_three_products_and_other_devices_have_one() -> None:
    """Runs on a CPU have the bytes that they had."""
    for device, expected in ((CPU, False), (META, True)):
        model = random_model("small-sd15", Placement(device, torch.float32, 1))
        found = {
            is_fused(attn)
            for name, attn in model.unet.named_modules()
            if isinstance(attn, Attention) and name.endswith("attn1")
        }
        assert found == {expected}


class Updated:
    """What causal_copy reads of a model."""

    def __init__(self, unet: nn.Module, updates: dict[str, Tensor]) -> None:
        self.unet, self.updates, self.device = unet, updates, META

    def require_history(self) -> Updated:
        return self


@torch.inference_mode()
def test_updates_of_causal_mode_reach_the_joined_weight() -> None:
    model = random_model("small-sd15", Placement(CPU, torch.float32, 1))
    fuse_self_attention(model.unet)
    name, other = [n for n, m in model.unet.named_modules() if n.endswith("attn1")][:2]
    update = torch.randn(model.unet.get_submodule(name).to_v.weight.shape)
    made = causal_copy(Updated(model.unet, {f"{name}.to_v": update}))  # type: ignore[arg-type]
    ours, before = made.unet.get_submodule(name), model.unet.get_submodule(name)
    query, keys, values = before.to_qkv.weight.chunk(3)
    assert torch.equal(ours.to_qkv.weight, torch.cat([query, keys, values + update]))
    assert made.unet.get_submodule(name).to_qkv is not before.to_qkv
    assert is_fused(ours) and torch.equal(values, before.to_v.weight)
    same = [unet.get_submodule(other).to_qkv.weight for unet in (made.unet, model.unet)]
    assert same[0] is same[1]  # no update, no copy
