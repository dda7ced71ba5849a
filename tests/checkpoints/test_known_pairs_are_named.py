"""Risk: packages that are known not to work together fail with a line that names neither, or are refused where they work.

The metadata of an environment of the test's own tell the versions of the pair; the packages themselves are those of here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_environments import Environment, run, start, with_versions, without

PAIR = {"transformers": "5.24.0", "peft": "0.21.2"}
NAMED = "transformers 5.24.0 with peft 0.21.2"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return with_versions(tmp_path_factory.mktemp("pair"), PAIR)


def text_lora(path: Path, part: str) -> Path:
    """A LoRA of rank 1 on one layer of the built-in text encoder, or on one that it does not have."""
    stem = f"text_encoder.{part}.self_attn.q_proj.lora_"
    save_file({f"{stem}A.weight": torch.ones(1, 128), f"{stem}B.weight": torch.ones(128, 1)}, path)
    return path


def test_doctor_names_the_pair_and_what_to_install(pair: Environment, tmp_path: Path) -> None:
    done = run(pair, tmp_path, "doctor")
    assert done.returncode == 0, done.stderr
    told = done.stdout.split("known not to work\n")[1].split("\n\n")[0]
    assert NAMED in told and "pip install transformers==5.23.0" in told
    other = run(with_versions(tmp_path / "other", {**PAIR, "peft": "0.22.0"}), tmp_path, "doctor")
    assert "known not to work" not in other.stdout


def test_a_lora_on_the_text_encoder_is_loaded_where_it_loads(pair: Environment, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("a fox is sleeping in the snow\n")
    text_lora(tmp_path / "lora.safetensors", "text_model.encoder.layers.0")
    command = [
        "generate",
        "good.txt",
        "--iterations",
        "0",
        "--steps",
        "1",
        "--lora",
        "lora.safetensors",
        "-o",
    ]
    done = run(pair, tmp_path, *command, "out")
    assert done.returncode == 0, done.stderr
    plain = run(pair, tmp_path, *command[:-3], "-o", "plain")
    assert plain.returncode == 0, plain.stderr
    picture = Path("frames", "frame-000.png")
    assert (tmp_path / "out" / picture).read_bytes() != (tmp_path / "plain" / picture).read_bytes()


def test_a_lora_that_fails_there_is_one_line_that_names_the_pair(pair: Environment, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("a fox is sleeping in the snow\n")
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_"
    wrong = {f"{stem}A.weight": torch.ones(1, 7), f"{stem}B.weight": torch.ones(7, 1)}
    save_file(wrong, tmp_path / "lora.safetensors")
    done = run(pair, tmp_path, "generate", "good.txt", "--lora", "lora.safetensors", "-o", "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: LoRA lora.safetensors") and NAMED in done.stderr
    assert not (tmp_path / "out").exists()


# -- torchvision, which nothing here uses and transformers imports where it is installed


@pytest.fixture
def broken(tmp_path: Path) -> Environment:
    """An environment with a torchvision that was built for another PyTorch."""
    folder = tmp_path / "broken"
    variables = with_versions(folder, {"torchvision": "0.29.1"})
    (folder / "torchvision").mkdir()
    raised = 'raise RuntimeError("operator torchvision::nms does not exist")'
    (folder / "torchvision" / "__init__.py").write_text(raised)
    return variables


def test_a_broken_torchvision_is_named(broken: Environment, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("a fox is sleeping in the snow\n")
    done = run(broken, tmp_path, "generate", "good.txt", "-o", "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    for part in ("error: torchvision 0.29.1", "torchvision::nms does not exist", "pip uninstall torchvision"):
        assert part in done.stderr
    doctor = run(broken, tmp_path, "doctor")
    assert doctor.returncode == 0 and "torchvision::nms does not exist" in doctor.stdout


@pytest.mark.parametrize("module", ["fastory", "fastory.models.torch_model"])
def test_a_library_user_without_torchvision_reads_nothing_of_it(tmp_path: Path, module: str) -> None:
    code = f"from {module} import StoryModel; StoryModel.open('builtin', device='cpu')"
    done = start(without(tmp_path, ["torchvision"]), tmp_path, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
