"""The main jobs, once each, with whatever is installed: the table of what works, and exit code 1 where something does not.

    python .ci/small_set.py NAME        NAME: of this environment, for the table's title

The checkout is not importable here: what runs is the installed package.
"""

import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "numpy",
    "pillow",
    "pydantic",
    "typer",
    "onnx",
)
CAPTIONS = ["a fox is sleeping in the snow", "a fox is jumping in the forest"]


def imports(place: Path) -> None:
    import fastory
    from fastory.cli import app

    assert fastory.__version__ and app


def draw(place: Path, **settings: Any) -> None:
    from fastory import Story, generate
    from fastory.events import StoryFinished

    story = Story.from_captions(CAPTIONS, title=settings.get("mode", "iterative"))
    events = list(generate(story, output=place / story.title, steps=2, **settings))
    assert isinstance(events[-1], StoryFinished)
    assert len(list((place / story.title / "frames").glob("*.png"))) == len(CAPTIONS)


def iterative(place: Path) -> None:
    draw(place, iterations=1)


def causal(place: Path) -> None:
    draw(place, mode="causal", drafts=1)


def lora_on_both_encoders(place: Path) -> None:
    """A LoRA of rank 2 on the UNet and the text encoder of the built-in model changes the picture."""
    import torch
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    import fastory
    from fastory import StoryModel

    weights = Path(fastory.__file__).parent / "builtin" / "weights"
    pipeline = StableDiffusionPipeline.from_pretrained(weights, torch_dtype=torch.float32)
    torch.manual_seed(0)
    for part, names in ((pipeline.unet, ["to_q", "to_v"]), (pipeline.text_encoder, ["q_proj", "fc1"])):
        part.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        place,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
        weight_name="lora.safetensors",
    )
    plain = StoryModel.open("builtin", device="cpu").encode_caption(CAPTIONS[0])
    with_lora = StoryModel.open("builtin", device="cpu", loras=[(str(place / "lora.safetensors"), 1.0)])
    assert not torch.equal(plain.tokens, with_lora.encode_caption(CAPTIONS[0]).tokens)


def one_onnx_component(place: Path) -> None:
    """The text encoder as an ONNX graph on ONNX Runtime, against torch."""
    import numpy as np
    import onnxruntime
    import torch

    from fastory import StoryModel
    from fastory.export.choices import Groups
    from fastory.export.graphs import components
    from fastory.export.onnx import export_component

    model = StoryModel.open("builtin", device="cpu", dtype="float32")
    component = next(one for one in components(model, Groups()) if one.name == "text_encoder")
    export_component(component, place, 1, "ort")
    session = onnxruntime.InferenceSession(str(place / "text_encoder.onnx"))
    inputs = component.sample(component.traced, 0)
    with torch.inference_mode():
        wanted = component.module(*inputs.values())
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    # float32 through three layers of width 128: some hundred roundings of 6e-8 each on values of a few units
    assert all(np.abs(one - two.numpy()).max() < 1e-4 for one, two in zip(found, wanted, strict=True))


def main() -> int:
    jobs: list[Callable[[Path], None]] = [
        imports,
        iterative,
        causal,
        lora_on_both_encoders,
        one_onnx_component,
    ]
    failed = 0
    rows = []
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            try:
                job(Path(folder))
                rows.append((job.__name__, "works"))
            except Exception as error:  # the table is for every failure, whatever it is
                traceback.print_exc()
                failed += 1
                rows.append(
                    (
                        job.__name__,
                        f"FAILS: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
                            :100
                        ],
                    )
                )
    print(f"{sys.argv[1]}: {', '.join(f'{name} {version(name)}' for name in PACKAGES)}")
    for name, said in rows:
        print(f"  {name.replace('_', ' '):<24} {said}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
