"""The commands as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastory import __version__
from fastory.cli import app
from fastory.cli.options import parse_lora
from fastory.door import parse_frames

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_no_option_draws_the_bundled_story_under_stories() -> None:
    result = CliRunner().invoke(app, ["generate", "--steps", "1", "--iterations", "1"])
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.strip())
    assert folder.parent == Path("stories") and (folder / "storybook.html").exists()
    again = CliRunner().invoke(app, ["generate", "--steps", "1", "--iterations", "1", "--quiet"])
    assert again.stdout.strip() == str(folder) and not again.stderr.strip()


def test_bundled_story_by_name() -> None:
    result = CliRunner().invoke(
        app, ["generate", "friends", "--steps", "1", "--iterations", "1", "-o", "run"]
    )
    assert result.exit_code == 0, result.output
    assert "Two friends" in result.stderr


def test_json_prints_events_alone_on_stdout() -> None:
    result = CliRunner().invoke(app, ["generate", "--steps", "2", "--iterations", "1", "--json", "-o", "run"])
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(event["schema"] == 1 for event in events)
    kinds = [event["event"] for event in events]
    assert kinds[0] == "StoryStarted" and kinds[-1] == "StoryFinished"
    assert kinds.count("FrameDrawn") == 16 and kinds.count("RoundFinished") == 2
    drawn = next(event for event in events if event["event"] == "FrameDrawn")
    assert Path(drawn["path"]).exists() and "image" not in drawn


def test_flag_overrules_the_story_file_and_the_preset() -> None:
    Path("story.yaml").write_text("frames: [a fox]\nsettings: {steps: 3, guidance_scale: 4, iterations: 0}\n")
    arguments = ["generate", "story.yaml", "--preset", "paper", "--guidance-scale", "2", "-o", "run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["settings"]["steps"] == 3 and manifest["sources"]["steps"] == "story"
    assert manifest["settings"]["guidance_scale"] == 2.0 and manifest["sources"]["guidance_scale"] == "flag"
    assert manifest["settings"]["noise"] == "shared" and manifest["sources"]["noise"] == "preset paper"
    assert manifest["sources"]["width"] == "model"


def test_doctor_says_which_kernels_run_and_why_not_others() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    for word in ("fastory", "torch", torch.__version__, "devices", "kernels", "sdpa", "not triton"):
        assert word in result.stdout
    assert str(Path.home()) not in result.stdout


def test_convert_turns_a_pickled_adapter_into_one_that_draws(
    sd15_folder: Path, sd15_adapter_base: Path
) -> None:
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(sd15_adapter_base).items():
        part, _, rest = name.partition(".")
        nested[part][rest] = tensor
    torch.save(nested, "adapter.bin")
    result = CliRunner().invoke(app, ["convert", "adapter.bin"])
    assert result.exit_code == 0, result.output
    converted = Path(result.stdout.strip())
    assert converted.suffix == ".safetensors"
    Path("story.txt").write_text("a fox\na cat\n")
    arguments = [
        "--model",
        str(sd15_folder),
        "--ip-adapter",
        str(converted),
        "--steps",
        "1",
        "--iterations",
        "1",
    ]
    assert CliRunner().invoke(app, ["generate", "story.txt", *arguments, "-o", "run"]).exit_code == 0


@pytest.mark.parametrize(
    ("text", "frames"), [("3", [3]), ("3,7-9", [3, 7, 8, 9]), ("2-2, 0", [0, 2]), ("1,1,0-1", [0, 1])]
)
def test_frames_are_numbers_and_ranges(text: str, frames: list[int]) -> None:
    assert parse_frames(text) == frames


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("C:/loras/a.safetensors", ("C:/loras/a.safetensors", 1.0)),
        ("C:/loras/a.safetensors:-1", ("C:/loras/a.safetensors", -1.0)),
    ],
)
def test_lora_weight_follows_the_last_colon(text: str, parsed: tuple[str, float]) -> None:
    assert parse_lora(text) == parsed


def test_help_needs_no_pytorch() -> None:
    """`fastory --help` answers at once."""
    code = "import sys, fastory.cli.commands; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_started_from_the_checkout_no_library_imports_our_kernels_folder() -> None:
    """transformers looks for a package named `kernels`; in the checkout it finds ours, which must stay inert."""
    code = "import sys, transformers, diffusers; sys.exit(any(name.startswith('fastory') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    text = (ROOT / "kernels" / "__init__.py").read_text() + (ROOT / "export" / "__init__.py").read_text()
    assert "import" not in text.split('"""')[2] and "import" not in text.split('"""')[4]


def test_the_version_is_told_and_no_flag_has_an_opposite_that_nobody_wants() -> None:
    told = CliRunner().invoke(app, ["--version"])
    assert (told.exit_code, told.stdout) == (0, f"fastory {__version__}\n")
    assert "Exit codes: 0 done; 1" in " ".join(CliRunner().invoke(app, ["--help"]).stdout.split())
    for command in ("generate", "tune", "export", "convert"):
        shown = (
            CliRunner()
            .invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
            .stdout
        )
        assert "--no-" not in shown
