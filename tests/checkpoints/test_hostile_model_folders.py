"""Model folders and exports of strangers: any damage ends in an error of one line or in a drawn frame, soon, with nothing
outside touched. The seed of a failing case makes it again."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_files import damage, like_a_user, linked_copy, outside_of, snapshot, time_limit
from small_checkpoints import write_adapter
from small_history import write_causal_folder

from fastory import Story, StoryModel, generate
from fastory.errors import FastoryError, InputError
from fastory.events import FrameDrawn
from fastory.models.engine_model import EngineModel

STORY = Story.from_captions(["a fox swims"])
SECONDS = 40  # a hang takes hours; a case takes 0.3 s on a quiet machine


@pytest.fixture(scope="module")
def model_folder(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file that a model folder can hold: with an IP-Adapter, a history, and defaults that name them."""
    folder = write_causal_folder(sd15_folder, tmp_path_factory.mktemp("hostile") / "model")
    write_adapter(folder, "base", folder / "ip" / "adapter.safetensors")
    defaults = {"schema": 1, "steps": 1, "guidance_scale": 2.0, "ip_adapter": "ip/adapter.safetensors"}
    (folder / "fastory_defaults.json").write_text(json.dumps(defaults))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def draw(model: StoryModel) -> None:
    events = list(generate(STORY, model=model, steps=1, iterations=0))
    assert sum(isinstance(event, FrameDrawn) for event in events) == 1


def open_and_draw(folder: Path) -> None:
    draw(StoryModel.open(folder, device="cpu", dtype="float32", offline=True))


def open_engine_and_draw(folder: Path) -> None:
    draw(EngineModel.open_engine(folder, device="cpu"))


def own_the_damage(folder: Path) -> None:
    """The hashes that a stranger would have written, who made the export as it is now."""
    file = folder / "fastory.json"
    if not file.is_file():
        return  # it is fastory.json that was damaged
    try:
        values = json.loads(file.read_text())
        known = values["files"]
        found = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in known
            if (folder / name).is_file()
        }
        values["files"] = {**known, **found}
        text = json.dumps(values)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return  # it is fastory.json that was damaged
    file.unlink()
    file.write_text(text)


def problems_of(
    seed: int, folder: Path, place: Path, use: Callable[[Path], None], hashed: bool = False
) -> str | None:
    """Makes a damaged copy and uses it. Returns what is wrong with how that ended, or None."""
    chance = random.Random(seed)
    outside = outside_of(place / "outside")
    before = snapshot(outside)
    copy = linked_copy(folder, place / "copy")
    done = damage(copy, chance, outside)
    if hashed and chance.random() < 0.6:
        own_the_damage(copy)
    try:
        found = wrong_with(copy, use)
        if found is None and snapshot(outside) != before:
            found = "touched what is outside"
    finally:
        shutil.rmtree(copy)
        shutil.rmtree(outside)
    return f"seed {seed}, {done}: {found}" if found else None


def wrong_with(copy: Path, use: Callable[[Path], None]) -> str | None:
    """Uses a damaged folder. Returns how that ended, where it is neither a right result nor an error of one line."""
    try:
        with time_limit(SECONDS), like_a_user():
            use(copy)
    except FastoryError as error:
        said = str(error)
        if "\n" in said.split("\n  fastory convert")[0] or len(said) > 1000:
            return f"{len(said)} letters, more than a line: {said[:500]}"
    except (Exception, pytest.fail.Exception) as error:  # the latter: not done in time
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def check(seeds: range, folder: Path, place: Path, use: Callable[[Path], None], hashed: bool = False) -> None:
    before = snapshot(folder)
    found = [problems_of(seed, folder, place, use, hashed) for seed in seeds]
    assert [problem for problem in found if problem] == []
    assert snapshot(folder).keys() == before.keys()
    assert {name: digest for name, (_, _, digest) in snapshot(folder).items()} == {
        name: digest for name, (_, _, digest) in before.items()
    }


@pytest.mark.parametrize("first", range(0, 110, 22))
def test_a_damaged_model_folder(first: int, model_folder: Path, tmp_path: Path) -> None:
    check(range(first, first + 22), model_folder, tmp_path, open_and_draw)


@pytest.mark.parametrize("first", range(0, 40, 20))
def test_a_damaged_export(first: int, export_folder: Path, tmp_path: Path) -> None:
    check(range(first, first + 20), export_folder, tmp_path, open_engine_and_draw, hashed=True)


# With the 4,000 run folders 10,000 cases in all.
@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 5000, 100))
def test_many_damaged_model_folders(first: int, model_folder: Path, tmp_path: Path) -> None:
    check(range(first, first + 100), model_folder, tmp_path, open_and_draw)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 100))
def test_many_damaged_exports(first: int, export_folder: Path, tmp_path: Path) -> None:
    check(range(first, first + 100), export_folder, tmp_path, open_engine_and_draw, hashed=True)


def test_the_undamaged_folders_are_drawn(model_folder: Path, export_folder: Path) -> None:
    open_and_draw(model_folder)
    open_engine_and_draw(export_folder)


