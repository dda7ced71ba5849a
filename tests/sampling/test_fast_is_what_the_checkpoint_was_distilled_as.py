"""Risk: few steps with a checkpoint that was not made for them, or with another scheduler or guidance than it was made for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fastory import InputError, Story, StoryModel
from fastory.checkpoints.lora import LoraFile
from fastory.models.protocol import UnetSizes, distilled_as
from fastory.modes.iterative import prepare_round
from fastory.modes.mode import StoryPlan
from fastory.runs.resolve import resolve_story

CAPTION = "a rabbit in the snow"
STORY = Story.from_captions([CAPTION])


def turbo_folder(base: Path, folder: Path, kind: str, **config: str) -> Path:
    shutil.copytree(base, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    said = json.loads(path.read_text()) | {"_class_name": kind, **config}
    path.write_text(json.dumps(said))
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["diffusers", kind]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def lora(folder: Path, path: Path) -> Path:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(1)
    pipeline.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    StableDiffusionPipeline.save_lora_weights(
        path.parent, unet_lora_layers=get_peft_model_state_dict(pipeline.unet), weight_name=path.name
    )
    return path


@pytest.fixture(scope="module")
def plain_lora(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of which neither name nor header says anything, as diffusers writes it."""
    return lora(sd15_folder, tmp_path_factory.mktemp("loras") / "pytorch_lora_weights.safetensors")


def fast(model: StoryModel) -> tuple[str, int, float]:
    settings = resolve_story(model, STORY, {"iterations": 0}, preset="fast").settings
    return settings.scheduler, settings.steps, settings.guidance_scale


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_turbo_model_keeps_its_scheduler(sd15_folder: Path, tmp_path: Path, kind: str) -> None:
    made = {"timestep_spacing": "trailing", "prediction_type": "epsilon"}
    model = StoryModel.open(turbo_folder(sd15_folder, tmp_path / "turbo", kind, **made))
    assert fast(model) == ("euler" + "-ancestral" * ("Ancestral" in kind), 4, 1.0)


def test_what_was_not_distilled_is_refused(sd15_folder: Path, tmp_path: Path) -> None:
    for name, config in (
        ("leading", {"timestep_spacing": "leading"}),
        ("v", {"prediction_type": "v_prediction"}),
    ):
        made = {"timestep_spacing": "trailing", "prediction_type": "epsilon", **config}
        model = StoryModel.open(turbo_folder(sd15_folder, tmp_path / name, "EulerDiscreteScheduler", **made))
        with pytest.raises(InputError, match="preset fast wants a checkpoint that was distilled"):
            fast(model)
    with pytest.raises(InputError, match="preset fast wants"):
        fast(StoryModel.open("builtin"))


def test_an_lcm_unet_takes_the_guidance_as_an_input() -> None:
    lcm, plain = UnetSizes(4, 320, 256, None), UnetSizes(4, 320, None, None)
    assert distilled_as(lcm, LCMScheduler()) == distilled_as(lcm, DDIMScheduler(), said="none") == "lcm"
    assert (
        distilled_as(plain, LCMScheduler()) == "lcm-lora"
    )  # merged into it: no other model comes with LCM's
    assert distilled_as(plain, DDIMScheduler()) is None


