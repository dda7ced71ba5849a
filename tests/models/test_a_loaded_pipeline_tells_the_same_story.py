"""StoryModel.from_pipeline: the story of the same weights in a folder, and a pipeline that never notices."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.embeddings import IPAdapterFaceIDImageProjection
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import fastory
from fastory import InputError, Story, StoryModel, generate
from fastory.events import FrameDrawn

STOCK = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
FAMILIES = tuple(STOCK)
CAPTIONS = ["a fox in the forest", "the fox sleeps"]


@pytest.fixture
def load(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A stock pipeline of small random weights with the IP-Adapters of the given kinds."""

    def loaded(family: str, *kinds: str) -> Any:
        pipe = STOCK[family].from_pretrained(
            request.getfixturevalue(f"{family}_folder"), local_files_only=True
        )
        files = [request.getfixturevalue(f"{family}_adapter_{kind}") for kind in kinds]
        if files:
            pipe.load_ip_adapter(
                [str(file.parent) for file in files],
                subfolder=[""] * len(files),
                weight_name=[file.name for file in files],
                image_encoder_folder=None,
            )
        return pipe

    return loaded


@pytest.fixture(scope="module")
def lora(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on the UNet's linear and convolution layers and on the text encoder."""
    pipe = StableDiffusionPipeline.from_pretrained(sd15_folder)
    file = tmp_path_factory.mktemp("loras") / "lora.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for part, targets in (
            (pipe.unet, ["to_q", "to_k", "conv1", "linear_1"]),
            (pipe.text_encoder, ["q_proj", "fc1"]),
        ):
            part.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    pipe.save_lora_weights(
        file.parent,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        weight_name=file.name,
    )
    return file


def story(model: StoryModel, **options: Any) -> list[bytes]:
    """Every picture of a story of two frames, a round with references where the model takes them."""
    iterations = 1 if model.adapter else 0
    events = generate(Story.from_captions(CAPTIONS), model=model, steps=2, iterations=iterations, **options)
    return [event.image.tobytes() for event in events if isinstance(event, FrameDrawn)]


def apart(one: list[bytes], other: list[bytes]) -> int:
    """The largest difference of two stories' pictures, in grey levels."""
    pixels = [np.frombuffer(b"".join(pictures), np.uint8).astype(int) for pictures in (one, other)]
    return int(np.abs(pixels[0] - pixels[1]).max())


