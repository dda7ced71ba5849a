"""An adapter of another model or encoder draws noise or fails deep inside: refuse it by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import image_encoder, write_adapter

from fastory.checkpoints import open_checkpoint
from fastory.errors import InputError


def refused(model: Path, adapter: Path, encoder: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(
            str(model), ip_adapter=str(adapter), image_encoder=str(encoder) if encoder else None, offline=True
        )
    return str(caught.value)


def changed(adapter: Path, path: Path, **changes: torch.Tensor | None) -> Path:
    weights = load_file(adapter) | changes
    save_file({name: weight for name, weight in weights.items() if weight is not None}, path)
    return path


def test_adapter_of_the_other_family(sd15_folder: Path, sdxl_adapter_base: Path) -> None:
    message = refused(sd15_folder, sdxl_adapter_base)
    assert "made for text width 64" in message and "text width 32" in message


def test_published_text_widths_are_named_by_family(
    sd15_folder: Path, sd15_adapter_base: Path, tmp_path: Path
) -> None:
    wide = {"image_proj.proj.weight": torch.zeros(4 * 2048, 24), "image_proj.norm.weight": torch.ones(2048)}
    assert "SDXL" in refused(sd15_folder, changed(sd15_adapter_base, tmp_path / "a.safetensors", **wide))


def test_adapter_with_fewer_layers(sd15_folder: Path, sd15_adapter_base: Path, tmp_path: Path) -> None:
    last = {f"ip_adapter.13.{part}.weight": None for part in ("to_k_ip", "to_v_ip")}
    message = refused(sd15_folder, changed(sd15_adapter_base, tmp_path / "a.safetensors", **last))
    assert "6 attention layers" in message and "has 7" in message


@pytest.mark.parametrize("weight", [None, torch.zeros(48, 32)])
def test_adapter_with_a_layer_missing_or_of_another_shape(
    weight: torch.Tensor | None, sd15_folder: Path, sd15_adapter_base: Path, tmp_path: Path
) -> None:
    adapter = changed(
        sd15_adapter_base, tmp_path / "a.safetensors", **{"ip_adapter.3.to_v_ip.weight": weight}
    )
    assert "ip_adapter.3.to_v_ip.weight" in refused(sd15_folder, adapter)


def test_plus_adapter_with_a_projection_key_missing(
    sd15_folder: Path, sd15_adapter_plus: Path, tmp_path: Path
) -> None:
    key = "image_proj.layers.2.1.3.weight"
    assert "layers.2" in refused(
        sd15_folder, changed(sd15_adapter_plus, tmp_path / "a.safetensors", **{key: None})
    )


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("image_proj.proj.0.weight", "FaceID"),
        ("image_proj.proj.3.weight", "Full Face"),
        ("image_proj.perceiver_resampler.proj_in.weight", "FaceID Plus"),
    ],
)
def test_face_adapters_are_refused_by_kind(
    key: str, kind: str, sd15_folder: Path, sd15_adapter_base: Path, tmp_path: Path
) -> None:
    adapter = changed(sd15_adapter_base, tmp_path / "a.safetensors", **{key: torch.zeros(4, 4)})
    assert f"of kind {kind};" in refused(sd15_folder, adapter)


def test_base_adapter_of_another_number_of_tokens(
    sd15_folder: Path, sd15_adapter_base: Path, tmp_path: Path
) -> None:
    eight = {"image_proj.proj.weight": torch.zeros(8 * 32, 24), "image_proj.proj.bias": torch.zeros(8 * 32)}
    assert "this one 8" in refused(
        sd15_folder, changed(sd15_adapter_base, tmp_path / "a.safetensors", **eight)
    )


def test_file_that_is_no_adapter(sd15_folder: Path) -> None:
    message = refused(sd15_folder, sd15_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert "is not an IP-Adapter" in message and "image_proj.*" in message


def test_adapter_of_no_known_layout(sd15_folder: Path, sd15_adapter_base: Path, tmp_path: Path) -> None:
    for change in ({"norm.weight": None}, {"proj.weight": torch.zeros(3)}):
        named = {f"image_proj.{key}": weight for key, weight in change.items()}
        message = refused(sd15_folder, changed(sd15_adapter_base, tmp_path / "a.safetensors", **named))
        assert "not a base or Plus IP-Adapter" in message


def test_folder_given_as_adapter(sd15_folder: Path) -> None:
    assert "is a folder; wanted a .safetensors file" in refused(sd15_folder, sd15_folder / "unet")


def test_pickled_adapter_is_refused_with_its_command(
    sd15_folder: Path, sd15_adapter_base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "my adapter.bin"
    torch.save(load_file(sd15_adapter_base), path)
    assert f"fastory convert '{path}'" in refused(sd15_folder, path)


def test_adapter_that_was_cut_short(sd15_folder: Path, sd15_adapter_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(sd15_adapter_base.read_bytes()[:-1])
    assert "not a whole safetensors file" in refused(sd15_folder, path)


def test_adapter_that_is_nowhere(sd15_folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(sd15_folder, tmp_path / "a.safetensors")
    assert "not in the hub's cache" in refused(sd15_folder, Path("owner/name/a.safetensors"))


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_encoder_of_another_width(
    kind: str, sd15_folder: Path, sdxl_folder: Path, request: pytest.FixtureRequest
) -> None:
    adapter = request.getfixturevalue(f"sd15_adapter_{kind}")
    message = refused(sd15_folder, adapter, sdxl_folder / "image_encoder")
    wanted, came = {"base": ("projection width 24", "40"), "plus": ("hidden width 40", "48")}[kind]
    assert f"wants an image encoder of {wanted}; " in message and came in message
    assert "--image-encoder" in message


def test_published_encoders_are_named(sd15_folder: Path, sd15_adapter_base: Path, tmp_path: Path) -> None:
    """The usual mistake: an SDXL *_vit-h adapter beside the ViT-bigG encoder, or the other way round."""
    of_h = {"image_proj.proj.weight": torch.zeros(4 * 32, 1024)}
    image_encoder(32, 1280).save_pretrained(tmp_path / "bigG")
    adapter = changed(sd15_adapter_base, tmp_path / "a.safetensors", **of_h)
    message = refused(sd15_folder, adapter, tmp_path / "bigG")
    assert "1024 (CLIP ViT-H/14)" in message and "1280 (CLIP ViT-bigG/14)" in message


def test_no_encoder_anywhere(sd15_folder: Path, sd15_adapter_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd15_folder, tmp_path / "model")
    shutil.rmtree(folder / "image_encoder")
    message = refused(folder, sd15_adapter_base)
    assert "none was found" in message and str(folder / "image_encoder") in message
    assert "--image-encoder" in message


def test_given_encoder_that_is_no_folder_of_one(
    sd15_folder: Path, sd15_adapter_base: Path, tmp_path: Path
) -> None:
    assert "config.json" in refused(sd15_folder, sd15_adapter_base, tmp_path)


def test_encoder_is_found_in_the_published_layout(sd15_folder: Path, tmp_path: Path) -> None:
    """In h94/IP-Adapter sdxl_models/*_vit-h adapters use models/image_encoder, not the one beside them."""
    folder = shutil.copytree(sd15_folder, tmp_path / "model")
    (tmp_path / "models").mkdir()
    adapter = write_adapter(folder, "base", tmp_path / "sdxl_models" / "a_vit-h.safetensors")
    (folder / "image_encoder").rename(tmp_path / "models" / "image_encoder")
    image_encoder(32, 40).save_pretrained(tmp_path / "sdxl_models" / "image_encoder")
    checkpoint = open_checkpoint(str(folder), ip_adapter=str(adapter))
    assert checkpoint.image_encoder is not None
    assert checkpoint.image_encoder.config.projection_dim == 24
    assert tmp_path / "models" / "image_encoder" / "model.safetensors" in checkpoint.sources
