"""Adapter weights in a wrong order draw plausible but other pictures: hold them against diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import save_file

from fastory.checkpoints import attn2_layers, open_checkpoint
from fastory.checkpoints.ip_adapter import check_adapter_fits, read_adapter_header

ADAPTERS = ["sd15_adapter_base", "sd15_adapter_plus", "sdxl_adapter_base", "sdxl_adapter_plus"]


def folder_of(adapter: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(adapter.split("_")[0] + "_folder")


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_weights_equal_those_diffusers_installs(name: str, request: pytest.FixtureRequest) -> None:
    adapter, folder = request.getfixturevalue(name), folder_of(name, request)
    stock_class = StableDiffusionXLPipeline if name.startswith("sdxl") else StableDiffusionPipeline
    stock = stock_class.from_pretrained(folder)
    stock.load_ip_adapter(adapter.parent, subfolder="", weight_name=adapter.name)
    opened = open_checkpoint(str(folder), ip_adapter=str(adapter)).adapter
    assert opened is not None
    installed = [
        processor for key, processor in stock.unet.attn_processors.items() if key.endswith("attn2.processor")
    ]
    assert len(opened.key_weights) == len(opened.value_weights) == len(installed)
    for key, value, processor in zip(opened.key_weights, opened.value_weights, installed, strict=True):
        torch.testing.assert_close(key, processor.to_k_ip[0].weight, rtol=0, atol=0)
        torch.testing.assert_close(value, processor.to_v_ip[0].weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_projected_tokens_equal_those_of_diffusers(name: str, request: pytest.FixtureRequest) -> None:
    adapter, folder = request.getfixturevalue(name), folder_of(name, request)
    stock_class = StableDiffusionXLPipeline if name.startswith("sdxl") else StableDiffusionPipeline
    stock = stock_class.from_pretrained(folder)
    stock.load_ip_adapter(adapter.parent, subfolder="", weight_name=adapter.name)
    checkpoint = open_checkpoint(str(folder), ip_adapter=str(adapter))
    assert checkpoint.adapter is not None and checkpoint.image_encoder is not None
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = checkpoint.image_encoder(pixels, output_hidden_states=True)
        of_kind = {"image_embeds": output.image_embeds, "hidden_states": output.hidden_states[-2]}
        embeds = of_kind[checkpoint.adapter.embedding]
        tokens = checkpoint.adapter.image_projection(embeds)
        wanted = stock.unet.encoder_hid_proj([embeds[:, None]])[0][:, 0]
    assert tokens.shape == (3, checkpoint.adapter.tokens, stock.unet.config.cross_attention_dim)
    assert checkpoint.adapter.tokens == (4 if name.endswith("base") else 16)
    torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ADAPTERS)
def test_unet_stays_plain(name: str, request: pytest.FixtureRequest) -> None:
    """An IP-Adapter processor or projection left on the UNet would ask for image embeddings at every call."""
    unet = open_checkpoint(
        str(folder_of(name, request)), ip_adapter=str(request.getfixturevalue(name))
    ).pipeline.unet
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert unet.encoder_hid_proj is None and unet.config.encoder_hid_dim_type is None


PUBLISHED = {
    # stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0 by their unet/config.json
    "sd15": ({"cross_attention_dim": 768, "attention_head_dim": 8}, 31),
    "sdxl": (
        {
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
        },
        139,
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_adapters_fit_published_unets(family: str, tmp_path: Path) -> None:
    """The last layer in the published files is ip_adapter.31 for SD1.5 and ip_adapter.139 for SDXL."""
    config, last = PUBLISHED[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    width = config["cross_attention_dim"]
    weights = {"image_proj.proj.weight": torch.zeros(4 * width, 1024, dtype=torch.float8_e4m3fn)}
    weights["image_proj.norm.weight"] = torch.zeros(width)
    for number, layer in zip(range(1, last + 1, 2), attn2_layers(unet).values(), strict=True):
        for part in ("to_k_ip", "to_v_ip"):
            name = f"ip_adapter.{number}.{part}.weight"
            weights[name] = torch.zeros(layer.to_k.out_features, width, dtype=torch.float8_e4m3fn)
    save_file(weights, tmp_path / "adapter.safetensors")
    check_adapter_fits(read_adapter_header(tmp_path / "adapter.safetensors"), unet)


def test_opening_an_adapter_leaves_the_callers_random_numbers_alone(
    sd15_folder: Path, sd15_adapter_plus: Path
) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    open_checkpoint(str(sd15_folder), ip_adapter=str(sd15_adapter_plus))
    assert torch.equal(torch.get_rng_state(), before)