def stock_picture(pipe: Any) -> bytes:
    """What the pipeline itself draws, with a reference where it has an IP-Adapter."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    references = {"ip_adapter_image": [Image.fromarray(noise)]} if pipe.unet.encoder_hid_proj else {}
    generator = torch.Generator().manual_seed(1)
    drawn = pipe("a fox", num_inference_steps=2, generator=generator, output_type="np", **references).images
    return drawn.tobytes()


def state(pipe: Any) -> dict[str, Any]:
    """Everything of a pipeline that drawing could disturb."""
    found: dict[str, Any] = {"config": dict(pipe.config), "bar": getattr(pipe, "_progress_bar_config", None)}
    for name, part in pipe.components.items():
        found[name] = id(part)
        if not isinstance(part, torch.nn.Module):
            found[f"{name} says"] = str(getattr(part, "config", part))
            continue
        found[f"{name} config"] = (
            dict(part.config.items() if hasattr(part.config, "items") else {}),
            str(part.config),
        )
        found[f"{name} modules"] = [
            (key, id(module), type(module), module.training) for key, module in part.named_modules()
        ]
        found[f"{name} weights"] = [
            (key, id(w), w.data_ptr(), w.dtype, w.device, w.requires_grad, digest(w))
            for key, w in part.named_parameters()
        ]
    found["processors"] = {name: id(p) for name, p in pipe.unet.attn_processors.items()}
    found["conditioning"] = pipe.unet.config.encoder_hid_dim_type
    return found


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("kind", [None, "base", "plus"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_story_is_that_of_the_folder(
    load: Any, family: str, kind: str | None, request: pytest.FixtureRequest
) -> None:
    adapter = str(request.getfixturevalue(f"{family}_adapter_{kind}")) if kind else None
    folder = request.getfixturevalue(f"{family}_folder")
    expected = story(StoryModel.open(str(folder), ip_adapter=adapter))
    got = story(StoryModel.from_pipeline(load(family, *([kind] if kind else []))))
    assert len(got) == (4 if kind else 2)
    assert got == expected


def test_loras_are_as_the_pipeline_weights_them(load: Any, lora: Path, sd15_folder: Path) -> None:
    pipe = load("sd15")
    plain = story(StoryModel.from_pipeline(pipe))
    pipe.load_lora_weights(lora, adapter_name="a")
    pipe.set_adapters(["a"], [0.6])
    stock = stock_picture(pipe)
    before = state(pipe)
    got = story(StoryModel.from_pipeline(pipe))
    # Not by the byte: merged weights lie elsewhere in memory, and the CPU rounds by that.
    assert apart(got, story(StoryModel.open(str(sd15_folder), loras=[(str(lora), 0.6)]))) <= 1
    assert apart(got, plain) > 20
    assert state(pipe) == before
    assert stock_picture(pipe) == stock
    pipe.disable_lora()
    assert apart(story(StoryModel.from_pipeline(pipe)), plain) <= 1
    pipe.unload_lora_weights()
    assert story(StoryModel.from_pipeline(pipe)) == plain


def test_loras_already_fused_count_once(load: Any, lora: Path) -> None:
    pipe = load("sd15")
    pipe.load_lora_weights(lora, adapter_name="a")
    got = story(StoryModel.from_pipeline(pipe))
    pipe.fuse_lora()
    assert apart(story(StoryModel.from_pipeline(pipe)), got) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_never_changes(load: Any, family: str) -> None:
    pipe = load(family, "base")
    pipe.set_progress_bar_config(desc="mine")
    pipe.set_ip_adapter_scale(0.7)
    pipe.vae.enable_slicing()
    pipe.unet.train()
    stock = stock_picture(pipe)
    before = state(pipe)
    model = StoryModel.from_pipeline(pipe)
    assert state(pipe) == before
    drawn = story(model)
    assert state(pipe) == before
    assert stock_picture(pipe) == stock
    model.release()
    assert state(pipe) == before
    assert stock_picture(pipe) == stock
    assert story(StoryModel.from_pipeline(pipe)) == drawn
    fastory.install(pipe)
    assert story(StoryModel.from_pipeline(pipe)) == drawn


def test_weights_are_shared_and_what_was_copied_is_freed(load: Any, lora: Path) -> None:
    pipe = load("sd15", "base")
    pipe.load_lora_weights(lora)
    model = StoryModel.from_pipeline(pipe)
    places = {
        w.data_ptr()
        for part in pipe.components.values()
        if hasattr(part, "parameters")
        for w in part.parameters()
    }
    copied = [key for key, w in model.unet.named_parameters() if w.data_ptr() not in places]
    assert copied
    assert all(any(target in key for target in ("to_q", "to_k", "conv1", "linear_1")) for key in copied)
    adapter, encoder = model.adapter, model.checkpoint.image_encoder
    assert adapter is not None
    assert encoder is not None
    shared = [*adapter.key_weights, *adapter.value_weights, *encoder.parameters(), *model.vae.parameters()]
    assert {w.data_ptr() for w in shared} <= places
    held = [weakref.ref(model.unet), weakref.ref(model.layers.layers[0].attn)]
    model.release()
    gc.collect()
    assert [one() for one in held] == [None, None]
    with pytest.raises(InputError, match="released"):
        story(model)


def test_sdxl_in_float16_decodes_in_float32(load: Any) -> None:
    pipe = load("sdxl").to(torch.float16)
    before = state(pipe)
    model = StoryModel.from_pipeline(pipe)
    assert (model.dtype, model.vae.dtype) == (torch.float16, torch.float32)
    assert state(pipe) == before


def test_hashes_are_of_the_weights_drawn_with(load: Any, lora: Path, tmp_path: Path) -> None:
    pipe = load("sd15", "base")
    hashes = StoryModel.from_pipeline(pipe).hashes
    assert set(hashes) == {"unet", "vae", "text_encoder", "image_encoder", "ip_adapter"}
    assert len(set(hashes.values())) == 5
    assert StoryModel.from_pipeline(load("sd15", "base")).hashes == hashes

    def changed() -> set[str]:
        now = StoryModel.from_pipeline(pipe).hashes
        return {part for part in hashes if now[part] != hashes[part]}

    with torch.no_grad():
        pipe.vae.decoder.conv_in.bias[0] += 1e-3
    assert changed() == {"vae"}
    with torch.no_grad():
        next(p for p in pipe.unet.attn_processors.values() if hasattr(p, "to_v_ip")).to_v_ip[0].weight[0] *= 2
    assert changed() == {"vae", "ip_adapter"}
    pipe.load_lora_weights(lora)
    assert changed() == {"vae", "ip_adapter", "unet", "text_encoder"}


def test_a_run_folder_knows_its_pipeline_again(load: Any, tmp_path: Path) -> None:
    drawn = story(StoryModel.from_pipeline(load("sd15", "base")), output=tmp_path / "run")
    assert len(drawn) == 4
    assert story(StoryModel.from_pipeline(load("sd15", "base")), output=tmp_path / "run") == []
    pipe = load("sd15", "base")
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1
    with pytest.raises(InputError, match="other weights"):
        story(StoryModel.from_pipeline(pipe), output=tmp_path / "run")


def wrong_class(pipe: Any) -> Any:
    return StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)


def no_pipeline(pipe: Any) -> Any:
    return pipe.unet


def another_vae(pipe: Any) -> Any:
    pipe.vae = AutoencoderTiny()
    return pipe


def offloaded(pipe: Any) -> Any:
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    return pipe


def cast_by_layer(pipe: Any) -> Any:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    return pipe


def quantized(pipe: Any) -> Any:
    layer = pipe.unet.conv_in
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return pipe


def in_float64(pipe: Any) -> Any:
    return pipe.to(torch.float64)


def inpainting(pipe: Any) -> Any:
    pipe.unet.register_to_config(in_channels=9)
    return pipe


def no_encoder(pipe: Any) -> Any:
    pipe.image_encoder = None
    return pipe


def face_id(pipe: Any) -> Any:
    pipe.unet.encoder_hid_proj.image_projection_layers[0] = IPAdapterFaceIDImageProjection(24, 32)
    return pipe


def default_processors(pipe: Any) -> Any:
    pipe.unet.set_attn_processor(type(pipe.unet.attn_processors[next(iter(pipe.unet.attn_processors))])())
    return pipe


REFUSED = {
    wrong_class: "from_pipe",
    no_pipeline: "got UNet2DConditionModel",
    another_vae: "AutoencoderTiny",
    offloaded: "remove_all_hooks",
    cast_by_layer: "remove_all_hooks",
    quantized: "int8",
    in_float64: "float64",
    inpainting: "9 channels",
    no_encoder: "image_encoder",
    face_id: "FaceID",
    default_processors: "set_default_attn_processor",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_used_is_refused(load: Any, spoil: Callable[[Any], Any]) -> None:
    with pytest.raises(InputError, match=REFUSED[spoil]):
        StoryModel.from_pipeline(spoil(load("sd15", "base")))


def test_two_adapters_are_refused(load: Any) -> None:
    with pytest.raises(InputError, match=r"2 IP-Adapters.*fastory\.install"):
        StoryModel.from_pipeline(load("sd15", "base", "plus"))


def test_an_encoder_of_another_width_is_refused(load: Any) -> None:
    pipe, other = load("sd15", "base"), load("sdxl")
    pipe.register_modules(image_encoder=other.image_encoder)
    with pytest.raises(InputError, match=r"width 24.*gives 40"):
        StoryModel.from_pipeline(pipe)
