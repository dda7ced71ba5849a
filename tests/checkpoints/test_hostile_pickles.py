"""A pickle that holds what safetensors cannot is refused in one line at once, and nothing is written; no tensor is dropped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import time_limit

from fastory.checkpoints import convert_checkpoint
from fastory.errors import InputError


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"weight": torch.zeros(1)}
    for _ in range(depth):
        inner = {"a": inner}
    return inner


def cyclic() -> dict[str, Any]:
    own: dict[str, Any] = {"weight": torch.zeros(1)}
    own["own"] = own
    return own


def doubled() -> dict[str, Any]:
    """30 mappings, each twice in the next: 2**30 names from a few hundred bytes."""
    inner: dict[str, Any] = {"weight": torch.zeros(1)}
    for _ in range(30):
        inner = {"a": inner, "b": inner}
    return inner


HOSTILE: dict[str, tuple[Callable[[], object], str]] = {
    "sparse": (lambda: {"w": torch.eye(4).to_sparse()}, "w is sparse_coo"),
    "csr": (lambda: {"w": torch.eye(4).to_sparse_csr()}, "w is sparse_csr"),
    "complex128": (lambda: {"w": torch.zeros(2, dtype=torch.complex128)}, "w is of type complex128"),
    "quantised": (
        lambda: {"w": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8)},
        "w is quantised",
    ),
    "meta": (lambda: {"w": torch.zeros(4, device="meta")}, "w has no data"),
    "surrogate": (lambda: {"w\ud800": torch.zeros(1)}, r"a name in it is 'w\ud800'"),
    "key-none": (lambda: {None: None, "w": torch.zeros(1)}, "a name in it is 'None'"),
    "long-name": (lambda: {"w" * 100_000: torch.zeros(1)}, "a name in it is 'www"),
    "deep": (lambda: nested(5000), "more than 32 mappings"),
    "cyclic": (cyclic, "more than 32 mappings"),
    "doubled": (doubled, "more than 1000000 entries"),
    "same-name": (
        lambda: {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}},
        "two tensors of it are named a.b",
    ),
    "expanded": (lambda: {"w": torch.zeros(1).expand(10**13)}, "w would repeat its numbers"),
    "number": (lambda: {"w": torch.zeros(1), "epoch": 3}, "epoch is a int"),
    "list": (lambda: [torch.zeros(1)], "holds a list"),
    "empty": (dict, "holds no tensors"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_refused_in_one_line_with_nothing_written(tmp_path: Path, kind: str, legacy: bool) -> None:
    make, said = HOSTILE[kind]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)  # for saving alone
    try:
        torch.save(make(), tmp_path / "strange.bin", _use_new_zipfile_serialization=not legacy)
    finally:
        sys.setrecursionlimit(limit)
    with time_limit(20), pytest.raises(InputError) as refused:
        convert_checkpoint(tmp_path / "strange.bin")
    message = str(refused.value)
    assert said in message and "strange.bin" in message
    assert "\n" not in message and len(message) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["strange.bin"]


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".bin", "~nouser/x.bin", "nul\0.bin", "absent.bin", "folder.bin"]
)
def test_a_name_that_is_no_pickle(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.bin").mkdir()
    path = Path(name) if name.startswith("~") else tmp_path / name
    with pytest.raises(InputError) as refused:
        convert_checkpoint(path)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_damaged_pickle_is_refused_in_one_line(tmp_path: Path, legacy: bool) -> None:
    """Every byte of the structure in turn is another one: torch raises a dozen kinds of errors over them."""
    file = tmp_path / "damaged.bin"
    torch.save(
        {"a": torch.arange(4.0), "b": {"c": torch.ones(2)}}, file, _use_new_zipfile_serialization=not legacy
    )
    whole = file.read_bytes()
    for at in range(0, min(len(whole), 1200), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        output = tmp_path / "damaged.safetensors"
        with time_limit(20):
            try:
                convert_checkpoint(file, output, overwrite=True)
            except InputError as error:
                assert "\n" not in str(error), (at, str(error))
                assert not output.exists()
        output.unlink(missing_ok=True)


def test_an_expanded_tensor_of_common_size_is_kept(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.save({"w": torch.ones(1).expand(64, 8)}, tmp_path / "a.bin")
    assert torch.equal(load_file(convert_checkpoint(tmp_path / "a.bin"))["w"], torch.ones(64, 8))
