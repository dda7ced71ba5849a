"""Pictures as an MP4, one after the other, by the ffmpeg of this machine: no Python package of ours encodes H.264."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from fastory.errors import FastoryError, InputError

RATE = 25  # pictures a second of the film, each shown as often as it takes: players stumble over fewer


def ffmpeg() -> str | None:
    """Where the program is, or None."""
    return shutil.which("ffmpeg")


def write_film(pictures: Iterable[Image.Image], size: tuple[int, int], path: Path, seconds: float) -> None:
    """Write an MP4 (H.264, yuv420p) of RGB pictures of one size, each shown for so many seconds.

    Sides that are odd lose a pixel, as H.264 halves the colours' resolution. Raises InputError where there is no ffmpeg,
    FastoryError in its words where it fails.
    """
    program = ffmpeg()
    if program is None:
        raise InputError(
            "--mp4: wanted ffmpeg on the PATH, got none; install it, or take --webp, which needs nothing"
        )
    source = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{size[0]}x{size[1]}",
        "-r",
        f"{1 / seconds:.6f}",
        "-i",
        "-",
    ]
    even = f"crop=trunc(iw/2)*2:trunc(ih/2)*2,fps={RATE}"
    plain = ["-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-threads", "1"]
    target = ["-vf", even, "-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    command = [
        program,
        "-nostdin",
        "-y",
        "-loglevel",
        "error",
        *source,
        *target,
        *plain,
        "-f",
        "mp4",
        f"file:{path}",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        try:
            for picture in pictures:
                process.stdin.write(picture.tobytes())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended, and says why
        said = process.stderr.read().decode(errors="replace").strip()
    if process.returncode:
        raise FastoryError(
            f"ffmpeg cannot write the film: {said.splitlines()[-1] if said else process.returncode}"
        )
