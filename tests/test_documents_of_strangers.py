"""JSON that others may have written is read with bounds, and whatever is wrong with it is one line that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fastory import files
from fastory.documents import MOST_BYTES, MOST_DEPTH, read_json
from fastory.errors import FastoryError, InputError


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * (MOST_DEPTH + 1) + b"]" * (MOST_DEPTH + 1),
        b"1" * 400,
        b"[" + b"9" * 5000 + b"]",
        b"NaN",
        b"-Infinity",
        b"[1e999]",
        b'["\\ud800"]',
        b'{"a\\uDC00b": 1}',
        b" " * (MOST_BYTES + 1),
    ],
    ids=range(15),
)
def test_text_that_is_no_plain_json_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(InputError) as error:
        read_json(tmp_path / "x.json", what="a list")
    assert "x.json" in str(error.value) and "wanted a list" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(tmp_path))


def test_plain_json_is_read_as_json_reads_it(tmp_path: Path) -> None:
    values = {"a": [1, -2.5, 1e30, True, None, "é\ud83d\ude00"], "b": {"c": 2**63}}
    text = json.dumps(values)
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_json(tmp_path / "x.json", what="a list") == json.loads(text)
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    (tmp_path / "x.json").write_text(deep)
    assert read_json(tmp_path / "x.json", what="a list") == json.loads(deep)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", ".", "missing", "x" * 300, "a\0b"):
        with pytest.raises(InputError, match="wanted a list"):
            read_json(tmp_path / name, what="a list")
    with pytest.raises(InputError, match="a pipe or a device"):
        read_json(Path("/dev/zero"), what="a list")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "file"
    files.atomic_write(target, b"old")

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FastoryError, match=r"the disk is full: .*file"):
        files.atomic_write(target, fail)
    assert target.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_in_the_partial_files_place_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    files.partial_of(tmp_path / "file").symlink_to(victim)
    for data in (b"new", lambda path: path.write_bytes(b"new")):
        files.atomic_write(tmp_path / "file", data)
        assert victim.read_bytes() == b"mine" and (tmp_path / "file").read_bytes() == b"new"
        assert not (tmp_path / "file").is_symlink()
        files.partial_of(tmp_path / "file").symlink_to(victim)


def test_removing_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_bytes(b"mine")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "link").symlink_to(tmp_path / "mine")
    files.remove(tmp_path / "ours")
    files.remove(tmp_path / "never there")
    assert (tmp_path / "mine" / "file").read_bytes() == b"mine" and not (tmp_path / "ours").exists()
