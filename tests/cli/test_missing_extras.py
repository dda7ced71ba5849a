"""Risk: a command that needs an extra ends in a traceback where the extra is not installed, or writes half of its work.

Each runs in an environment of its own that has every package of this one but the extra's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_environments import MODULES, Environment, run, without

STORY = "a fox is sleeping in the snow\na fox is jumping in the forest\n"

Made = Callable[..., Environment]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """environment(EXTRA) or environment(modules=...): its variables, made once."""
    made: dict[tuple[str, ...], Environment] = {}

    def make(*extras: str, modules: tuple[str, ...] = ()) -> Environment:
        hidden = modules + tuple(module for extra in extras for module in MODULES[extra])
        if hidden not in made:
            made[hidden] = without(tmp_path_factory.mktemp("environment"), hidden)
        return made[hidden]

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good.txt").write_text(STORY)
    return tmp_path


def refuse(variables: Environment, folder: Path, *arguments: str, wanted: str) -> str:
    """One line with `wanted`, exit code 2, no file written. Returns the line."""
    before = sorted(folder.rglob("*"))
    done = run(variables, folder, *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert wanted in done.stderr
    assert sorted(folder.rglob("*")) == before
    return done.stderr


def test_the_main_job_needs_no_extra(environment: Made, folder: Path) -> None:
    every = environment(*MODULES)
    done = run(every, folder, "generate", "good.txt", "--iterations", "1", "--steps", "2", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "out" / "frames").glob("*.png"))) == 2
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    help_ = run(every, folder, "--help")
    assert help_.returncode == 0 and help_.stderr == ""


@pytest.mark.parametrize("module", MODULES["onnx"])
def test_export_without_one_of_the_packages_of_onnx(environment: Made, folder: Path, module: str) -> None:
    said = refuse(
        environment(modules=(module,)), folder, "export", "-o", "out", wanted="pip install 'fastory[onnx]'"
    )
    assert f"package {module}," in said


def test_export_for_trt_without_onnx_names_onnx(environment: Made, folder: Path) -> None:
    refuse(environment("onnx"), folder, "export", "-o", "out", "--trt", wanted="pip install 'fastory[onnx]'")


def test_tune_without_tensorboard(environment: Made, folder: Path) -> None:
    refuse(
        environment("tune"),
        folder,
        *("tune", ".", "-o", "out.safetensors"),
        wanted="pip install 'fastory[tune]'",
    )


def test_serve_without_its_packages(environment: Made, folder: Path) -> None:
    refuse(environment("serve"), folder, "serve", "stories", wanted="pip install 'fastory[serve]'")


def test_distances_of_pictures_without_torchmetrics(environment: Made, folder: Path) -> None:
    """CLIP-T needs no extra; `fastory compare` is refused before it draws."""
    (folder / "story.txt").write_text(STORY)
    bare, wanted = environment("eval"), "pip install 'fastory[eval]'"
    refuse(bare, folder, *("eval", ".", "--encoder", "builtin", "--metrics", "afid"), wanted=wanted)
    compare = ("compare", "good.txt", "--methods", "iterative", "--metrics", "accs,cids", "-o", "out")
    refuse(bare, folder, *compare, wanted=wanted)


def test_batch_on_a_cluster_without_ray(environment: Made, folder: Path) -> None:
    refuse(
        environment("ray"),
        folder,
        *("batch", "good.txt", "-o", "out", "--ray"),
        wanted="pip install 'fastory[ray]'",
    )


@pytest.mark.parametrize("extra", ["s3", "gs"])
def test_batch_into_a_store_without_its_package(extra: str, environment: Made, folder: Path) -> None:
    refuse(
        environment("s3", "gs"),
        folder,
        *("batch", "good.txt", "-o", f"{extra}://bucket/drawn"),
        wanted=f"pip install 'fastory[{extra}]'",
    )


def test_kernels_of_xformers_without_xformers(environment: Made, folder: Path) -> None:
    variables = environment("xformers").but(FASTORY_KERNELS="xformers")
    refuse(
        variables,
        folder,
        *("generate", "good.txt", "--steps", "1", "--iterations", "0", "-o", "out"),
        wanted="pip install 'fastory[xformers]'",
    )


def test_an_export_is_not_drawn_without_onnxruntime(environment: Made, folder: Path) -> None:
    from small_export import write_export

    write_export(folder / "export")
    refuse(
        environment(modules=("onnxruntime",)),
        folder,
        *("generate", "good.txt", "--engine", "export", "-o", "out"),
        wanted="pip install 'fastory[onnx]'",
    )


def test_doctor_names_what_is_not_installed(environment: Made, folder: Path) -> None:
    done = run(environment(*MODULES), folder, "doctor")
    assert done.returncode == 0 and done.stderr == ""
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    told = {line[0]: line[1] for line in lines if len(line) == 2}
    for package in ("xformers", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx"):
        assert told[package] == "not installed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "options", "wanted"),
    [
        ("tensorrt", ["--trt"], "pip install 'tensorrt>=11'"),
        ("rtx", ["--trt", "--rtx", "sm89"], "pip install 'fastory[rtx]'"),
    ],
    ids=["trt", "rtx"],
)
def test_graphs_are_written_where_the_builder_is_missing(
    environment: Made, folder: Path, extra: str, options: list[str], wanted: str
) -> None:
    """The graphs are the long part of the work: they are kept, and the exit code is 3. Quick, of a small export: see
    tests/export/test_export_tensorrt_without_it.py."""
    done = run(environment(extra), folder, "export", "-o", "out", "--component", "unet", "--quiet", *options)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert wanted in done.stderr
    assert (folder / "out" / "unet.trt.onnx").is_file()
