"""fastory.install: diffusers' own pipelines draw with our operator what they draw without it.

Tolerance 1e-5 in float32: two orders of summation differ by some 1e-6 (in float64 by 1e-14), a wrong weight, mask or
group by 1e-2. Every comparison also counts the calls of the operator, since two stock calls are equal as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import fastory

TOLERANCE = 1e-5
FAMILIES = ("sd15", "sdxl")
PATCHES = 17  # of the small encoder: 4 x 4 and the class token
PIPELINES = {
    "sd15": {
        "txt2img": StableDiffusionPipeline,
        "img2img": StableDiffusionImg2ImgPipeline,
        "inpaint": StableDiffusionInpaintPipeline,
        "controlnet": StableDiffusionControlNetPipeline,
    },
    "sdxl": {
        "txt2img": StableDiffusionXLPipeline,
        "img2img": StableDiffusionXLImg2ImgPipeline,
        "inpaint": StableDiffusionXLInpaintPipeline,
        "controlnet": StableDiffusionXLControlNetPipeline,
    },
}


class Calls(TorchDispatchMode):
    """Counts the calls of our operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.fastory.grca.default
        return func(*args, **(kwargs or {}))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, side: int = 32) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def attn2(unet: UNet2DConditionModel) -> list[str]:
    return [name for name in unet.attn_processors if name.endswith("attn2.processor")]


