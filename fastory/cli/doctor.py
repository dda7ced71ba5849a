"""`fastory doctor`: what a bug report should hold."""

from __future__ import annotations

from fastory.cli.reporting import quiet_libraries, reported, say


def doctor() -> None:
    """Print versions, devices, and which kernels would run and why not others, to paste in a bug report."""
    with reported():
        quiet_libraries()
        from fastory.doctor import report

        say("\n".join(report()))
