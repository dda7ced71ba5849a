"""Converting a pickle must not run it, lose or invent tensors, or destroy a file that is there."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastory.checkpoints import convert_pickle, open_checkpoint
from fastory.checkpoints.writing import save_tensors
from fastory.errors import FastoryError, InputError
from fastory.files import MARK


class RunsWhenRead:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_pickled_adapter_converts_to_the_published_layout_and_opens(
    sd15_folder: Path, sd15_adapter_plus: Path, tmp_path: Path
) -> None:
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, weight in load_file(sd15_adapter_plus).items():
        part, _, key = name.partition(".")
        nested[part][key] = weight
    torch.save(nested, tmp_path / "adapter.bin")
    converted = convert_pickle(tmp_path / "adapter.bin")
    assert converted == tmp_path / "adapter.safetensors"
    opened = load_file(converted)
    wanted = load_file(sd15_adapter_plus)
    assert opened.keys() == wanted.keys()
    assert all(torch.equal(opened[name], wanted[name]) for name in wanted)
    assert open_checkpoint(str(sd15_folder), ip_adapter=str(converted)).adapter is not None


@pytest.mark.parametrize("legacy", [False, True])
def test_program_in_a_pickle_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    contents = {"weight": torch.zeros(2), "other": RunsWhenRead(tmp_path / "it-ran")}
    torch.save(contents, tmp_path / "evil.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="could run any program"):
        convert_pickle(tmp_path / "evil.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.bin"]


def test_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(RunsWhenRead(tmp_path / "it-ran")))
    with pytest.raises(InputError):
        convert_pickle(tmp_path / "evil.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt"]


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"weight": torch.zeros(1), "step": 7}, "step is a int"),
        ({"part": {"weight": torch.zeros(1), "name": "x"}}, "part.name is a str"),
        ({}, "holds no tensors"),
    ],
)
def test_what_is_not_tensors_alone_is_refused(contents: object, words: str, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "x.bin")
    with pytest.raises(InputError, match=words):
        convert_pickle(tmp_path / "x.bin")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_pickle_is_one_message(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"weight": torch.zeros(100)}, path)
    path.write_bytes({"cut": path.read_bytes()[:200], "text": b"hello world", "empty": b""}[damage])
    with pytest.raises(InputError, match=r"x\.bin"):
        convert_pickle(path)


def test_training_checkpoint_gives_its_state_dict(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a.b": torch.ones(2)}, "global_step": 7, "epoch": 1}, tmp_path / "m.ckpt")
    assert list(load_file(convert_pickle(tmp_path / "m.ckpt"))) == ["a.b"]


def test_tensors_that_share_memory_all_arrive(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": shared, "b": shared, "row": shared[1], "turned": shared.T}, tmp_path / "m.pt")
    weights = load_file(convert_pickle(tmp_path / "m.pt"))
    assert torch.equal(weights["b"], shared) and torch.equal(weights["row"], shared[1])
    assert torch.equal(weights["turned"], shared.T)


def test_existing_file_is_kept_unless_asked(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "m.bin")
    output = convert_pickle(tmp_path / "m.bin")
    before = output.read_bytes()
    assert convert_pickle(tmp_path / "m.bin") == output  # the same bytes: nothing to refuse
    output.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists and holds something else"):
        convert_pickle(tmp_path / "m.bin")
    with pytest.raises(InputError, match="is not known as a file of `fastory convert`"):
        convert_pickle(tmp_path / "m.bin", overwrite=True)
    assert output.read_bytes() == b"mine"
    save_file({"a": torch.ones(2)}, output, {"format": "pt"})  # the same, as an older version wrote it
    older = output.read_bytes()
    convert_pickle(tmp_path / "m.bin", overwrite=True)
    assert output.read_bytes() == older
    output.unlink()
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.bin")
    convert_pickle(tmp_path / "other.bin", output)
    convert_pickle(tmp_path / "m.bin", overwrite=True)
    assert output.read_bytes() == before
    (tmp_path / "other.bin").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.safetensors"]


def test_transformers_reads_what_was_converted(tmp_path: Path) -> None:
    """transformers looks for model.safetensors, and refuses a file whose metadata names no format."""
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    output = convert_pickle(tmp_path / "pytorch_model.bin")
    assert output.name == "model.safetensors"
    with safe_open(output, framework="pt") as file:
        assert (file.metadata() or {}).get("format") == "pt"


def test_equal_tensors_are_equal_bytes(tmp_path: Path) -> None:
    """Two keys of metadata stand in an order of chance in what safetensors writes."""
    for number in range(8):
        save_tensors(tmp_path / f"{number}.safetensors", {"ä\u0001": torch.ones(2), "b": torch.zeros(3)})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert load_file(tmp_path / "0.safetensors").keys() == {"ä\u0001", "b"}


@pytest.mark.parametrize(("source", "target"), [("x.txt", None), ("none.bin", None), ("m.bin", "m.bin")])
def test_unusable_names_are_refused(source: str, target: str | None, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "m.bin")
    (tmp_path / "x.txt").write_text("x", "utf-8")
    with pytest.raises(InputError, match=r"cannot be converted|must end in"):
        convert_pickle(tmp_path / source, tmp_path / target if target else None)


@pytest.mark.skipif(sys.platform == "win32", reason="no such folder to write to")
def test_folder_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "m.bin")
    with pytest.raises(InputError, match="cannot be written"):
        convert_pickle(tmp_path / "m.bin", Path("/proc/m.safetensors"))


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_converted_file_has_the_rights_that_the_umask_gives(umask: int, mode: int, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "m.bin")
    old = os.umask(umask)
    try:
        output = convert_pickle(tmp_path / "m.bin")
    finally:
        os.umask(old)
    assert output.stat().st_mode & 0o777 == mode


def test_what_a_killed_process_left_is_cleared_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "m.bin")
    place = tmp_path / "m.safetensors.unfinished"
    (place / "new").mkdir(parents=True)
    (place / "m.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="unfinished is in the way"):
        convert_pickle(tmp_path / "m.bin")  # nothing says that it is ours
    assert (place / "m.safetensors").read_bytes() == b"half"
    with (
        FileLock(place / MARK),
        pytest.raises(FastoryError, match=r"another process is writing .*m\.safetensors;"),
    ):
        convert_pickle(tmp_path / "m.bin")
    assert (place / "m.safetensors").read_bytes() == b"half"
    (place / MARK).touch()
    (place / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="unfinished is in the way"):
        convert_pickle(tmp_path / "m.bin")  # it has our mark, and a file that we never write there
    assert (place / "letter.txt").read_text() == "mine"
    (place / "letter.txt").unlink()
    convert_pickle(tmp_path / "m.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.safetensors"]