@pytest.fixture
def load(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A stock pipeline of small random weights with the IP-Adapters of the given kinds."""

    def loaded(family: str, *kinds: str) -> Any:
        folder: Path = request.getfixturevalue(f"{family}_folder")
        pipe = PIPELINES[family]["txt2img"].from_pretrained(folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        if kinds:
            files = [request.getfixturevalue(f"{family}_adapter_{kind}") for kind in kinds]
            pipe.load_ip_adapter(
                [str(file.parent) for file in files],
                subfolder=[""] * len(files),
                weight_name=[file.name for file in files],
                image_encoder_folder=None,
            )
        return pipe

    return loaded


KEPT: dict[tuple[str, ...], Any] = {}


@pytest.fixture
def kept(load: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The same, opened once, for tests that leave it as it was but for the scales."""

    def opened(*which: str) -> Any:
        pipe = KEPT[which] = KEPT.get(which) or load(*which)
        pipe.set_ip_adapter_scale([1.0] * (len(which) - 1))
        return pipe

    yield opened
    for pipe in KEPT.values():
        fastory.uninstall(pipe)


def embeds(pipe: Any, kind: str, count: int, seed: int = 5) -> torch.Tensor:
    """Image embeddings (2, count, ...) of which the first row is the unconditional one."""
    config = pipe.image_encoder.config
    shape = (config.projection_dim,) if kind == "base" else (PATCHES, config.hidden_size)
    both = random(2, count, *shape, seed=seed)
    both[0] = 0
    return both


@torch.no_grad()
def predict(
    pipe: Any, images: list[torch.Tensor], size: tuple[int, int] = (8, 8), **kwargs: Any
) -> torch.Tensor:
    """One UNet call on an unconditional and a conditional row. kwargs: cross_attention_kwargs, or of the call."""
    unet = pipe.unet
    added: dict[str, Any] = {"image_embeds": images}
    if unet.config.addition_embed_type == "text_time":
        added |= {"text_embeds": random(2, 48, seed=3), "time_ids": torch.full((2, 6), 64.0)}
    text = random(2, 9, unet.config.cross_attention_dim, seed=2)
    return unet(random(2, 4, *size, seed=1), 301, text, added_cond_kwargs=added, **kwargs).sample


def compare(pipe: Any, draw: Callable[[], torch.Tensor], calls: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the stock pipeline draws and what ours does, which took `calls` calls of the operator."""
    expected = draw()
    fastory.install(pipe)
    with Calls() as counted:
        got = draw()
    fastory.uninstall(pipe)
    assert counted.count == calls
    return expected, got


def same_as_stock(pipe: Any, images: list[torch.Tensor], **kwargs: Any) -> torch.Tensor:
    """Raises unless ours is diffusers' within the tolerance, in every layer; returns the difference references make."""
    expected, got = compare(pipe, lambda: predict(pipe, images, **kwargs), len(attn2(pipe.unet)))
    assert (got - expected).abs().max() < TOLERANCE
    pipe.set_ip_adapter_scale([0.0] * len(images))
    kwargs.pop("cross_attention_kwargs", None)
    return (predict(pipe, images, **kwargs) - expected).abs().max()


@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("family", FAMILIES)
def test_references_of_one_adapter_share_a_softmax(kept: Any, family: str, kind: str, count: int) -> None:
    pipe = kept(family, kind)
    pipe.set_ip_adapter_scale(0.6)
    assert same_as_stock(pipe, [embeds(pipe, kind, count)]) > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_two_adapters_have_their_own_scales(kept: Any, family: str) -> None:
    pipe = kept(family, "base", "plus")
    images = [embeds(pipe, "base", 3), embeds(pipe, "plus", 2)]
    for scales in ([0.7, 0.3], [0.0, 0.9], [0.4, 0.0]):
        pipe.set_ip_adapter_scale(scales)
        assert same_as_stock(pipe, images) > 100 * TOLERANCE


def halves(count: int, side: int = 64) -> torch.Tensor:
    """(1, count, side, side) of zeros and ones: every mask its own part."""
    mask = torch.zeros(1, count, side, side)
    for n in range(count):
        mask[0, n, :, n * side // count : (n + 1) * side // count] = 1
    return mask


MASKS = {
    "zeros and ones": halves,
    "fractions": lambda count: random(1, count, 64, 64, seed=4).sigmoid(),
    "another aspect": lambda count: halves(count)[:, :, :40],
}


@pytest.mark.filterwarnings("ignore:The aspect ratio of the mask")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_references_have_a_softmax_each(kept: Any, family: str, count: int, masks: str) -> None:
    pipe = kept(family, "base")
    alone = [0.0] * count
    alone[count // 8] = 0.9  # the third of 16 strips is one that a layer of 4 x 4 sees
    scales = (0.8, [[0.1 + n / count for n in range(count)]], [alone])
    for scale in scales:
        pipe.set_ip_adapter_scale(scale)
        kwargs = {"ip_adapter_masks": [MASKS[masks](count)]}
        changed = same_as_stock(pipe, [embeds(pipe, "base", count)], cross_attention_kwargs=kwargs)
        assert changed > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_one_of_two_adapters_is_masked(kept: Any, family: str) -> None:
    pipe = kept(family, "base", "plus")
    images = [embeds(pipe, "base", 2), embeds(pipe, "plus", 3)]
    for masks, scales in (
        ([halves(2), None], [0.7, 0.5]),
        ([None, halves(3)], [0.7, [0.2, 0.0, 0.9]]),
        ([halves(2), halves(3)], [[0.3, 0.6], 0.5]),
        ([halves(2), halves(3)], [[0.0, 0.0], 0.5]),
    ):
        pipe.set_ip_adapter_scale(scales)
        kwargs = {"ip_adapter_masks": masks}
        assert same_as_stock(pipe, images, cross_attention_kwargs=kwargs) > 100 * TOLERANCE


def test_masks_as_one_tensor_for_one_reference_an_adapter(kept: Any) -> None:
    pipe = kept("sd15", "base", "plus")
    images = [embeds(pipe, "base", 1), embeds(pipe, "plus", 1)]
    kwargs = {"ip_adapter_masks": halves(2).transpose(0, 1)}
    assert same_as_stock(pipe, images, cross_attention_kwargs=kwargs) > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_layers(kept: Any, family: str) -> None:
    pipe = kept(family, "base")
    images = [embeds(pipe, "base", 3)]
    one_block = {"up": {"block_1" if family == "sd15" else "block_0": 0.8}}
    pipe.set_ip_adapter_scale(one_block)
    on = sum(bool(pipe.unet.attn_processors[name].scale[0]) for name in attn2(pipe.unet))
    assert 0 < on < len(attn2(pipe.unet))
    expected, got = compare(pipe, lambda: predict(pipe, images), on)
    assert (got - expected).abs().max() < TOLERANCE
    fastory.install(pipe)  # and set while it is installed
    pipe.set_ip_adapter_scale(0.5)
    again = predict(pipe, images)
    pipe.set_ip_adapter_scale(one_block)
    assert torch.equal(predict(pipe, images), got)
    assert (again - got).abs().max() > 100 * TOLERANCE


def test_scale_zero_is_the_stock_code(kept: Any) -> None:
    pipe = kept("sd15", "base")
    pipe.set_ip_adapter_scale(0.0)
    expected, got = compare(pipe, lambda: predict(pipe, [embeds(pipe, "base", 3)]), 0)
    assert torch.equal(got, expected)


def test_scales_of_references_without_masks_are_masks_of_ones(kept: Any) -> None:
    pipe = kept("sd15", "base")
    images = [embeds(pipe, "base", 3)]
    pipe.set_ip_adapter_scale([[0.2, 0.5, 0.9]])
    with pytest.raises(TypeError):
        predict(pipe, images)
    ones = {"ip_adapter_masks": [torch.ones(1, 3, 64, 64)]}
    expected = predict(pipe, images, cross_attention_kwargs=ones)
    fastory.install(pipe)
    assert (predict(pipe, images) - expected).abs().max() < TOLERANCE


def draw_by(pipe: Any, kind: str, family: str, **kwargs: Any) -> torch.Tensor:
    """Latents of a whole pipeline of this kind, with the components of `pipe`."""
    classes, components = PIPELINES[family], dict(pipe.components)
    # Euler's latents begin 14 times as large, and rounding with them.
    components["scheduler"] = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if family == "sdxl":
        components["add_watermarker"] = False
    else:
        components["requires_safety_checker"] = False
    image, mask = pictures(1, 64)[0], Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 40, 64))
    inputs: dict[str, dict[str, Any]] = {
        "txt2img": {"height": 64, "width": 64},
        "img2img": {"image": image, "strength": 0.9},
        "inpaint": {"image": image, "mask_image": mask, "strength": 0.9, "height": 64, "width": 64},
        "controlnet": {"image": image},
    }
    if kind == "controlnet":
        components["controlnet"] = controlnet(pipe.unet)
    drawn = classes[kind](**components)
    drawn.set_progress_bar_config(disable=True)
    return drawn(
        prompt="a fox in the forest",
        negative_prompt="rabbit",
        num_inference_steps=3,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **inputs[kind],
        **kwargs,
    ).images


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet whose outputs are not zero, as a new one's are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        plain = UNet2DConditionModel.from_config(
            {k: v for k, v in unet.config.items() if k != "encoder_hid_dim_type"}
        )
        made = ControlNetModel.from_unet(plain)
        for parameter in made.controlnet_down_blocks.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return made


@pytest.mark.parametrize("kind", ["txt2img", "img2img", "inpaint", "controlnet"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_pipelines(kept: Any, family: str, kind: str) -> None:
    pipe = kept(family, "base", "plus")
    pipe.set_ip_adapter_scale([[0.2, 0.5, 0.9], 0.4])
    whole = pipe.image_processor.preprocess(pictures(1, 64)[0])
    masks = IPAdapterMaskProcessor().preprocess(pictures(3, 64), height=64, width=64)
    assert whole.shape[-2:] == masks.shape[-2:]
    references = {
        "ip_adapter_image": [pictures(3), pictures(1)],
        "cross_attention_kwargs": {"ip_adapter_masks": [masks.transpose(0, 1), None]},
    }
    steps = 2 if kind in ("img2img", "inpaint") else 3  # 0.9 of 3 steps
    calls = steps * len(attn2(pipe.unet))
    expected, got = compare(pipe, lambda: draw_by(pipe, kind, family, **references), calls)
    assert (got - expected).abs().max() < TOLERANCE
    pipe.set_ip_adapter_scale([0.0, 0.0])
    assert (draw_by(pipe, kind, family, **references) - expected).abs().max() > 100 * TOLERANCE


def test_embeddings_made_beforehand(kept: Any) -> None:
    pipe = kept("sd15", "base")
    ready = pipe.prepare_ip_adapter_image_embeds([pictures(16)], None, torch.device("cpu"), 1, True)
    kwargs = {"ip_adapter_image_embeds": ready}
    expected, got = compare(
        pipe, lambda: draw_by(pipe, "txt2img", "sd15", **kwargs), 3 * len(attn2(pipe.unet))
    )
    assert (got - expected).abs().max() < TOLERANCE


def test_what_is_installed_can_be_taken_away(load: Any) -> None:
    pipe = load("sd15", "base", "plus")
    processors, keys = dict(pipe.unet.attn_processors), list(pipe.unet.state_dict())
    generator = torch.get_rng_state()
    fastory.install(pipe)
    installed = dict(pipe.unet.attn_processors)
    assert [name for name in processors if installed[name] is not processors[name]] == attn2(pipe.unet)
    fastory.install(pipe)
    assert all(now is installed[name] for name, now in pipe.unet.attn_processors.items())
    assert list(pipe.unet.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(ValueError, match="image_embeds must have the same length"):
        predict(pipe, [])
    pipe.set_ip_adapter_scale([0.25, 0.5])
    fastory.uninstall(pipe)
    fastory.uninstall(pipe)
    assert all(now is processors[name] for name, now in pipe.unet.attn_processors.items())
    assert list(pipe.unet.state_dict()) == keys
    assert {tuple(processors[name].scale) for name in attn2(pipe.unet)} == {(0.25, 0.5)}


def test_adapters_can_be_unloaded_and_loaded_while_installed(load: Any, sd15_adapter_plus: Path) -> None:
    pipe = load("sd15", "base")
    fastory.install(pipe)
    feature_extractor, image_encoder = pipe.feature_extractor, pipe.image_encoder
    pipe.unload_ip_adapter()
    fastory.uninstall(pipe)
    assert {type(found).__name__ for found in pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    with pytest.raises(fastory.InputError, match="load_ip_adapter"):
        fastory.install(pipe)
    plain = load("sd15")
    assert torch.equal(draw_by(pipe, "txt2img", "sd15"), draw_by(plain, "txt2img", "sd15"))
    pipe.register_modules(image_encoder=image_encoder, feature_extractor=feature_extractor)
    pipe.load_ip_adapter(str(sd15_adapter_plus.parent), subfolder="", weight_name=sd15_adapter_plus.name)
    assert same_as_stock(pipe, [embeds(pipe, "plus", 2)]) > 100 * TOLERANCE


def test_weights_loaded_and_types_changed_while_installed_count(load: Any) -> None:
    pipe = load("sd15", "base")
    images = [embeds(pipe, "base", 2)]
    fastory.install(pipe)
    before = predict(pipe, images)
    weights = {name: value * 2 for name, value in pipe.unet.state_dict().items() if "to_v_ip" in name}
    pipe.unet.load_state_dict(weights, strict=False)
    got = predict(pipe, images)
    fastory.uninstall(pipe)
    assert (predict(pipe, images) - got).abs().max() < TOLERANCE < (got - before).abs().max()
    fastory.install(pipe)
    pipe.to(torch.float64)
    assert pipe.unet.attn_processors[attn2(pipe.unet)[0]].to_k_ip[0].weight.dtype == torch.float64


@pytest.mark.parametrize(
    "extra", ["residual_connection", "rescale_output_factor", "norm_cross", "group_norm"]
)
def test_a_layer_unlike_the_others_is_left_to_stock_code(load: Any, extra: str) -> None:
    pipe = load("sd15", "base")
    name = attn2(pipe.unet)[2].removesuffix(".processor")
    layer = pipe.unet.get_submodule(name)
    values = {
        "residual_connection": True,
        "rescale_output_factor": 2.0,
        "norm_cross": torch.nn.LayerNorm(32),
        "group_norm": torch.nn.GroupNorm(4, layer.to_q.in_features),
    }
    plain = predict(pipe, [embeds(pipe, "base", 3)])
    setattr(layer, extra, values[extra])
    calls = len(attn2(pipe.unet)) - 1
    expected, got = compare(pipe, lambda: predict(pipe, [embeds(pipe, "base", 3)]), calls)
    assert (got - expected).abs().max() < TOLERANCE
    assert (plain - expected).abs().max() > 100 * TOLERANCE


def test_a_mask_of_the_text_is_left_to_stock_code(kept: Any) -> None:
    pipe = kept("sd15", "base")
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[:, 5:] = False
    images = [embeds(pipe, "base", 3)]
    plain = predict(pipe, images)
    expected, got = compare(pipe, lambda: predict(pipe, images, encoder_attention_mask=seen), 0)
    assert torch.equal(got, expected)
    assert (plain - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "masks", [[halves(2)], [halves(3), halves(3)], [halves(3)[0]], ["sky"], [halves(3).repeat(3, 1, 1, 1)]]
)
def test_what_diffusers_refuses_is_refused_in_its_words(kept: Any, masks: list[Any]) -> None:
    pipe = kept("sd15", "base")
    images, kwargs = [embeds(pipe, "base", 3)], {"ip_adapter_masks": masks}
    with pytest.raises(Exception) as expected:  # whatever diffusers raises
        predict(pipe, images, cross_attention_kwargs=kwargs)
    fastory.install(pipe)
    with pytest.raises(expected.type) as got:
        predict(pipe, images, cross_attention_kwargs=kwargs)
    assert str(got.value) == str(expected.value)


def test_without_a_unet_or_an_adapter_it_is_refused(load: Any) -> None:
    for wrong in (object(), load("sd15").vae, load("sd15").text_encoder, None):
        for door in (fastory.install, fastory.uninstall):
            with pytest.raises(fastory.InputError, match="UNet"):
                door(wrong)
    with pytest.raises(fastory.InputError, match="load_ip_adapter"):
        fastory.install(load("sd15"))


def test_gradients_pass_as_in_the_stock_code(kept: Any) -> None:
    pipe = kept("sd15", "base")
    images = [embeds(pipe, "base", 2)]
    pipe.set_ip_adapter_scale(0.37)
    weights = [pipe.unet.attn_processors[name].to_k_ip[0].weight for name in attn2(pipe.unet)]

    def gradients() -> list[torch.Tensor]:
        text = random(2, 9, 32, seed=2)
        out = pipe.unet(random(2, 4, 8, 8, seed=1), 301, text, added_cond_kwargs={"image_embeds": images})
        return list(torch.autograd.grad(out.sample.square().mean(), weights))

    expected = gradients()
    fastory.install(pipe)
    with torch.inference_mode():  # whose tensors no backward pass takes
        predict(pipe, images)
    for ours, stock in zip(gradients(), expected, strict=True):
        assert (ours - stock).abs().max() < TOLERANCE
        assert stock.abs().max() > 0
