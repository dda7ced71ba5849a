"""The fault tests can fail: a command that is spoilt by a kill is found out, and one that is not passes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from killed import check_every_operation, run_apart, spread

from fastory import files

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")


def nothing(folder: Path) -> None:
    """A trial that begins in an empty folder."""


def whole(folder: Path) -> None:
    files.atomic_write(folder / "a" / "one", b"12345678")
    files.atomic_write(folder / "two", lambda path: path.write_bytes(b"two"))


def spoilt(folder: Path) -> None:
    """Appends, so what a killed run wrote is there twice; blocked once `done` stands."""
    if (folder / "done").exists():
        raise ValueError("in the way")
    files.before_operation("write", folder / "log")
    with (folder / "log").open("a") as file:
        file.write("x")
    files.atomic_write(folder / "done", b"")


def test_a_command_that_survives_every_kill_passes(tmp_path: Path) -> None:
    operations = check_every_operation(tmp_path, nothing, whole)
    assert ("write", "a/.one.partial") in operations and len(operations) == 12
    assert {operation for operation, _ in operations} == {
        "make", "write", "write the rest of", "sync", "replace", "sync the folder of"
    }  # fmt: skip


def test_a_command_that_does_not_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"log \(other bytes\)") as error:
        check_every_operation(tmp_path, nothing, spoilt)
    assert "in the way" in str(error.value)


def test_what_a_kill_left_is_looked_at(tmp_path: Path) -> None:
    def complete(folder: Path) -> None:
        assert (folder / "two").exists()

    with pytest.raises(AssertionError, match="what it left"):
        check_every_operation(tmp_path, nothing, whole, after_kill=complete)


def test_a_command_that_fails_says_how(tmp_path: Path) -> None:
    ended = run_apart(lambda folder: 1 / 0, tmp_path)
    assert ended.status == 1 and "ZeroDivisionError" in ended.said


def test_operations_are_spread_from_the_first_to_the_last() -> None:
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 12)[0] == 0 and spread(100, 12)[-1] == 99 and len(spread(100, 12)) == 12
