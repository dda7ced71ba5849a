"""Bad input is met at the door: exit code 2, one message that says what to do, no traceback, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from refused_commands import refuse
from typer.testing import CliRunner

from fastory.cli import app

GOOD = "a fox is sleeping in the snow\na cat is jumping\n"
QUICK = ["--steps", "1", "--iterations", "1"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text(GOOD)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            ["--preset", "papre"],
            "unknown preset 'papre'; wanted one of paper, quick, best, story-iter, story-iter-fast, ar-ldm",
        ),
        (["--preset", "story-iter-fast"], "LCM"),
        (["--mode", "loop"], "wanted one of iterative, causal, plain, reference, consistent, got 'loop'"),
        (["--scheduler", "heun"], "wanted one of ddim"),
        (["--scheduler", "lcm"], "time_cond_proj_dim"),
        (["--references", "some"], "wanted one of all, others, cast, got 'some'"),
        (["--reference-fit", "stretch"], "wanted one of pad, squash, crop"),
        (["--reference-scale", "0.3-0.5"], "FIRST:LAST"),
        (["--reference-scale", "nan:1"], "FIRST:LAST"),
        (["--noise", "none"], "wanted one of shared, per-frame"),
        (["--iterations", "-1"], "wanted 0 to 1000, got -1"),
        (["--steps", "0"], "wanted 1 to 1000, got 0"),
        (["--steps", "many"], "--steps"),
        (["--seed", "-5"], "seed"),
        (["--guidance-scale", "-1"], "--guidance-scale: wanted 0 to 100"),
        (["--style", "comci"], "comic"),
        (["--width", "100"], "multiple of"),
        (["--height", "70"], "multiple of"),
        (["--batch-size", "0"], "wanted 1 or more"),
        (["--dtype", "int8"], "wanted one of auto, float32, float16, bfloat16"),
        (["--device", "tpu"], "wanted auto, cpu, cuda or cuda:N"),
        (["--graphs", "on"], "wanted one of auto, off, got 'on'"),
        (["--frames", "1,x"], "numbers and ranges such as 3,7-9"),
        (["--frames", "3-1"], "numbers and ranges"),
        (["--frames", "1"], "no run to redraw"),
        (["--redraw-seed", "1"], "--redraw-seed wants --frames"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--ip-adapter", "missing.safetensors"], "missing.safetensors"),
        (["--lora", "missing.safetensors:0.5"], "missing.safetensors"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_option_that_cannot_be_used(options: list[str], wanted: str) -> None:
    refuse(["good.txt", *options], wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_gpu() -> None:
    refuse(["good.txt", "--device", "cuda"], "fastory doctor")


@pytest.mark.parametrize("choice", ["cutlass", "triton"])
def test_kernel_choice_that_cannot_run(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastory.kernels import backends

    if choice == "triton" and (torch.cuda.is_available() or backends.interpreted()):
        pytest.skip("Triton runs here")
    monkeypatch.setenv("FASTORY_KERNELS", choice)
    backends.requested.cache_clear()
    backends.choose.cache_clear()
    try:
        refuse(["good.txt"], "FASTORY_KERNELS")
    finally:
        monkeypatch.undo()
        backends.requested.cache_clear()
        backends.choose.cache_clear()


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("missing.txt", None, "missing.txt"),
        ("story.doc", GOOD, ".doc"),
        ("empty.txt", "\n# only a remark\n", "empty.txt"),
        ("unknown.yaml", "title: A\nframes:\n- a fox\ncaracters: {}\n", "unknown.yaml:4"),
        ("none.yaml", "title: A\nframes: []\n", "none.yaml"),
        ("blank.yaml", "title: A\nframes:\n- a fox\n- ''\n", "blank.yaml:4"),
        ("newer.yaml", "version: 9\ntitle: A\nframes: [a fox]\n", "9"),
        ("setting.yaml", "title: A\nframes: [a fox]\nsettings:\n  stpes: 3\n", "setting.yaml:4"),
        ("value.yaml", "title: A\nframes: [a fox]\nsettings: {steps: many}\n", "value.yaml:3"),
        ("style.yaml", "title: A\nstyle: oil\nframes: [a fox]\n", "oil"),
        ("away.yaml", "frames: [Ann runs]\ncharacters: {Ann: {references: [no.png]}}\n", "no.png"),
    ],
)
def test_story_that_cannot_be_used(name: str, text: str | None, wanted: str) -> None:
    if text is not None:
        Path(name).write_text(text)
    refuse([name, *QUICK], wanted)


def test_corrupt_reference_picture() -> None:
    Image.new("RGB", (64, 64), "red").save("ann.png")
    Path("ann.png").write_bytes(Path("ann.png").read_bytes()[:60])
    Path("story.yaml").write_text("frames: [Ann runs]\ncharacters: {Ann: {references: [ann.png]}}\n")
    refuse(["story.yaml", *QUICK], "ann.png")


def test_reference_outside_the_storys_folder() -> None:
    Image.new("RGB", (8, 8)).save("ann.png")
    Path("sub").mkdir()
    Path("sub/story.yaml").write_text("frames: [Ann runs]\ncharacters: {Ann: {references: [../ann.png]}}\n")
    refuse(["sub/story.yaml", *QUICK], "outside")


def test_pickled_adapter_is_refused_with_the_command_that_converts_it() -> None:
    torch.save({"image_proj": {}, "ip_adapter": {}}, "adapter.bin")
    refuse(["good.txt", "--ip-adapter", "adapter.bin"], "fastory convert adapter.bin")


def test_adapter_of_the_wrong_image_encoder(
    sd15_folder: Path, sdxl_adapter_base: Path, sd15_adapter_base: Path, sdxl_folder: Path
) -> None:
    refuse(["good.txt", "--model", str(sd15_folder), "--ip-adapter", str(sdxl_adapter_base)], "adapter")
    encoder = str(sdxl_folder / "image_encoder")
    arguments = [
        "--model",
        str(sd15_folder),
        "--ip-adapter",
        str(sd15_adapter_base),
        "--image-encoder",
        encoder,
    ]
    refuse(["good.txt", *arguments], "wants an image encoder of projection width 24")


def test_model_without_an_adapter_cannot_take_references(sd15_folder: Path) -> None:
    message = refuse(["good.txt", "--model", str(sd15_folder)], "has no IP-Adapter")
    assert "--ip-adapter" in message and "--iterations 0" in message


def test_output_folder_of_another_story() -> None:
    ran = CliRunner().invoke(app, ["generate", "good.txt", *QUICK, "-o", "run"])
    assert ran.exit_code == 0, ran.output
    Path("other.txt").write_text("a bear is jumping\na cat\na fox\n")
    refuse(["other.txt", *QUICK, "-o", "run"], "--overwrite")
    refuse(["good.txt", "--steps", "2", "--iterations", "1", "-o", "run"], "steps: 1 there, 2 here")


def test_output_that_is_a_file() -> None:
    refuse(["good.txt", *QUICK, "-o", "good.txt"], "good.txt is a file")


def test_every_story_is_checked_before_the_first_is_drawn() -> None:
    Path("bad.yaml").write_text("frames: []\n")
    refuse(["good.txt", "bad.yaml", *QUICK], "bad.yaml")
    Path("bad.yaml").write_text("frames: [a fox]\nsettings: {width: 100}\n")
    refuse(["good.txt", "bad.yaml", *QUICK], "width")


def test_manifest_of_a_newer_version() -> None:
    Path("run").mkdir()
    Path("run/manifest.json").write_text(json.dumps({"schema": 2}))
    before = Path("run/manifest.json").read_bytes()
    result = CliRunner().invoke(app, ["generate", "good.txt", *QUICK, "-o", "run"])
    assert result.exit_code == 2 and "schema 2" in result.stderr
    assert Path("run/manifest.json").read_bytes() == before
