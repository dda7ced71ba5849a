"""A wrong word, name, story or folder is refused before PyTorch is imported: at once, in one line, nothing written.

Each case runs in a process of its own that has not imported PyTorch; a fork of one that has imported the command line.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Imports the command line once, then forks for each line of JSON arguments: [exit code, stderr, was PyTorch imported].
SERVER = """
import contextlib, io, json, os, sys, typer.testing
import fastory.cli.commands, fastory.door
heavy = ("torch", "transformers", "diffusers", "numpy")
for line in sys.stdin:
    read, write = os.pipe()
    if os.fork() == 0:
        out = typer.testing.CliRunner().invoke(fastory.cli.app, json.loads(line))
        trace = "" if isinstance(out.exception, SystemExit | None) else repr(out.exception)
        said = [out.exit_code, out.stderr + trace, [name for name in heavy if name in sys.modules], out.stdout]
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        print(file.read().decode(), flush=True)
    os.wait()
"""


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, list[str], str]:
        import json

        assert self.process.stdin and self.process.stdout
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        code, stderr, heavy, stdout = json.loads(self.process.stdout.readline())
        return code, stderr, heavy, stdout

    def refuse(self, *arguments: str, code: int = 2) -> str:
        before = sorted(self.folder.rglob("*"))
        got, message, heavy, stdout = self.run(*arguments)
        assert (got, heavy, stdout) == (code, [], ""), message
        assert message.startswith("error: ") and message.count("\n") == 1 and len(message) < 700, message
        assert sorted(self.folder.rglob("*")) == before
        return message


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    server = Server(tmp_path_factory.mktemp("door"))
    (server.folder / "good.txt").write_text("a fox is sleeping in the snow\n")
    yield server
    server.process.stdin.close()
    server.process.wait()


LONG, DEEP, NOBODY, BYTES = "x" * 300, "y/" * 3000 + "z", "~nouser/x", "caf\udce9"
GENERATE = {
    "mode": (
        ["--mode", "loop"],
        "--mode: wanted one of iterative, causal, plain, reference, consistent, got 'loop'",
    ),
    "scheduler": (["--scheduler", "heun"], "--scheduler: wanted one of ddim"),
    "preset": (["--preset", "papre"], "unknown preset 'papre'; wanted one of paper"),
    "dtype": (["--dtype", "int8"], "--dtype: wanted one of auto, float32, float16, bfloat16"),
    "device": (["--device", "tpu"], "wanted auto, cpu, cuda or cuda:N"),
    "device-number": (["--device", "cuda:" + "9" * 5000], "wanted auto, cpu, cuda or cuda:N"),
    "graphs": (["--graphs", "on"], "--graphs: wanted one of auto, off, got 'on'"),
    "steps": (["--steps", "0"], "--steps: wanted 1 to 1000, got 0"),
    "batch-size": (["--batch-size", "0"], "wanted 1 or more"),
    "frames-range": (["--frames", "0-9999999999"], "wanted frames from 0 to 9999"),
    "frames-digits": (["--frames", "9" * 5000], "wanted frames from 0 to 9999"),
    "frames-open": (["--frames", "9" * 5000 + "-"], "wanted frames from 0 to 9999"),
    "frames-superscript": (["--frames", "²"], "numbers and ranges"),
    "window": (["--window", "9" * 5000], "--window: wanted 1 to 1000 frames, or all"),
    "scale": (["--reference-scale", "9" * 400], "FIRST:LAST"),
    "style": (["--style", "comci"], "did you mean 'comic'?"),
    "style-bytes": (["--style", BYTES + "{prompt}"], "--style: wanted text in UTF-8"),
    "negative-bytes": (["--negative-prompt", BYTES], "--negative-prompt: wanted text in UTF-8"),
    "model": (["--model", "nowhere/at/all"], "nowhere/at/all does not exist"),
    "ip-adapter": (["--ip-adapter", "missing.safetensors"], "missing.safetensors does not exist"),
    "adapter": (["--adapter", "missing.safetensors"], "missing.safetensors does not exist"),
    "lora": (["--lora", "missing.safetensors:0.5"], "LoRA missing.safetensors does not exist"),
    "image-encoder": (["--image-encoder", "a/b/../c d"], "does not exist"),
    "config": (["--config", "nowhere"], "--config nowhere is not a folder"),
    "engine": (["--engine", "nowhere"], "holds no fastory.json"),
    "first-frame": (["--first-frame", "nowhere.png"], "--first-frame: nowhere.png"),
    "output-file": (["-o", "good.txt"], "good.txt is a file"),
}
PATHS = ["--output", "--model", "--lora", "--ip-adapter", "--adapter", "--image-encoder", "--engine", "--config",
         "--first-frame"]  # fmt: skip


@pytest.mark.parametrize(("options", "wanted"), GENERATE.values(), ids=GENERATE)
def test_an_option_of_generate(server: Server, options: list[str], wanted: str) -> None:
    if options[0] == "--image-encoder":
        options = ["--image-encoder", "no folder at all"]
    assert wanted in server.refuse("generate", "good.txt", *options)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["export", "--bind", "onnx"], "--bind: wanted one of ort, portable, trt, got 'onnx'"),
        (
            ["export", "--dtype", "int8"],
            "--dtype: wanted one of auto, float32, float16, bfloat16, got 'int8'",
        ),
        (["export", "--rtx", "sm89"], "--rtx is about engines; give --trt as well"),
        (
            ["tune", ".", "-o", "a.safetensors", "--history-size", "huge"],
            "wanted one of small, medium, base, got 'huge'",
        ),
        (
            ["tune", ".", "-o", "a.safetensors", "--device", "tpu"],
            "--device: wanted auto, cpu, cuda or cuda:N",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_word_of_export_and_tune(server: Server, arguments: list[str], wanted: str) -> None:
    assert wanted in server.refuse(*arguments)


@pytest.mark.parametrize("path", [LONG, DEEP, NOBODY], ids=["long", "deep", "nobody"])
@pytest.mark.parametrize("option", PATHS)
def test_a_path_of_generate_that_can_be_none(server: Server, option: str, path: str) -> None:
    assert "wanted a path" in server.refuse("generate", "good.txt", option, path)


@pytest.mark.parametrize("path", [LONG, NOBODY], ids=["long", "nobody"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "PATH"],
        ["convert", "good.bin", "PATH"],
        ["convert", "good.bin", "--output", "PATH"],
        ["convert", "good.bin", "--config", "PATH"],
        ["tune", "PATH", "-o", "a.safetensors"],
        ["tune", ".", "-o", "PATH"],
        ["tune", ".", "-o", "a.safetensors", "--adapter", "PATH"],
        ["tune", ".", "-o", "a.safetensors", "--model", "PATH"],
        ["export", "-o", "PATH"],
        ["export", "--model", "PATH"],
    ],
    ids=" ".join,
)
def test_a_path_of_other_commands_that_can_be_none(server: Server, arguments: list[str], path: str) -> None:
    (server.folder / "good.bin").write_bytes(b"")
    assert "wanted a path" in server.refuse(*(path if a == "PATH" else a for a in arguments))


@pytest.mark.parametrize(
    "name", [LONG + ".yaml", DEEP + ".txt", "~nouser/a.txt", "missing.txt", "folder", "pipe.txt"]
)
def test_a_story_file(server: Server, name: str) -> None:
    (server.folder / "folder").mkdir(exist_ok=True)
    if not (server.folder / "pipe.txt").exists():
        os.mkfifo(server.folder / "pipe.txt")
    assert "wanted a" in server.refuse("generate", name)


def test_a_storys_settings_name_file_and_line(server: Server) -> None:
    (server.folder / "bad.yaml").write_text("frames: [a fox]\nsettings:\n  steps: many\n")
    assert "bad.yaml:3" in server.refuse("generate", "bad.yaml")
    (server.folder / "bad.yaml").write_text("frames: [a fox]\nsettings:\n  stpes: 3\n")
    assert "bad.yaml:3" in server.refuse("generate", "bad.yaml")


def test_a_run_folder_that_another_process_draws_into(server: Server) -> None:
    from fastory.files import locked_folder

    (server.folder / "busy").mkdir()
    with locked_folder(server.folder / "busy", "draws into", "wait"):
        message = server.refuse("generate", "good.txt", "-o", "busy", code=1)
    assert "another process draws into busy" in message


def test_words_and_help_import_no_library(server: Server) -> None:
    code, stderr, heavy, stdout = server.run("words")
    assert (code, stderr, heavy) == (0, "", [])
    for word in ("tortoise", "mountain", "reading a book", "while"):
        assert word in stdout
    code, _, heavy, stdout = server.run("--help")
    assert (code, heavy) == (0, []) and "--debug" in stdout


# -- export, tune and convert

EXPORT = {
    "dtype": (["--dtype", "int8"], "--dtype"),
    "bind": (["--bind", "cuda"], "--bind"),
    "groups": (["--groups", "0"], "--groups: wanted 1 or more, got 0"),
    "size": (["--trt", "--size", "depth=3"], "--size depth=3: wanted NAME=LEAST:MOST"),
    "size-order": (["--trt", "--size", "batch=3:2"], "the least first"),
    "rtx": (["--trt", "--rtx", "sm90"], "builds for sm75"),
    "output-file": (["-o", "good.txt"], "good.txt is a file"),
    "pickle": (["--ip-adapter", "good.bin"], "fastory convert good.bin"),
}
TUNE = {
    "stories": (["good.txt", "-o", "a.safetensors"], "wanted a folder of story folders"),
    "output": ([".", "-o", "a.bin"], "wanted a file ADAPTER.safetensors"),
    "steps": ([".", "-o", "a.safetensors", "--steps", "0"], "--steps: wanted 1 or more, got 0"),
    "dropout": ([".", "-o", "a.safetensors", "--dropout", "1"], "--dropout: wanted 0 or more"),
    "window": ([".", "-o", "a.safetensors", "--window", "many"], "--window: wanted random, all"),
    "history-size": ([".", "-o", "a.safetensors", "--history-size", "huge"], "--history-size"),
    "positions": ([".", "-o", "a.safetensors", "--positions", "0"], "--positions: wanted 1 or more, got 0"),
    "pickle": ([".", "-o", "a.safetensors", "--adapter", "good.bin"], "fastory convert good.bin"),
}


@pytest.mark.parametrize(("options", "wanted"), EXPORT.values(), ids=EXPORT)
def test_an_option_of_export(server: Server, options: list[str], wanted: str) -> None:
    (server.folder / "good.bin").write_bytes(b"")
    assert wanted in server.refuse("export", *options)


@pytest.mark.parametrize(("options", "wanted"), TUNE.values(), ids=TUNE)
def test_an_option_of_tune(server: Server, options: list[str], wanted: str) -> None:
    (server.folder / "good.bin").write_bytes(b"")
    assert wanted in server.refuse("tune", *options)


@pytest.mark.parametrize("option", ["--adapter", "--lora", "--ip-adapter"])
def test_a_pickle_is_named_with_its_command(server: Server, option: str) -> None:
    (server.folder / "good.bin").write_bytes(b"")
    assert "fastory convert good.bin" in server.refuse("generate", "good.txt", option, "good.bin")


def test_what_another_process_is_writing(server: Server) -> None:
    """Told before the model is read: the other process may take an hour."""
    from fastory.files import locked_folder, unfinished

    (server.folder / "good.bin").write_bytes(b"")
    (server.folder / "a.tuning").mkdir(exist_ok=True)
    with locked_folder(server.folder / "a.tuning", "tunes in", "wait"):
        message = server.refuse("tune", ".", "-o", "a.safetensors", code=1)
    assert "another process tunes in a.tuning" in message
    with unfinished(server.folder / "made", "exports into", "wait"):
        assert "another process exports into made" in server.refuse("export", "-o", "made", code=1)
        assert "another process is writing made" in server.refuse("convert", "good.bin", "made", code=1)