def said(path: Path, **metadata: str) -> Path:
    """The same tensors, under a header that says more."""
    save_file(load_file(path), path, metadata)
    return path


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", {}),
        ("TurboMixLCM.safetensors", {}),
        ("lcmlora.safetensors", {}),
        ("style.safetensors", {"ss_output_name": "my_lcm_v2"}),
        ("style.safetensors", {"modelspec.title": "LCM LoRA"}),
        ("style.safetensors", {"modelspec.usage_hint": "LCM scheduler, 4 steps"}),
    ],
    ids=["folder", "end", "one-word", "kohya", "modelspec-title", "modelspec-hint"],
)
def test_an_lcm_lora_is_known_by_its_name_or_its_header(
    plain_lora: Path, tmp_path: Path, name: str, header: dict[str, str]
) -> None:
    path = tmp_path / "one" / "two" / "three" / name  # the name of this test is none of the last parts
    path.parent.mkdir(parents=True)
    shutil.copy(plain_lora, path)
    assert LoraFile(str(path), said(path, **header), 1.0).says_lcm


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("calcmap.safetensors", {}),
        ("hyper-sd15-4steps.safetensors", {"modelspec.title": "Hyper-SD", "ss_output_name": "malcmud"}),
        ("style.safetensors", {"ss_tag_frequency": "{'lcm': 3}"}),  # of its training pictures
    ],
    ids=["in-a-word", "other-distillation", "tags"],
)
def test_no_other_lora_is_taken_for_one(
    plain_lora: Path, tmp_path: Path, name: str, header: dict[str, str]
) -> None:
    path = Path(shutil.copy(plain_lora, tmp_path / name))
    assert not LoraFile(name, said(path, **header), 1.0).says_lcm


def test_what_the_user_says_counts_before_the_files(sd15_folder: Path, plain_lora: Path) -> None:
    """A LoRA that says nothing is refused, with what to do; then that is done. And a name that lies is overruled."""
    with pytest.raises(InputError, match=r"says none of it.*--distilled lcm-lora"):
        fast(StoryModel.open(sd15_folder, loras=[(plain_lora, 1.0)]))
    known = StoryModel.open(sd15_folder, loras=[(plain_lora, 1.0)], distilled="lcm-lora")
    assert fast(known) == ("lcm", 4, 1.0)
    again = known.on({"device": "cpu", "dtype": "float16", "graphs": False})  # opened anew, as it was
    assert again is not known and again.distilled == "lcm-lora"
    lying = plain_lora.with_name("lcm.safetensors")
    shutil.copy(plain_lora, lying)
    with pytest.raises(InputError, match="preset fast wants"):
        fast(StoryModel.open(sd15_folder, loras=[(lying, 1.0)], distilled="none"))
    with pytest.raises(InputError, match="--distilled: wanted one of auto, lcm-lora, none, got"):
        StoryModel.open(sd15_folder, distilled="turbo")


def test_a_loaded_pipeline_says_it_by_its_scheduler(sd15_folder: Path) -> None:
    """As diffusers' guide has it: the LoRA loaded under any name, and LCM's scheduler."""
    pipe = StableDiffusionPipeline.from_pretrained(sd15_folder)
    with pytest.raises(InputError, match="preset fast wants"):
        fast(StoryModel.from_pipeline(pipe))
    assert fast(StoryModel.from_pipeline(pipe, distilled="lcm-lora")) == ("lcm", 4, 1.0)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    assert fast(StoryModel.from_pipeline(pipe)) == ("lcm", 4, 1.0)


def test_an_lcm_lora_draws_what_diffusers_draws(sd15_folder: Path, tmp_path: Path) -> None:
    """The stock pipeline with the LoRA, LCMScheduler, 4 steps, no guidance; as in the LoRA tests, 1e-4 after fusing."""
    path = lora(sd15_folder, tmp_path / "lcm-lora.safetensors")
    stock = StableDiffusionPipeline.from_pretrained(sd15_folder)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(path))
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    wanted = stock(
        CAPTION,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    model = StoryModel.open(sd15_folder, loras=[(path, 1.0)])
    assert fast(model) == ("lcm", 4, 1.0)
    settings = resolve_story(model, STORY, {"iterations": 0}, preset="fast").settings
    sampler, rows = prepare_round(model, StoryPlan(STORY, settings), 0, 1)
    for _ in sampler.denoise(rows):
        pass
    torch.testing.assert_close(sampler.latents, wanted, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="or an LCM-LoRA"):
        resolve_story(StoryModel.open(sd15_folder), STORY, {"iterations": 0, "scheduler": "lcm"})
