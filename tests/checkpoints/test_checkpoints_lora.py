"""A LoRA that is loaded but not in effect, or in effect with another weight, is seen only in the pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fastory.checkpoints import attn2_layers, open_checkpoint
from fastory.errors import InputError

STOCK = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
TARGETS = ["to_q", "to_k", "to_v", "proj_in", "conv1"]  # linear layers and convolutions


def write_lora(family: str, folder: Path, path: Path, seed: int) -> Path:
    """A LoRA of rank 2 on the UNet and the first text encoder, saved as diffusers' training scripts save it."""
    pipeline = STOCK[family].from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False)
        pipeline.unet.add_adapter(unet)
        text = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
        pipeline.text_encoder.add_adapter(text)
    STOCK[family].save_lora_weights(
        path.parent,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
        weight_name=path.name,
    )
    return path


@pytest.fixture(scope="module")
def loras(
    sd15_folder: Path, sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Path]]:
    target = tmp_path_factory.mktemp("loras")
    folders = {"sd15": sd15_folder, "sdxl": sdxl_folder}
    return {
        family: [write_lora(family, folder, target / f"{family}-{seed}.safetensors", seed) for seed in (1, 2)]
        for family, folder in folders.items()
    }


def draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red fox", num_inference_steps=2, output_type="latent", generator=generator).images


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_two_weighted_loras_draw_what_diffusers_draws(
    family: str, loras: dict[str, list[Path]], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    stock = STOCK[family].from_pretrained(folder)
    plain = draw(stock)
    for name, path in zip("ab", loras[family], strict=True):
        stock.load_lora_weights(path, adapter_name=name)
    stock.set_adapters(["a", "b"], [0.7, -0.4])
    wanted = draw(stock)
    given = [(str(loras[family][0]), 0.7), (str(loras[family][1]), -0.4)]
    checkpoint = open_checkpoint(str(folder), loras=given)
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(draw(checkpoint.pipeline), wanted, rtol=0, atol=1e-4)
    assert list(checkpoint.sources[-2:]) == loras[family]


def test_loras_of_different_parts_are_both_in_effect(
    sd15_folder: Path, loras: dict[str, list[Path]], tmp_path: Path
) -> None:
    """Most LoRAs are for the UNet alone; the text encoder then knows only the other one."""
    for part in ("unet", "text_encoder"):
        weights = {name: w for name, w in load_file(loras["sd15"][0]).items() if name.startswith(f"{part}.")}
        save_file(weights, tmp_path / f"{part}.safetensors")
    given = [(str(tmp_path / f"{part}.safetensors"), 0.7) for part in ("unet", "text_encoder")]
    apart = draw(open_checkpoint(str(sd15_folder), loras=given).pipeline)
    whole = draw(open_checkpoint(str(sd15_folder), loras=[(str(loras["sd15"][0]), 0.7)]).pipeline)
    torch.testing.assert_close(apart, whole, rtol=0, atol=1e-5)


def test_weight_zero_changes_nothing(sd15_folder: Path, loras: dict[str, list[Path]]) -> None:
    checkpoint = open_checkpoint(str(sd15_folder), loras=[(str(loras["sd15"][0]), 0.0)])
    assert torch.equal(draw(checkpoint.pipeline), draw(StableDiffusionPipeline.from_pretrained(sd15_folder)))


def test_layers_are_plain_linear_ones_afterwards(sd15_folder: Path, loras: dict[str, list[Path]]) -> None:
    """All layers' K and V are projected by one matrix product of their weights, which must hold the LoRA."""
    pipeline = open_checkpoint(str(sd15_folder), loras=[(str(loras["sd15"][0]), 1.0)]).pipeline
    plain = attn2_layers(open_checkpoint(str(sd15_folder)).pipeline.unet)
    for name, layer in attn2_layers(pipeline.unet).items():
        assert type(layer.to_k) is torch.nn.Linear and type(layer.to_v) is torch.nn.Linear
        assert not torch.equal(layer.to_k.weight, plain[name].to_k.weight)
        assert not layer.to_k.weight.requires_grad
    assert not hasattr(pipeline.unet, "peft_config")


def test_adapter_still_fits_a_fused_model(
    sd15_folder: Path, sd15_adapter_base: Path, loras: dict[str, list[Path]]
) -> None:
    checkpoint = open_checkpoint(
        str(sd15_folder), ip_adapter=str(sd15_adapter_base), loras=[(str(loras["sd15"][0]), 1.0)]
    )
    assert checkpoint.adapter is not None and len(checkpoint.adapter.key_weights) == 7


def test_kohya_layout_is_read_with_its_alpha(
    sd15_folder: Path, loras: dict[str, list[Path]], tmp_path: Path
) -> None:
    """The layout most files on model sites have; alpha / rank scales the product."""
    kohya, half = {}, {}
    for name, weight in load_file(loras["sd15"][0]).items():
        module, _, rest = name.rpartition(".lora_")
        if "to_k" not in module:
            continue
        flat = "lora_unet_" + module.removeprefix("unet.").replace(".", "_")
        kohya[f"{flat}.lora_{'down' if rest.startswith('A') else 'up'}.weight"] = weight
        kohya[f"{flat}.alpha"] = torch.tensor(1.0)
        half[name] = weight
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(half, tmp_path / "diffusers.safetensors")
    # Rank 2 and alpha 1: the product counts half.
    opened = open_checkpoint(str(sd15_folder), loras=[(str(tmp_path / "kohya.safetensors"), 1.0)])
    wanted = open_checkpoint(str(sd15_folder), loras=[(str(tmp_path / "diffusers.safetensors"), 0.5)])
    torch.testing.assert_close(draw(opened.pipeline), draw(wanted.pipeline), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("of", "on"), [("sd15", "sdxl"), ("sdxl", "sd15")])
def test_lora_of_the_other_family_is_refused(
    of: str, on: str, loras: dict[str, list[Path]], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{on}_folder")
    with pytest.raises(InputError, match=r"does not fit this .* model"):
        open_checkpoint(str(folder), loras=[(str(loras[of][0]), 1.0)])


BAD = {
    "no-part": {"other.lora_A.weight": torch.zeros(2, 32), "other.lora_B.weight": torch.zeros(32, 2)},
    "no-layer": {
        "unet.none.lora_A.weight": torch.zeros(2, 32),
        "unet.none.lora_B.weight": torch.zeros(32, 2),
    },
    "no-pair": {"unet.conv_in.lora_magnitude": torch.zeros(2)},
    "no-tensor": {},
    "no-lora": {"conv_in.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("case", BAD)
def test_lora_that_matches_no_layer_is_refused(case: str, sd15_folder: Path, tmp_path: Path) -> None:
    """diffusers loads such a file with a warning at most, and the pictures do not change."""
    save_file(BAD[case], tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"lora\.safetensors does not fit this Stable Diffusion 1\.5 model"):
        open_checkpoint(str(sd15_folder), loras=[(str(tmp_path / "lora.safetensors"), 1.0)])


def test_lora_that_finds_only_some_of_its_layers_is_refused(
    sd15_folder: Path, loras: dict[str, list[Path]], tmp_path: Path
) -> None:
    weights = load_file(loras["sd15"][0])
    weights |= {
        f"text_encoder_2.encoder.layers.0.self_attn.q_proj.lora_{side}.weight": torch.zeros(shape)
        for side, shape in (("A", (2, 40)), ("B", (40, 2)))
    }
    save_file(weights, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"of its .* layers are layers of the model"):
        open_checkpoint(str(sd15_folder), loras=[(str(tmp_path / "lora.safetensors"), 1.0)])


def test_other_kinds_are_refused_by_name(
    sd15_folder: Path, sd15_adapter_base: Path, loras: dict[str, list[Path]], tmp_path: Path
) -> None:
    """diffusers drops the magnitudes of a DoRA with a warning, which draws something else."""
    weights = load_file(loras["sd15"][0]) | {"unet.conv_in.dora_scale": torch.ones(1)}
    save_file(weights, tmp_path / "dora.safetensors")
    for path, kind in ((tmp_path / "dora.safetensors", "DoRA"), (sd15_adapter_base, "IP-Adapter")):
        with pytest.raises(InputError, match=f"of kind {kind}"):
            open_checkpoint(str(sd15_folder), loras=[(str(path), 1.0)])


def test_pickled_lora_is_refused_with_its_command(sd15_folder: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "lora.bin")
    with pytest.raises(InputError, match=f"fastory convert {tmp_path / 'lora.bin'}"):
        open_checkpoint(str(sd15_folder), loras=[(str(tmp_path / "lora.bin"), 1.0)])
