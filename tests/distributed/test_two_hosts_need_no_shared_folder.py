"""Two torchruns as of two hosts, each with an address and a folder of its own: what one lacks is not asked of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from killed import contents
from ranks import FEW, run_ranks

CAPTIONS = ["a cat is jumping", "a fox in the snow", "a bear", "a rabbit in the forest", "a fox"]
LIMIT = 400.0  # seconds: four processes import PyTorch


def start(host: int, port: int, folder: Path) -> subprocess.Popen[str]:
    """The command on a host: where its story lies, in `folder`, only the first one knows."""
    folder.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={host}", "--nproc-per-node=1"]
    meeting = ["--master-addr=127.0.0.1", f"--master-port={port}", f"--local-addr=127.0.0.{host + 1}"]
    return subprocess.Popen(
        [sys.executable, *torchrun, *meeting, "-m", "fastory", "generate", "story.txt", "-o", "run", *FEW],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


@pytest.mark.slow
def test_the_other_host_has_neither_the_story_nor_the_run(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    hosts = [start(host, port, tmp_path / f"host-{host}") for host in (0, 1)]
    (tmp_path / "host-0" / "story.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    (_, err), (other_out, other_err) = (host.communicate(timeout=LIMIT) for host in hosts)
    assert [host.returncode for host in hosts] == [0, 0], (err, other_err)
    assert not other_out and "error" not in other_err
    assert not list((tmp_path / "host-1").iterdir())
    run = tmp_path / "host-0" / "run"
    assert json.loads((run / "manifest.json").read_text())["processes"] == [2]
    story = tmp_path / "host-0" / "story.txt"
    (alone,) = run_ranks(1, ["generate", story, "-o", tmp_path / "alone", *FEW], tmp_path)
    assert alone.status == 0, alone.err
    found, wanted = contents(run), contents(tmp_path / "alone")
    assert found.pop("manifest.json") and wanted.pop("manifest.json")
    assert found == wanted