# Cases of the fault campaign, by file and field; each was a traceback, or a loop of hours.
FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vae-layers": ("vae/config.json", {"layers_per_block": 10**7}, "layers_per_block"),
    "vae-few-too-many": ("vae/config.json", {"layers_per_block": 5000}, "layers_per_block asks for"),
    "unet-layers": ("unet/config.json", {"layers_per_block": [10**4, 10**4, 10**4]}, "layers_per_block asks"),
    "unet-product": (
        "unet/config.json",
        {"layers_per_block": 100, "transformer_layers_per_block": 100},
        "transformer_layers_per_block asks for",
    ),
    "text-layers": ("text_encoder/config.json", {"num_hidden_layers": 10**8}, "num_hidden_layers"),
    "text-layers-within-range": ("text_encoder/config.json", {"num_hidden_layers": 10**5}, "num_hidden_layers"),
    "positions": ("text_encoder/config.json", {"max_position_embeddings": 10**10}, "max_position_embeddings"),
    "width": ("text_encoder/config.json", {"hidden_size": 99_999}, "text_encoder"),
    "history-layers": ("history/config.json", {"vision": {"num_hidden_layers": 10**6}}, "num_hidden_layers"),
    "history-width": ("history/config.json", {"vision": {"hidden_size": 99_000, "intermediate_size": 99_000}}, "history"),
    "history-positions": ("history/config.json", {"positions": 10**9}, "positions"),
    "sample-0": ("unet/config.json", {"sample_size": 0}, "sample_size"),
    "sample-text": ("unet/config.json", {"sample_size": "x"}, "sample_size"),
    "sample-huge": ("unet/config.json", {"sample_size": 10**12}, "sample_size"),
    "groups-0": ("unet/config.json", {"norm_num_groups": 0}, "norm_num_groups"),
    "vae-groups-0": ("vae/config.json", {"norm_num_groups": 0}, "norm_num_groups"),
    "scaling-0": ("vae/config.json", {"scaling_factor": 0}, "scaling_factor"),
    "means": ("vae/config.json", {"latents_mean": [0.0], "latents_std": [1.0]}, "latents_mean"),
    "epsilon-null": ("unet/config.json", {"norm_eps": None}, "norm_eps: wanted float, got None"),
    "factor-object": ("unet/config.json", {"mid_block_scale_factor": {}}, "mid_block_scale_factor: wanted float"),
    "vae-one-level": ("vae/config.json", {"up_block_types": ["UpDecoderBlock2D"]}, "wanted a name for each of 4"),
    "history-long": ("history/config.json", {"vision": {"image_size": "long " * 5000}}, "a Blip class"),
    "class-list": ("model_index.json", {"_class_name": ["os", "system"]}, "wanted one of StableDiffusionPipeline"),
    "quantised": ("text_encoder/config.json", {"quantization_config": {"quant_method": "x"}}, "quantization_config"),
    "attention": ("text_encoder/config.json", {"attn_implementation": "owner/kernel"}, "attn_implementation"),
    "auto-map": ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
    "tokenizer-map": ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.E", None]}}, "auto_map"),
    "tokenizer-class": ("tokenizer/tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}, "tokenizer_class"),
    "scheduler-class": (
        "model_index.json",
        {"scheduler": ["diffusers", "StableDiffusionPipeline"]},
        "the scheduler is 'StableDiffusionPipeline'; wanted one of",
    ),
    "scheduler-own-class": ("scheduler/scheduler_config.json", {"_class_name": "FluxPipeline"}, "the scheduler is"),
    "scheduler-steps": ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
    "scheduler-betas": ("scheduler/scheduler_config.json", {"beta_schedule": "x"}, "scheduler_config.json"),
    "scheduler-kind": ("scheduler/scheduler_config.json", {"prediction_type": "x"}, "prediction_type"),
    "processor": ("feature_extractor/preprocessor_config.json", {"size": {"shortest_edge": 10**9}}, "shortest_edge"),
    "defaults-outside": ("fastory_defaults.json", {"ip_adapter": "../../etc/passwd"}, "inside the folder"),
    "defaults-digits": ("fastory_defaults.json", {"guidance_scale": 10**400}, "digits"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_of_a_stranger_is_refused_by_name(case: str, model_folder: Path, tmp_path: Path) -> None:
    name, values, said = FIELDS[case]
    copy = linked_copy(model_folder, tmp_path / "copy")
    edit(copy / name, values)
    with time_limit(20), pytest.raises(InputError) as refused:
        open_and_draw(copy)
    message = str(refused.value)
    assert said in message and str(copy) in message and "\n" not in message and len(message) < 800


def edit(file: Path, values: dict[str, Any]) -> None:
    found = json.loads(file.read_text())
    for key, value in values.items():
        found[key] = (
            {**found[key], **value} if isinstance(found.get(key), dict) and isinstance(value, dict) else value
        )
    file.unlink()
    file.write_text(json.dumps(found))


@pytest.mark.parametrize(
    "name",
    [
        *("model_index.json", "fastory_defaults.json", "unet/config.json", "vae/config.json"),
        *("text_encoder/config.json", "image_encoder/config.json", "history/config.json"),
        *("tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"),
        "feature_extractor/preprocessor_config.json",
    ],
)
def test_a_hundred_thousand_brackets_are_refused(name: str, model_folder: Path, tmp_path: Path) -> None:
    copy = linked_copy(model_folder, tmp_path / "copy")
    (copy / name).unlink()
    (copy / name).write_text("[" * 100_000 + "]" * 100_000)
    with time_limit(20), pytest.raises(InputError, match="nested brackets") as refused:
        open_and_draw(copy)
    assert str(copy / name) in str(refused.value)


def test_an_adapter_config_does_not_lead_to_other_weights(model_folder: Path, tmp_path: Path) -> None:
    """transformers would load the model that it names in place of the folder's own."""
    copy = linked_copy(model_folder, tmp_path / "copy")
    config = {"base_model_name_or_path": str(model_folder / "text_encoder"), "peft_type": "LORA"}
    (copy / "text_encoder" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"adapter_config\.json would have other weights loaded"):
        open_and_draw(copy)


EXPORT_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "scheduler": ({"scheduler": "StableDiffusionPipeline"}, "scheduler"),
    "scheduler-attribute": ({"scheduler": "utils.import_utils"}, "scheduler"),
    "component-outside": ({"components": {"unet": {"file": "../unet.onnx"}}}, "inside the folder"),
    "component-absolute": ({"components": {"unet": {"data": "/etc/passwd"}}}, "inside the folder"),
    "component-without-hash": ({"components": {"unet": {"file": "other.onnx"}}}, "no hash of other.onnx"),
    "hash-outside": ({"files": {"../../etc/passwd": "0" * 64}}, "inside the folder"),
    "range": ({"components": {"unet": {"ranges": {}}}}, "no range of"),
    "axis": (
        {"components": {"unet": {"inputs": {"sample": {"dtype": "float32", "shape": ["4**x"]}}}}},
        "shape",
    ),
    "no-components": ({"components": []}, "components"),
    "tokens": ({"tokens_per_ref": 10**12}, "tokens_per_ref"),
    "tokens-other": ({"tokens_per_ref": 5}, "null_reference"),
    "history": ({"history": {"positions": 10**9}}, "history_times"),
    "vae": ({"vae": {"scaling_factor": 0}}, "scaling_factor"),
    "bool": ({"groups": True}, "groups"),
    "schema": ({"schema": "1"}, "no schema"),
}


@pytest.mark.parametrize("case", EXPORT_FIELDS)
def test_a_field_of_a_strangers_export_is_refused(case: str, export_folder: Path, tmp_path: Path) -> None:
    values, said = EXPORT_FIELDS[case]
    copy = linked_copy(export_folder, tmp_path / "copy")
    file = copy / "fastory.json"
    found = json.loads(file.read_text())
    merge(found, values)
    if case == "range":
        found["components"]["unet"]["ranges"] = {}
    file.unlink()
    file.write_text(json.dumps(found))
    with time_limit(20), pytest.raises(InputError) as refused:
        open_engine_and_draw(copy)
    message = str(refused.value)
    assert said in message and str(copy) in message and "\n" not in message and len(message) < 800


def merge(found: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            merge(found[key], value)
        else:
            found[key] = value


OPTIONS = ("model", "config", "ip_adapter", "image_encoder", "adapter", "lora")
NAMES = {
    "long": "x" * 300,
    "deep": "x/" * 3000,
    "nobody": "~nouser/x",
    "nul": "a\0b",
    "memory": "/proc/self/mem",
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_name_that_cannot_be_opened(option: str, kind: str, sd15_folder: Path) -> None:
    name = NAMES[kind]
    options: dict[str, Any] = {"loras": [(name, 1.0)]} if option == "lora" else {option: name}
    with time_limit(20), pytest.raises(InputError) as refused:
        StoryModel.open(**{"model": sd15_folder, "device": "cpu", "offline": True, **options})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize("kind", NAMES)
def test_an_engines_name_that_cannot_be_opened(kind: str) -> None:
    with time_limit(20), pytest.raises(InputError) as refused:
        EngineModel.open_engine(NAMES[kind])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_the_weight_of_a_lora_is_a_number(weight: float, sd15_folder: Path) -> None:
    with pytest.raises(InputError, match="wanted a finite weight"):
        StoryModel.open(sd15_folder, loras=[(sd15_folder / "unet" / "config.json", weight)], device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_of_numbers_that_are_not_finite(value: float, model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model_folder / "ip" / "adapter.safetensors")
    tensors["image_proj.norm.bias"][3] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(
        InputError, match=r"bad.safetensors: image_proj.norm.bias holds numbers that are not finite"
    ):
        StoryModel.open(model_folder, ip_adapter=tmp_path / "bad.safetensors", device="cpu")


def test_paths_and_texts_open_the_same(model_folder: Path) -> None:
    adapter = model_folder / "ip" / "adapter.safetensors"
    first = StoryModel.open(model_folder, ip_adapter=adapter, device="cpu")
    second = StoryModel.open(str(model_folder), ip_adapter=str(adapter), device="cpu")
    assert first.name == second.name == str(model_folder)
    assert first.hashes == second.hashes
